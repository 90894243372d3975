"""A child process that opens damaged files one after the other. See pool.py, which starts it and watches it."""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

from qbb_export.artifact import read_graph
from qbb_export.errors import QbbError
from qbb_export.runtimes.ort import session
from tests.corrupt import damage

MEMORY = 4 << 30
DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(bool)": np.bool_}


def as_stored(content: bytes) -> bytes:
    """What a file says apart from its metadata, where the digest lies, and from fields that ONNX does not know."""
    model = onnx.load_model_from_string(content)
    del model.metadata_props[:]
    model.DiscardUnknownFields()
    return bytes(model.SerializeToString(deterministic=True))


def attempt(path: Path) -> tuple[str, str]:
    """Open and run a file as anybody would who skips the digests: how far that went, and the last word."""
    try:
        opened = session(path, check_data=False, threads=1, options=quiet())
    except QbbError as error:
        text = str(error)
        if "\n" in text or str(path) not in text:
            return "unclear", text
        return "refused by ONNX Runtime" if "ONNX Runtime refuses" in text else "refused by the gate", text
    feeds = {}
    for wanted in opened.get_inputs():
        shape = [dim if isinstance(dim, int) else 2 for dim in wanted.shape]
        if wanted.type not in DTYPES or min(shape, default=1) < 0 or np.prod(shape, dtype=float) > 1e6:
            return "opened", f"cannot make {wanted.type} {shape}"
        feeds[wanted.name] = np.ones(shape, DTYPES[wanted.type])
    try:
        opened.run(None, feeds)
    except Exception as error:
        if type(error).__module__.startswith("onnxruntime"):
            return "refused when run", str(error)
        raise
    return "ran", ""


def quiet() -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return options


def seen(path: Path) -> bool:
    """Whether the file is refused with the digests."""
    try:
        read_graph(path, sealed=True)
    except QbbError:
        return True
    return False


def main(job: dict[str, Any]) -> None:
    """For each number of the job one line when it begins and one when it is done."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    out = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    source, kind = Path(job["source"]), job["kind"]
    content = source.read_bytes()
    original = as_stored(content)
    path = source.with_name(f"damaged-{os.getpid()}.onnx")
    for number in job["numbers"]:
        os.write(out, json.dumps([number]).encode() + b"\n")
        bad = damage.damaged(kind, content, number, job["seed"])
        path.write_bytes(bad)
        try:
            outcome, text = attempt(path)
        except Exception as error:
            outcome, text = "untyped", f"{type(error).__name__}: {error}"
        detected = seen(path)
        same = False
        if not detected:
            detected = outcome in ("refused by the gate", "unclear")
            same = not detected and as_stored(bad) == original
        os.write(out, json.dumps([number, outcome, text[:300], detected, same]).encode() + b"\n")
    path.unlink(missing_ok=True)


if __name__ == "__main__":
    main(json.loads(sys.stdin.readline()))
