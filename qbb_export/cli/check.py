"""``qbb check FILE``."""

from __future__ import annotations

import argparse
from pathlib import Path

from qbb_export.errors import QbbError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``qbb check``."""
    add = parser.add_argument
    add("file", type=Path, metavar="FILE", help=".onnx, or a folder that generates text")
    add("--probe", action="store_true", help="also open it in ONNX Runtime, in a child process that may crash")
    add("--seconds", type=float, metavar="S", help="give the child so long (default 120)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Check and say so in one line; returns the exit code."""
    from qbb_export.checking import check_model
    from qbb_export.runtimes.probe import SECONDS

    if options.seconds is not None and not (options.probe and options.seconds > 0):
        raise QbbError("bad time limit", where="--seconds", expected="more than 0, with --probe", got=options.seconds)
    sound = check_model(options.file, isolated=options.probe, seconds=options.seconds or SECONDS)
    said = [f"{sound.operators} BinaryBasisMatMul, {sound.nodes} other nodes, {sound.data_files} data file(s)"]
    if sound.without_digest:
        said.append(f"no digest for {', '.join(sound.without_digest)}: flipped bits there cannot be seen")
    else:
        said.append("digests match")
    if options.probe:
        said.append("opens in ONNX Runtime")
    print(f"{options.file}: sound; {'; '.join(said)}")
    return 0
