"""The picture of cpu.py: time grows linearly with bases and with K·N."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from results import Row, unique


def draw(axes: Any, xs: list[float], ys: list[float], label: str, style: dict[str, Any]) -> None:
    """Points, and the straight line that is nearest to them where there are enough to miss it."""
    axes.plot(xs, ys, "o", markersize=4, label=label, **style)
    if len(xs) > 2:
        slope, start = np.polyfit(xs, ys, 1)
        ends = np.array([0, max(xs)])
        axes.plot(ends, start + slope * ends, linewidth=1, **style)


def plot(rows: list[Row], path: Path) -> None:
    """Left: time against bases at the largest shape. Right: against K·N, at 3 bases where measured.

    Smallest batch and fewest threads of the rows. With fewer than three points there is no line.
    """
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "cpu"  # the same rows give the same file
    from matplotlib import pyplot

    batch, threads = min(row.batch for row in rows), min(row.threads for row in rows)
    chosen = [row for row in rows if row.kind.kernel == "qbb" and (row.batch, row.threads) == (batch, threads)]

    def area(row: Row) -> int:
        k, n = row.shape.split("x")
        return int(k) * int(n)

    shape = max(chosen, key=area).shape
    widths = unique(row.kind.width for row in chosen)
    bases = 3 if 3 in widths else max(widths)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6))
    for color, mode in enumerate(unique(row.kind.mode for row in chosen)):
        style = {"color": f"C{color}"}
        of_mode = [row for row in chosen if row.kind.mode == mode]
        line = [row for row in of_mode if row.shape == shape]
        draw(left, [row.kind.width for row in line], [row.median_ms for row in line], mode, style)
        line = [row for row in of_mode if row.kind.width == bases]
        draw(right, [area(row) / 2**20 for row in line], [row.median_ms for row in line], mode, style)
    left.set_xlabel(f"bases, at {shape.replace('x', ' × ')}")
    left.set_xticks(widths)
    right.set_xlabel(f"K·N in units of 2²⁰, {bases} bases")
    for axes in (left, right):
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.set_ylabel(f"ms, M = {batch}, {threads} thread{'s' if threads > 1 else ''}")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
