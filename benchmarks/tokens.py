"""Exported models end to end: one forward pass of one token, and of a prompt, in tokens a second.

    python benchmarks/tokens.py float.onnx ours.onnx --threads 1,2 --json tokens.json

All files run in one process, in turns, ours once in each mode. A pass of one token reads all weights, as every new
token of a text does, but has no earlier tokens to attend to. What fits into the last-level cache may stay there.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime
from rich.console import Console
from rich.progress import track
from rich.table import Table

import timing
from cpu import FILE_WIDTH, MODES, modes, numbers
from qbb_export.artifact import read_graph
from qbb_export.evaluate.runners import OnnxRunner
from qbb_export.passes.function_body import binary_basis_nodes

# Below the vocabulary of any tokenizer, where the model does not say its own.
VOCABULARY = 256


@dataclass(frozen=True)
class Row:
    """One model, mode and number of threads."""

    model: str
    mode: str  # of our operator; "float" where a model has none
    threads: int
    tokens: int
    median_ms: float
    tokens_per_second: float
    turns: int
    undisturbed: int


def open_model(path: Path, mode: str, threads: int) -> OnnxRunner:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Idle threads of one session would otherwise spin on the processors that the next one needs.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return OnnxRunner(path, mode=mode if mode in MODES else None, options=options)


def measure(runners: list[tuple[str, str, OnnxRunner]], tokens: int, threads: int, turns: int) -> list[Row]:
    """All models in turns, on the same number of tokens."""
    rng = np.random.default_rng(0)
    calls: list[Callable[[], object]] = []
    counts = []
    for *_, runner in runners:
        ids = rng.integers(0, runner.vocabulary or VOCABULARY, (1, tokens), dtype=np.int64)
        calls.append(partial(runner.outputs, ids))
        calls[-1]()
        counts.append(timing.turns_for(timing.timed(calls[-1], threads).seconds, turns))
    rows = []
    for (path, mode, _), taken in zip(runners, timing.alternate(calls, counts, threads), strict=True):
        seconds = timing.median(taken)
        figures = (1e3 * seconds, tokens / seconds, len(taken), len(timing.undisturbed(taken)))
        rows.append(Row(path, mode, threads, tokens, *figures))
    return rows


def show(rows: list[Row]) -> Table:
    """A line for each model, mode and number of threads."""
    lengths = list(dict.fromkeys(row.tokens for row in rows))
    table = Table()
    for column in ("model", "mode", "threads"):
        table.add_column(column)
    for tokens in lengths:
        for column in (f"{tokens} token{'s' if tokens > 1 else ''}, ms", "tokens/s", "against first"):
            table.add_column(column, justify="right")
    for model, mode, threads in dict.fromkeys((row.model, row.mode, row.threads) for row in rows):
        figures: list[str] = []
        for tokens in lengths:
            same = [row for row in rows if (row.threads, row.tokens) == (threads, tokens)]
            row = next(row for row in same if (row.model, row.mode) == (model, mode))
            speed = f"{same[0].median_ms / row.median_ms:.2f}x"
            figures += [f"{row.median_ms:.3f}", f"{row.tokens_per_second:.0f}", speed]
        table.add_row(model, mode, str(threads), *figures)
    return table


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+", metavar="MODEL.onnx")
    parser.add_argument("--modes", type=modes, default=",".join(MODES), help="activations of our operator")
    parser.add_argument("--threads", type=numbers, default="1,2")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the longer pass")
    parser.add_argument("--turns", type=int, default=40, help="at most; slow models get fewer")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    ours = {path: bool(binary_basis_nodes(read_graph(path))) for path in options.models}
    cases = [(path, mode) for path in options.models for mode in (options.modes if ours[path] else ["float"])]
    console = Console()
    if not console.is_terminal:
        console.width = FILE_WIDTH
    versions = f"our kernels {timing.isa()}, ONNX Runtime {onnxruntime.__version__}"
    console.print(f"{versions}, {timing.processor()}", soft_wrap=True)
    rows: list[Row] = []
    for threads in track(options.threads, "measuring", console=Console(stderr=True), transient=True):
        runners = [(str(path), mode, open_model(path, mode, threads)) for path, mode in cases]
        for tokens in (1, options.prompt):
            rows += measure(runners, tokens, threads, options.turns)
    if options.json:
        options.json.write_text(json.dumps({"rows": [asdict(row) for row in rows]}, indent=1) + "\n", encoding="utf-8")
    console.print(show(rows))


if __name__ == "__main__":
    main()
