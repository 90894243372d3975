"""``qbb report RECORD``."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``qbb report``."""
    add = parser.add_argument
    add("record", type=Path, metavar="RECORD", help="the folder beside an exported model, e.g. model.qbb")
    add("-o", "--output", type=Path, metavar="FILE.html", help="the page; JSON beside it (default: RECORD/report.html)")
    add("--force", action="store_true", help="replace an existing report")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Write the report and print where it is; returns the exit code."""
    from qbb_export.report import write_report

    output = options.output or options.record / "report.html"
    for path in write_report(options.record, output, force=options.force):
        print(path)
    return 0
