"""``qbb run DIR --prompt "…"``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from qbb_export.errors import QbbError
from qbb_export.format import MODES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``qbb run``."""
    add = parser.add_argument
    add("folder", type=Path, metavar="DIR", help="that qbb-export -o DIR wrote")
    add("--prompt", required=True, metavar="TEXT", help="what to continue; - reads it from the standard input")
    add("--max-tokens", type=int, default=200, metavar="N", help="new tokens at most (default 200)")
    add("--temperature", type=float, default=0.0, metavar="T", help="0 takes the most likely token (default)")
    add("--top-k", type=int, default=50, metavar="K", help="sample from the K most likely; 0: all (default 50)")
    add("--top-p", type=float, default=1.0, metavar="P", help="sample from those that make up P (default 1)")
    add("--repetition-penalty", type=float, default=1.0, metavar="R", help="above 1: fewer repetitions (default 1)")
    add("--seed", type=int, metavar="N", help="the same text each time")
    add("--runtime", choices=("genai", "ort"), help="default: onnxruntime-genai where it is installed, else plain ORT")
    add("--trust", action="store_true", help="let onnxruntime-genai load whatever code the folder names")
    add("--mode", choices=MODES, help="activations in our kernels (default: as the file says)")
    add("--threads", type=int, metavar="N", help="default: ONNX Runtime's choice")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Stream text to the standard output, then the times to the standard error; returns the exit code."""
    from qbb_export.generation.text import RunOptions, Times, generate
    from qbb_export.runtimes.sampling import Sampling

    if options.threads is not None and options.threads < 1:
        raise QbbError("too few threads", where="--threads", expected=">= 1", got=options.threads)
    sampling = Sampling(options.temperature, options.top_k, options.top_p, options.repetition_penalty, options.seed)
    how = RunOptions(options.max_tokens, sampling, options.runtime, options.trust, options.mode, options.threads)
    times = Times()
    prompt = sys.stdin.read() if options.prompt == "-" else options.prompt
    for number, piece in enumerate(generate(options.folder, prompt, how, times)):
        print(piece if number else prompt + piece, end="", flush=True)
    print()
    print(
        f"{times.prompt_tokens} + {times.new_tokens} tokens; first after {1000 * times.first:.0f} ms, "
        f"then {times.tokens_per_second:.1f} tokens/s; opened in {times.load:.1f} s",
        file=sys.stderr,
    )
    return 0
