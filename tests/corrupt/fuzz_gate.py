"""Coverage-guided fuzzing of the gate with atheris (libFuzzer for Python):

    python -m tests.corrupt.fuzz_gate FOLDER -max_total_time=600

FOLDER keeps the inputs that reached something new; options are libFuzzer's. Whatever is no ``QbbError`` is a finding,
and its input belongs into tests/corrupt/found/, where test_fuzz.py tries it for ever.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris
import numpy as np

with atheris.instrument_imports(include=["qbb_export", "onnx_ir"]):
    from qbb_export.errors import QbbError
    from qbb_export.runtimes import gate

from tests.corrupt import bases, damage

GOLDEN = Path(__file__).resolve().parents[1] / "golden"


def try_one(content: bytes, path: Path) -> None:
    """Nothing but a QbbError, in one line that names the file."""
    path.write_bytes(content)
    try:
        gate.check(path, data=False)
    except QbbError as error:
        text = str(error)
        assert str(path) in text and text.isprintable(), text


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    """Half of the time fields of a well-formed file, else bytes."""
    rng = np.random.default_rng(seed)
    if rng.random() < 0.5:
        try:
            changed = damage.structure(data, rng)
        except Exception:  # no file any more
            changed = b""
        if 0 < len(changed) <= max_size:
            return changed
    return bytes(atheris.Mutate(data, max_size))


def main() -> None:
    corpus, *options = sys.argv[1:]
    folder = Path(corpus)
    folder.mkdir(parents=True, exist_ok=True)
    if not any(folder.iterdir()):
        for source in [bases.write(name, Path(tempfile.mkdtemp())) for name in bases.BASES]:
            (folder / source.name).write_bytes(source.read_bytes())
        for source in GOLDEN.glob("format-*/*.onnx"):
            (folder / source.name).write_bytes(source.read_bytes())
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "m.onnx"
        # libFuzzer ends the process itself, so the folder may stay; it holds one small file.
        arguments = [sys.argv[0], corpus, "-max_len=16384", "-timeout=60", "-rss_limit_mb=4096", *options]
        atheris.Setup(arguments, lambda data: try_one(data, path), custom_mutator=mutate)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
