"""``qbb eval MODEL … --text FILE [--reference MODEL]``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from qbb_export.cli.terminal import progress_bars
from qbb_export.format import MODES

if TYPE_CHECKING:
    from qbb_export.evaluate import EncoderResult, LanguageResult
    from qbb_export.evaluate.metrics import Interval


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``qbb eval``."""
    add = parser.add_argument
    add("models", nargs="+", metavar="MODEL", help=".onnx, folder that can generate, Hugging Face folder or hub id")
    add("--text", type=Path, required=True, metavar="FILE", help="UTF-8 text; for encoders one sentence a line")
    add("--reference", metavar="MODEL", help="compare with this one, as a rule the float model; encoders need it")
    add("--window", type=int, default=1024, help="tokens per window, or per sentence at most (default 1024)")
    add("--windows", type=int, metavar="N", help="stop after so many windows or sentences")
    add("--chunk", type=int, metavar="N", help="folders: N tokens a run, through the cache (default: a window)")
    add("--tokenizer", type=Path, metavar="FILE", help="tokenizer.json (default: the models' own)")
    add("--device", default="cpu", help="where PyTorch runs folders and hub ids: cpu, cuda, … (default cpu)")
    add("--no-library", action="store_true", help="run the function body instead of our kernel")
    add("--mode", choices=MODES, help="activations in our kernels (default: as the file says)")
    add("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Evaluate and print a table or JSON; returns the exit code."""
    from qbb_export.evaluate import evaluate

    with progress_bars() as progress:
        task = progress.add_task("opening models", total=None)

        def tell(done: int, total: int) -> None:
            progress.update(task, description="running models", completed=done, total=total)

        results: Sequence[LanguageResult | EncoderResult] = evaluate(
            options.models,
            options.text,
            reference=options.reference,
            window=options.window,
            max_windows=options.windows,
            tokenizer=options.tokenizer,
            library=not options.no_library,
            mode=options.mode,
            device=options.device,
            chunk=options.chunk,
            on_step=tell,
        )
    if options.json:
        about = {"text": str(options.text), "window": options.window, "reference": options.reference}
        print(json.dumps({**about, "models": [asdict(result) for result in results]}))
        return 0
    models = [result.model for result in results]
    short = [Path(model).name for model in models]
    names = short if len(set(short)) == len(set(models)) else models
    rows = [{"model": name, **_cells(result)} for name, result in zip(names, results, strict=True)]
    # Little padding: with a reference it has to fit into 80 columns.
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), caption=_caption(results[0], options.window))
    table.caption_justify = "left"
    for column in rows[0]:
        words = column in ("model", "worst sentence")
        table.add_column(column, justify="left" if words else "right", no_wrap=not words, overflow="fold")
    for row in rows:
        table.add_row(*row.values())
    Console().print(table)
    return 0


def _cells(result: LanguageResult | EncoderResult) -> dict[str, str]:
    """A row of the table, by column; an interval stands below its figure."""
    from qbb_export.evaluate import LanguageResult

    megabytes = "" if result.file_mb is None else f"{result.file_mb:.1f} MB"
    bits = "" if result.bits_per_weight is None else f"\n{result.bits_per_weight:.3f} bpw"
    cells = {"size": megabytes + bits}
    if not isinstance(result, LanguageResult):
        cells["cosine"] = _with_interval(result.cosine, result.cosine_ci, 5)
        cells["worst"] = f"{result.worst_cosine:.5f}"
        cells["worst sentence"] = result.worst_sentence
        return cells
    cells["perplexity"] = _with_interval(result.perplexity, result.perplexity_ci, 2)
    cells["nats"] = f"{result.nll:.4f}"
    if result.kl is not None and result.agreement is not None and result.perplexity_ratio is not None:
        cells["KL"] = _with_interval(result.kl, result.kl_ci, 4)
        cells["same\ntop"] = f"{100 * result.agreement:.2f} %"
        cells["ratio"] = _with_interval(result.perplexity_ratio, result.perplexity_ratio_ci, 3)
    return cells


def _with_interval(value: float, interval: Interval | None, digits: int) -> str:
    """The figure with one digit more than its interval."""
    text = f"{value:.{digits + 1}f}"
    return text if interval is None else f"{text}\n{interval[0]:.{digits}f}–{interval[1]:.{digits}f}"


def _caption(result: LanguageResult | EncoderResult, window: int) -> str:
    from qbb_export.evaluate import LanguageResult

    bpw = "bpw: bits per quantised weight, scales counted"
    if not isinstance(result, LanguageResult):
        return (
            f"{result.sentences} sentences; a-b: 95 % interval over them\n{bpw}; cosine: to the reference's embeddings"
        )
    lines = [f"{result.tokens} tokens in {result.windows} windows of {window}; a–b: 95 % interval over windows"]
    lines.append(f"{bpw}; nats: per token")
    if result.kl is not None:
        lines.append("KL: reference to model, nats per token; same top: tokens with the same most")
        lines.append("likely one; ratio: of the perplexity to the reference's")
    return "\n".join(lines)
