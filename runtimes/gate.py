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

    1. it parses, has the SHA-256 in its own metadata, and its external data lies beside it (``read_graph``)
    2. each data file whose name is a SHA-256 has that SHA-256
    3. our operators and the function bodies (``VerifyBinaryBasis``)
    4. ONNX's own checker, shape inference included; last, because it is C++ and infers shapes through the functions

    Args:
        path: an .onnx file, ours or any other.
        data: False skips the digests: the weights' because that reads all of them (about 1 GB a second), the graph's to
            open a file that was changed on purpose.

    Raises:
        QbbError: the first rule that is broken.
    """
    model = read_graph(path, sealed=data)
    if data:
        for file in sorted({tensor.path for tensor in external_tensors(model)}):
            _check_digest(Path(file))
    try:
        VerifyBinaryBasis()(model)
    except QbbError as error:
        raise QbbError(str(error), where=path) from None
    except Exception as error:  # the graph's parts do not fit together; onnx_ir has many ways to say so
        raise QbbError("not an ONNX model", where=path, got=f"{type(error).__name__}: {error}") from error
    run_checker(path, full=True)
    return model


def _check_digest(file: Path) -> None:
    expected = data_digest(file.name)
    if expected is None:
        return
    got = file_sha256(file)
    if got != expected:
        raise QbbError("weights are damaged", where=file, expected=f"SHA-256 {expected}", got=got)
