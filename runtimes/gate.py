"""Check a model file before any runtime opens it. Reads the file, never runs anything from it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import onnx.checker
import onnx_ir as ir

from qbb_export.artifact import data_digest, external_tensors, read_graph
from qbb_export.errors import QbbError
from qbb_export.passes.verify import VerifyBinaryBasis


def check(path: Path, *, data: bool = True) -> ir.Model:
    """Everything that can be known about a file without running it.

    1. it parses, and its external data lies beside it (``read_graph``)
    2. each data file whose name is a SHA-256 has that SHA-256
    3. ONNX's own checker, shape inference included
    4. our operators and the function body (``VerifyBinaryBasis``)

    Args:
        path: an .onnx file, ours or any other.
        data: False skips rule 2, which reads all weights (about 1 GB a second).

    Raises:
        QbbError: the first rule that is broken.
    """
    model = read_graph(path)
    if data:
        for file in sorted({tensor.path for tensor in external_tensors(model)}):
            _check_digest(Path(file))
    try:
        onnx.checker.check_model(path, full_check=True)
    except Exception as error:
        raise QbbError("ONNX's checker refuses the model", where=path, got=str(error)) from error
    try:
        VerifyBinaryBasis()(model)
    except QbbError as error:
        raise QbbError(str(error), where=path) from None
    return model


def _check_digest(file: Path) -> None:
    expected = data_digest(file.name)
    if expected is None:
        return
    with file.open("rb") as stream:
        got = hashlib.file_digest(stream, "sha256").hexdigest()
    if got != expected:
        raise QbbError("weights are damaged", where=file, expected=f"SHA-256 {expected}", got=got)
