"""One operator against what else there is for the same product: time per node on an NVIDIA GPU.

    python benchmarks/gpu.py --json gpu.json

Ours and cuBLAS float16 through PyTorch, MatMulNBits through ONNX Runtime, gemlite where it is installed. Each contender
has so many copies of its weights that they pass the second-level cache, all in one CUDA graph. Graphs are replayed in
turns; the figure is the median, divided by the number of copies. What makes bit planes or anything else of X is inside.
How fast memory can be read is measured in the same rounds.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))  # the tests' view of the C interface

import rivals_gpu
from qbb_export import format as fmt
from tests.gpu.cuda_abi import CudaKernel
from tests.kernels.layers import Layer

GROUP_SIZE = 128
PAST_CACHE = 260e6  # bytes of weights in a graph
FEWEST_COPIES = 8
READ = 1 << 30  # bytes of one read that shows the bandwidth
Call = Callable[[], None]


@dataclass(frozen=True)
class Row:
    """One kernel at one shape and batch.

    Attributes:
        kernel: ``qbb``, ``fp16``, ``MatMulNBits`` or ``gemlite``.
        width: bases, or bits.
        mode: of ours: ``exact`` or ``int8``; of others: how.
        shape: ``KxN``.
        median_ms: of one product.
        gbps: bytes of weights and scales over that time, 1e9 a second.
        share: of the read bandwidth.
        times_fp16: how many times as fast as cuBLAS float16.
    """

    kernel: str
    width: int
    mode: str
    shape: str
    batch: int
    median_ms: float
    gbps: float
    share: float
    times_fp16: float

    def to_json(self) -> dict[str, Any]:
        """As cpu.py writes it."""
        row = asdict(self)
        width = row.pop("width")
        return {"kernel": self.kernel, "bases" if self.kernel == "qbb" else "bits": width, **row, "threads": 0}


@dataclass
class Contender:
    """Something that multiplies, ``copies`` times at a call of ``replay``."""

    kernel: str
    width: int
    mode: str
    bytes: int  # of one copy's weights
    copies: int
    replay: Call


class Graph:
    """Replays calls; keeps them, so that the memory they use stays theirs."""

    def __init__(self, graph: torch.cuda.CUDAGraph, calls: Sequence[Call]) -> None:
        self._graph = graph
        self._calls = calls

    def __call__(self) -> None:
        """Start all of them."""
        self._graph.replay()


def captured(calls: Sequence[Call]) -> Graph:
    """All calls as one CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    return Graph(graph, calls)


def copies_of(size: int) -> int:
    """So many that they pass the cache, and that it does not count how long a graph takes to start."""
    return max(FEWEST_COPIES, int(PAST_CACHE / size) + 1)


@functools.cache
def layer_of(k: int, n: int, bases: int) -> Layer:
    """Random bits and scales: how fast a product is does not depend on them."""
    spec = fmt.Spec(k, n, bases, GROUP_SIZE, fmt.LAYOUT_TILED)
    rng = np.random.default_rng(0)
    planes = rng.integers(0, 2**32, (bases, spec.tiles, spec.words, fmt.TILE_ROWS), dtype=np.uint32)
    scales = rng.uniform(0.005, 0.015, (bases, spec.tiles, spec.groups, fmt.TILE_ROWS)).astype(np.float16)
    return Layer(spec, planes, scales, np.zeros((1, 1), np.float32), np.zeros(1, np.float32))


def ours(k: int, n: int, batch: int, bases: int, mode: int) -> Contender:
    layer = layer_of(k, n, bases)
    size = layer.planes.nbytes + layer.scales.nbytes
    kernels = [CudaKernel(layer, mode) for _ in range(copies_of(size))]
    x = torch.randn(batch, k, dtype=torch.float16, device="cuda")
    y = torch.empty(batch, n, dtype=torch.float16, device="cuda")
    replay = captured([lambda kernel=kernel: kernel.into(x, y) for kernel in kernels])  # type: ignore[misc]
    return Contender("qbb", bases, ("exact", "int8")[mode], size, len(kernels), replay)


