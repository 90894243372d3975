"""``qbb eval MODEL.onnx --text FILE``."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from qbb_export.cli.terminal import progress_bars


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``qbb eval``."""
    add = parser.add_argument
    add("model", type=Path, metavar="MODEL.onnx", help="a graph with input_ids and logits")
    add("--text", type=Path, required=True, metavar="FILE", help="UTF-8 text")
    add("--window", type=int, default=1024, help="tokens per window (default 1024)")
    add("--windows", type=int, metavar="N", help="stop after so many windows")
    add("--tokenizer", type=Path, metavar="FILE", help="tokenizer.json (default: the one beside the model)")
    add("--no-library", action="store_true", help="run the function body instead of our kernel")
    add("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Evaluate and print a table or JSON; returns the exit code."""
    from qbb_export.evaluate import perplexity

    with progress_bars() as progress:
        task = progress.add_task("windows", total=None)
        result = perplexity(
            options.model,
            options.text,
            window=options.window,
            tokenizer=options.tokenizer,
            library=not options.no_library,
            max_windows=options.windows,
            on_window=lambda done, total: progress.update(task, completed=done, total=total),
        )
    if options.json:
        print(json.dumps({"model": str(options.model), "text": str(options.text), **asdict(result)}))
        return 0
    table = Table()
    for column in ("model", "perplexity", "nats per token", "tokens", "windows"):
        table.add_column(column, justify="left" if column == "model" else "right")
    table.add_row(
        options.model.name, f"{result.perplexity:.4f}", f"{result.nll:.5f}", str(result.tokens), str(result.windows)
    )
    Console().print(table)
    return 0
