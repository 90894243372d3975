"""One operator against what ONNX Runtime has for the same product: time per node on the CPU.

    python benchmarks/cpu.py --shapes 4096x4096,4096x14336,14336x4096 --batch 1,2,4,8,16,128 --json cpu.json

All kernels run in one process, in turns, so that they meet the same noise. A turn goes through several copies of the
weights, three times the last-level cache in all; where that would take long it is one copy, which comes again when the
others have read as much. The figure is the median of the turns that got the processors for at least 90 % of their time.
How fast memory can be read is measured in the same rounds. Kernels that ONNX Runtime does not have are left out.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnxruntime
from rich.console import Console
from rich.progress import track

import claims
import results
import timing
from contenders import FLOAT, GROUP_SIZE, RIVALS, Contender, Kind, Weights
from plot import plot
from results import Row

SMALLEST = 1 << 16  # bytes, so that there is something to read
FILE_WIDTH = 150  # columns of the table where it goes to a file
MODES = ("exact", "int8", "int16")


def open_all(
    kinds: Sequence[Kind], k: int, n: int, threads: int, weights: Weights, left_out: dict[str, str]
) -> list[Contender]:
    """Sessions of all kinds; those of others that ONNX Runtime refuses are noted in ``left_out``."""
    contenders = []
    for kind in kinds:
        try:
            contenders.append(Contender(kind, k, n, threads, weights))
        except Exception as error:
            if kind.kernel != "MatMulNBits":
                raise
            left_out[f"{kind} at {k}x{n}"] = str(error).splitlines()[0]
    return contenders


def measure(contenders: list[Contender], readers: list[timing.Reader], batch: int, turns: int) -> list[Row]:
    """All contenders of one shape and number of threads at one batch, in turns."""
    _, k, n, threads = contenders[0].where
    x = np.random.default_rng(1).standard_normal((batch, k), dtype=np.float32)
    round_bytes = sum(contender.bytes for contender in contenders)
    counts = [timing.turns_for(contender.prepare(x, round_bytes), turns) for contender in contenders]
    calls: list[Callable[[], object]] = [*contenders, *readers]
    taken = timing.alternate(calls, [*counts, *(turns for _ in readers)], threads)
    reads = [r.bytes / timing.median(t) / 1e9 for r, t in zip(readers, taken[len(contenders) :], strict=True)]
    rows = []
    for contender, t in zip(contenders, taken, strict=False):
        seconds = timing.median(t) / contender.nodes
        gbps = contender.bytes / seconds / 1e9
        figures = (1e3 * seconds, gbps, max(reads), len(t), len(timing.undisturbed(t)))
        rows.append(Row(contender.kind, f"{k}x{n}", batch, threads, *figures))
    return rows


def run(options: argparse.Namespace, cache: int) -> tuple[list[Row], dict[str, str]]:
    """Measure all; also what was left out, and why."""
    ours = [Kind("qbb", bases, mode) for mode in options.modes for bases in options.bases]
    body = [Kind("body", bases) for bases in options.bases if options.body]
    kinds = [*ours, *body, *(RIVALS if options.rivals else [FLOAT])]
    rows: list[Row] = []
    left_out: dict[str, str] = {}
    largest = max(4 * k * n for k, n in options.shapes)
    with TemporaryDirectory(prefix="qbb-bench.") as folder:
        weights = Weights(Path(folder), max(3 * cache, SMALLEST), largest)
        memories = [timing.huge_page_memory(weights.cache), timing.file_memory(weights.bits, weights.cache)]
        cases = [(k, n, threads) for k, n in options.shapes for threads in options.threads]
        for k, n, threads in track(cases, "measuring", console=Console(stderr=True), transient=True):
            contenders = open_all(kinds, k, n, threads, weights, left_out)
            readers = [timing.Reader(memory, threads) for memory in memories]
            for batch in options.batch:
                rows += measure(contenders, readers, batch, options.turns)
    return rows, left_out


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def shapes(text: str) -> list[tuple[int, int]]:
    return [(int(k), int(n)) for k, n in (part.split("x") for part in text.split(","))]


def modes(text: str) -> list[str]:
    names = text.split(",")
    if not set(names) <= set(MODES):
        raise ValueError(names)
    return names


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=shapes, default="4096x4096", help="KxN,…")
    parser.add_argument("--batch", type=numbers, default="1", help="rows of X,…")
    parser.add_argument("--threads", type=numbers, default="1,2")
    parser.add_argument("--bases", type=numbers, default="1,2,3,4")
    parser.add_argument("--modes", type=modes, default=",".join(MODES), help="activations of ours")
    parser.add_argument("--body", action="store_true", help="also the function body in stock ONNX Runtime")
    parser.add_argument("--no-rivals", dest="rivals", action="store_false", help="without MatMulNBits")
    parser.add_argument("--turns", type=int, default=40, help="at most; slow kernels get fewer")
    parser.add_argument("--cache", type=float, help="MB of last-level cache, where the system does not say")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="an SVG: time against bases and against K·N")
    parser.add_argument("--rows", type=Path, help="measure nothing: rows of an earlier --json")
    return parser.parse_args()


def main() -> None:
    """Measure and print."""
    options = arguments()
    console = Console()
    if not console.is_terminal:
        console.width = FILE_WIDTH
    left_out: dict[str, str] = {}
    if options.rows:
        rows = results.read(options.rows)
    else:
        found = timing.last_level_cache(max(options.threads))
        cache = int(options.cache * 2**20) if options.cache is not None else found or timing.ASSUMED_CACHE
        note = " (given)" if options.cache is not None else "" if found else " (assumed: the system does not say)"
        size = f"last-level cache {cache / 2**20:g} MB{note}"
        versions = f"our kernels {timing.isa()}, ONNX Runtime {onnxruntime.__version__}"
        console.print(f"{size}, {versions}, {timing.processor()}, groups of {GROUP_SIZE}", soft_wrap=True)
        rows, left_out = run(options, cache)
        for threads in options.threads:
            reads = [row.read_gbps for row in rows if row.threads == threads]
            console.print(f"read bandwidth, {threads} threads: {min(reads):.1f} to {max(reads):.1f} GB/s")
    if options.json:
        results.write(rows, options.json)
    console.print(results.table(rows))
    console.print(claims.table(rows))
    for what, why in left_out.items():
        console.print(f"left out: {what}: {why}", soft_wrap=True, highlight=False)
    if options.plot:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()