def cublas(k: int, n: int, batch: int) -> Contender:
    size = 2 * k * n
    weights = [torch.randn(n, k, dtype=torch.float16, device="cuda") for _ in range(copies_of(size))]
    x = torch.randn(batch, k, dtype=torch.float16, device="cuda")
    replay = captured([lambda w=w: torch.nn.functional.linear(x, w) for w in weights])  # type: ignore[misc]
    return Contender("fp16", 16, "cuBLAS", size, len(weights), replay)


def reader() -> Contender:
    memory = torch.zeros(READ // 4, dtype=torch.int32, device="cuda")
    return Contender("read", 0, "", READ, 1, captured([lambda: torch.amax(memory)]))  # type: ignore[list-item,return-value]


def milliseconds(replay: Call) -> float:
    """Of one call, by the GPU's clock."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def measure(k: int, n: int, batch: int, options: argparse.Namespace, left_out: dict[str, str]) -> list[Row]:
    """All contenders at one shape and batch, in turns."""
    contenders = [reader(), cublas(k, n, batch)]
    contenders += [ours(k, n, batch, bases, mode) for bases in options.bases for mode in options.modes]
    for name, make in rivals_gpu.RIVALS.items():
        if not fnmatchcase(name, options.rivals):
            continue
        try:
            contenders.append(Contender(*make(k, n, batch, copies_of)))
        except Exception as error:  # not installed, or it has no such kernel
            left_out[f"{name} at {k}x{n}, M={batch}"] = (str(error) or type(error).__name__).splitlines()[0]
    for contender in contenders:
        for _ in range(3):
            contender.replay()
    torch.cuda.synchronize()
    times: list[list[float]] = [[] for _ in contenders]
    rng = np.random.default_rng(0)
    for _ in range(options.turns):
        for i in rng.permutation(len(contenders)):
            times[i].append(milliseconds(contenders[i].replay) / contenders[i].copies)
    medians = [statistics.median(t) for t in times]
    read = READ / medians[0] / 1e6
    rows = []
    for contender, median in zip(contenders[1:], medians[1:], strict=True):
        gbps = contender.bytes / median / 1e6
        figures = (median, gbps, gbps / read, medians[1] / median)
        rows.append(Row(contender.kernel, contender.width, contender.mode, f"{k}x{n}", batch, *figures))
    return rows


def show(rows: Sequence[Row]) -> Table:
    """All rows as a table."""
    table = Table()
    for column in ("shape", "M", "kernel", "µs", "GB/s", "of read", "times fp16"):
        table.add_column(column, justify="left" if column == "kernel" else "right")
    for row in rows:
        name = f"{row.kernel} {row.width} {row.mode}"
        figures = (f"{1e3 * row.median_ms:.1f}", f"{row.gbps:.0f}", f"{row.share:.0%}", f"{row.times_fp16:.2f}")
        table.add_row(row.shape, str(row.batch), name, *figures)
    return table


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="4096x4096,4096x14336,14336x4096,8192x28672", help="KxN,…")
    parser.add_argument("--batch", default="1,8,16,64", help="M,…")
    parser.add_argument("--bases", default="1,2,3,4")
    parser.add_argument("--modes", default="exact,int8", help="of ours")
    parser.add_argument("--rivals", default="*", help="pattern of their names")
    parser.add_argument("--turns", type=int, default=31)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.bases = [int(b) for b in options.bases.split(",")]
    options.modes = [fmt.MODES.index(mode) for mode in options.modes.split(",")]
    shapes = [tuple(int(v) for v in shape.split("x")) for shape in options.shapes.split(",")]
    cases = [(k, n, int(m)) for k, n in shapes for m in options.batch.split(",")]
    console = Console(width=120)
    rows: list[Row] = []
    left_out: dict[str, str] = {}
    for k, n, batch in track(cases, "measuring", console=console):
        rows += measure(k, n, batch, options, left_out)
        if options.json is not None:
            told = {"gpu": torch.cuda.get_device_name(), "rows": [row.to_json() for row in rows]}
            options.json.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
        torch.cuda.empty_cache()
    console.print(torch.cuda.get_device_name())
    console.print(show(rows))
    for name, why in left_out.items():
        console.print(f"left out: {name}: {why}", markup=False)


if __name__ == "__main__":
    main()
