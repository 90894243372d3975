"""Check a model file before any runtime opens it. Reads the file, never runs anything from it."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from qbb_export.artifact import data_digest, external_tensors, read_graph, run_checker
from qbb_export.errors import QbbError
from qbb_export.files import file_sha256
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
    run_checker(path, full=True)
    try:
        VerifyBinaryBasis()(model)
    except QbbError as error:
        raise QbbError(str(error), where=path) from None
    return model


def _check_digest(file: Path) -> None:
    expected = data_digest(file.name)
    if expected is None:
        return
    got = file_sha256(file)
    if got != expected:
        raise QbbError("weights are damaged", where=file, expected=f"SHA-256 {expected}", got=got)
