"""``qbb compile MODEL.onnx --target NAME -o DIR``."""

from __future__ import annotations

import argparse
from pathlib import Path

from qbb_export.cli.terminal import EXIT_DISAGREES
from qbb_export.format import MODES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``qbb compile``."""
    add = parser.add_argument
    add("model", type=Path, metavar="MODEL.onnx", help="that qbb-export wrote")
    add(
        "--target",
        default="native",
        metavar="NAME",
        help="native (default), x86-64-v3, x86-64-v4, cortex-a76, cortex-a53, riscv64, or TVM's JSON",
    )
    add("-o", "--output", type=Path, required=True, metavar="DIR", help="where to write library and manifest")
    add("--mode", choices=MODES, help="what products may do to activations; default: as the file says")
    add("--force", action="store_true", help="replace an existing folder")
    add("--no-verify", action="store_true", help="do not compare with ONNX Runtime")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Compile, print the verification table; returns the exit code."""
    from rich.console import Console

    from qbb_export.cli.export import comparison_table
    from qbb_export.compiling import compile_and_compare

    rows = compile_and_compare(
        options.model,
        options.target,
        options.output,
        force=options.force,
        verify=not options.no_verify,
        mode=options.mode,
    )
    out = Console()
    if options.no_verify:
        out.print("not verified (--no-verify)")
    else:
        out.print(comparison_table(rows) if rows else f"not compared: this machine cannot run {options.target}")
    out.print(f"to run it, in Python: qbb_export.runtimes.tvm.load('{options.output}').run(feeds)", soft_wrap=True)
    return 0 if all(row.ok for row in rows) else EXIT_DISAGREES
