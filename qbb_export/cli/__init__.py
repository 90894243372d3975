"""The command line: ``qbb-export MODEL -o model.onnx``, and ``qbb VERB`` for everything."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version

from qbb_export.cli import check, export, report, run, study
from qbb_export.cli import compile as compiling
from qbb_export.cli import eval as evaluate
from qbb_export.cli.terminal import EXIT_BAD_INPUT, EXIT_INTERRUPTED, SPEAKS, Parser
from qbb_export.errors import QbbError, is_lack_of_memory


def main(arguments: Sequence[str] | None = None) -> int:
    """``qbb VERB …``; returns the exit code."""
    parser = Parser(prog="qbb", description="Language and embedding models as sums of binary matrices, in ONNX.")
    parser.add_argument("--version", action="version", version=version("qbb-export"))
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True, parser_class=Parser)
    export.add_arguments(verbs.add_parser("export", help="quantise a model and write it as ONNX (same as qbb-export)"))
    evaluate.add_arguments(verbs.add_parser("eval", help="compare models on a text: perplexity, KL, embeddings"))
    run.add_arguments(verbs.add_parser("run", help="continue a prompt with a folder that qbb-export wrote"))
    check.add_arguments(verbs.add_parser("check", help="say whether a file is sound: rules, digests, ONNX's checker"))
    compiling.add_arguments(verbs.add_parser("compile", help="compile an exported model with TVM, for other machines"))
    report.add_arguments(verbs.add_parser("report", help="one page that shows what a record holds, and JSON"))
    study.add_arguments(verbs.add_parser("study", help="the QBB paper's figures for a model, kept in a record"))
    library = verbs.add_parser("library", help="print the path for RegisterCustomOpsLibrary")
    library.add_argument("--json", action="store_true", help="also tell version, layouts and instruction sets")
    library.set_defaults(run=_run_library)
    return _run(parser, arguments)


def export_main(arguments: Sequence[str] | None = None) -> int:
    """``qbb-export MODEL -o model.onnx``; returns the exit code."""
    parser = Parser(prog="qbb-export", description="Quantise a model into binary bases and write it as ONNX.")
    parser.add_argument("--version", action="version", version=version("qbb-export"))
    export.add_arguments(parser)
    return _run(parser, arguments)


def _run(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> int:
    logging.getLogger("onnx_ir").setLevel(logging.ERROR)  # what is wrong with a file is our one line to say
    try:
        options = parser.parse_args(arguments)
        code: int = options.run(options)
        return code
    except Exception as error:
        notes = getattr(error, "__notes__", [])  # which process, where not all have the same error
        if is_lack_of_memory(error):
            told = f"out of memory ({error})" if isinstance(error, QbbError) else "out of memory"
        elif isinstance(error, QbbError):
            told = str(error)
        else:
            raise
        if SPEAKS or notes:
            print("; ".join([f"error: {told}", *notes]), file=sys.stderr)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        if SPEAKS:
            print("interrupted; the same command goes on from the last finished layer", file=sys.stderr)
        return EXIT_INTERRUPTED


def _run_library(options: argparse.Namespace) -> int:
    from qbb_export.custom_ops import library_info

    info = library_info()
    print(json.dumps(asdict(info), default=str) if options.json else info.path)
    return 0
