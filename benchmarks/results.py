"""Rows that cpu.py measures, as JSON and as a table."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from contenders import Kind


@dataclass(frozen=True)
class Row:
    """One kernel at one shape, batch and number of threads.

    Attributes:
        kind: the kernel.
        shape: ``KxN``.
        median_ms: of one node.
        gbps: bytes of weights and scales over that time, 1e9 a second.
        read_gbps: what the same number of threads read from memory in the same rounds.
        turns: how often it was measured.
        undisturbed: turns that the median is of.
    """

    kind: Kind
    shape: str
    batch: int
    threads: int
    median_ms: float
    gbps: float
    read_gbps: float
    turns: int
    undisturbed: int

    @property
    def share(self) -> float:
        """Of the read bandwidth."""
        return self.gbps / self.read_gbps

    @property
    def name(self) -> str:
        """``int8, 3 bases``; ``MatMulNBits 4-bit L4 b32``: accuracy_level 4, block_size 32."""
        kind = self.kind
        if kind.kernel == "fp32":
            return "fp32 MatMul"
        if kind.ours:
            head = "function body" if kind.kernel == "body" else kind.mode
            return f"{head}, {kind.width} {'base' if kind.width == 1 else 'bases'}"
        how = "look-up" if kind.mode == "lut" else f"L{kind.accuracy_level}"
        return f"{kind.kernel} {kind.width}-bit {how} b{kind.block_size}"

    def to_json(self) -> dict[str, Any]:
        """As the GPU benchmark writes it too; ours have ``bases``, others ``bits``."""
        kind = self.kind
        rest = {name: value for name, value in vars(self).items() if name != "kind"}
        return {
            "kernel": kind.kernel,
            "bases" if kind.ours else "bits": kind.width,
            "mode": kind.mode,
            **rest,
            "share": self.share,
            "block_size": kind.block_size,
            "accuracy_level": kind.accuracy_level,
        }

    @staticmethod
    def from_json(row: dict[str, Any]) -> Row:
        row = dict(row)
        width = row.pop("bases", None) or row.pop("bits")
        del row["share"]
        names = ("kernel", "mode", "block_size", "accuracy_level")
        return Row(Kind(width=width, **{name: row.pop(name) for name in names}), **row)


def read(path: Path) -> list[Row]:
    """Rows of an earlier run."""
    return [Row.from_json(row) for row in json.loads(path.read_text(encoding="utf-8"))["rows"]]


def write(rows: list[Row], path: Path) -> None:
    path.write_text(json.dumps({"rows": [row.to_json() for row in rows]}, indent=1) + "\n", encoding="utf-8")


def unique(values: Iterator[Any]) -> list[Any]:
    """Without repetitions, in order of appearance."""
    return list(dict.fromkeys(values))


def table(rows: list[Row]) -> Table:
    """One line for each kernel, shape and number of threads; a column of milliseconds for each batch."""
    batches = unique(row.batch for row in rows)
    first = batches[0]
    result = Table(title=f"median ms a node; bandwidth and speed against fp32 at M={first}")
    for column in ("shape", "threads", "kernel", *(f"M={batch}" for batch in batches), "GB/s", "share", "fp32"):
        result.add_column(column, justify="left" if column in ("shape", "kernel") else "right", no_wrap=True)
    for shape, threads in unique((row.shape, row.threads) for row in rows):
        here = [row for row in rows if (row.shape, row.threads) == (shape, threads)]
        base = next(row for row in here if row.kind.kernel == "fp32" and row.batch == first)
        head = [shape, str(threads)]
        for kind in unique(row.kind for row in here):
            line = {row.batch: row for row in here if row.kind == kind}
            row = line[first]
            figures = (f"{row.gbps:.1f}", f"{row.share:.0%}", f"{base.median_ms / row.median_ms:.2f}x")
            result.add_row(*head, row.name, *(f"{line[batch].median_ms:.3f}" for batch in batches), *figures)
            head = ["", ""]
        result.add_section()
    return result
