"""Perplexity against bits per weight for the recipes and numbers of bases, as JSON and as a picture.

    python benchmarks/quality.py ../shared/models/gutenberg-llama-28m ../shared/data/gutenberg_heldout.txt \
        --json docs/quality.json --plot docs/quality.svg

Each point is what `qbb-export MODEL --recipe R --bases N` and `qbb eval` give. `--replot` draws an existing JSON file.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from rich.table import Table

from qbb_export.evaluate import perplexity
from qbb_export.pipeline import ExportOptions, export
from qbb_export.quantize import QuantizeSettings

# (recipe, settings); the first is what all others are held against.
POINTS: list[tuple[str, dict[str, Any]]] = [
    ("float", {}),
    *(("fast", {"bases": n}) for n in (2, 3, 4, 5)),
    ("fast", {"bases": 3, "offset": False}),
    ("fast", {"bases": 4, "group_size": 0}),
    *(("greedy", {"bases": n}) for n in (3, 4, 5, 6)),
]


def measure(model: str, text: Path, recipe: str, settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Export, evaluate, and say how long the export took."""
    path = folder / "model.onnx"
    options = ExportOptions(recipe=recipe, settings=QuantizeSettings(**settings), record=folder / "record", force=True)
    start = time.monotonic()
    report = export(model, path, options)
    seconds = time.monotonic() - start
    result = perplexity(path, text)
    return {
        "recipe": recipe,
        **settings,
        "bits_per_weight": round(report.bits_per_weight, 4),
        "perplexity": round(result.perplexity, 4),
        "windows": result.windows,
        "file_mb": round(report.file_bytes / 1e6, 2),
        "export_seconds": round(seconds, 1),
        "verified": report.ok,
    }


def name_of(point: dict[str, Any]) -> str:
    """``fast, 3 bases, no offset``."""
    parts = [point["recipe"]]
    if "bases" in point:
        parts.append(f"{point['bases']} bases")
    if point.get("group_size") == 0:
        parts.append("one scale a row")
    if point.get("offset") is False:
        parts.append("no offset")
    return ", ".join(parts)


def plot(points: list[dict[str, Any]], path: Path) -> None:
    """Bits per weight to the right, perplexity upwards, a line for each recipe at its defaults."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "quality"  # the same points give the same file
    from matplotlib import pyplot
    from matplotlib.ticker import FixedLocator, ScalarFormatter

    figure, axes = pyplot.subplots(figsize=(7, 3.8))
    baseline = next(p["perplexity"] for p in points if p["recipe"] == "float")
    axes.axhline(baseline, color="0.5", linestyle="--", linewidth=1)
    right = max(p["bits_per_weight"] for p in points if p["recipe"] != "float")
    axes.text(right, baseline * 1.01, f"float: {baseline:.2f}", color="0.35", ha="right", va="bottom")
    for recipe, label, marker in (
        ("greedy", "greedy: the paper's first step alone", "s"),
        ("fast", "fast: the default, weights only", "o"),
    ):
        chosen = [p for p in points if p["recipe"] == recipe and "group_size" not in p and "offset" not in p]
        xs, ys = [p["bits_per_weight"] for p in chosen], [p["perplexity"] for p in chosen]
        axes.plot(xs, ys, marker=marker, label=label)
        for point, x, y in zip(chosen, xs, ys, strict=True):
            axes.annotate(f"{point['bases']}", (x, y), textcoords="offset points", xytext=(6, 5), fontsize=9)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(FixedLocator([25, 30, 40, 50, 60, 80, 100, 150]))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_locator(FixedLocator([]))
    axes.set_xlabel("bits per weight, scales and offsets counted (numbers at the points: bases)")
    axes.set_ylabel("perplexity (lower is better)")
    axes.set_title("28 M-parameter Llama, held-out books", fontsize=11)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Measure or replot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("text", nargs="?", type=Path)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--replot", action="store_true")
    options = parser.parse_args()
    console = Console()
    points: list[dict[str, Any]] = []
    if options.replot:
        points = json.loads(options.json.read_text(encoding="utf-8"))
    else:
        for recipe, settings in POINTS:
            with TemporaryDirectory() as folder, console.status(name_of({"recipe": recipe, **settings})):
                points.append(measure(options.model, options.text, recipe, settings, Path(folder)))
            console.print(points[-1])
        options.json.write_text(json.dumps(points, indent=1) + "\n", encoding="utf-8")
    table = Table()
    for column in ("model", "bits per weight", "perplexity", "against float", "file MB", "export s"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for p in points:
        ratio = p["perplexity"] / points[0]["perplexity"]
        figures = (f"{p['bits_per_weight']:.3f}", f"{p['perplexity']:.2f}", f"{ratio:.3f}x", f"{p['file_mb']:.1f}")
        table.add_row(name_of(p), *figures, f"{p['export_seconds']:.0f}")
    console.print(table)
    if options.plot:
        plot(points, options.plot)


if __name__ == "__main__":
    main()
