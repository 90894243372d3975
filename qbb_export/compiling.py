"""``qbb compile``: a folder for a machine without ONNX Runtime, compared with ONNX Runtime where it can run here."""

from __future__ import annotations

import platform
from pathlib import Path

import onnx_ir as ir

from qbb_export import verification
from qbb_export.evaluate.text import tokenizer_beside
from qbb_export.verification import Comparison


def compile_and_compare(
    model: Path, target: str, output: Path, *, force: bool = False, verify: bool = True
) -> list[Comparison]:
    """Compile, then run both on made-up inputs.

    Args:
        model: an .onnx file that we exported.
        target: see ``runtimes.tvm.targets``.
        output: folder.
        force: replace an existing one.
        verify: compare; False, or a target that is not this machine's: no rows.

    Returns:
        The verification table.

    Raises:
        QbbError: see ``runtimes.tvm.compile``.
    """
    from qbb_export.runtimes.tvm import load
    from qbb_export.runtimes.tvm.build import compile_model

    machine = compile_model(model, target, output, force=force)
    if not verify or machine.machine != platform.machine():
        return []
    feeds = verification.sample_inputs(verification.graph_inputs(ir.load(model)), tokenizer_beside(model))
    expected = verification.run_file(model, feeds, library=True)
    found = load(output).run(feeds)
    return verification.compare("TVM / ONNX Runtime", found, expected, verification.BODY_BOUND)
