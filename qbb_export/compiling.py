"""``qbb compile``: a folder for a machine without ONNX Runtime, compared with ONNX Runtime where it can run here."""

from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir

from qbb_export import verification
from qbb_export.evaluate.text import tokenizer_beside
from qbb_export.format import MODES
from qbb_export.passes.function_body import binary_basis_nodes
from qbb_export.runtimes.decoder import PAST
from qbb_export.runtimes.decoder import Decoder as OrtDecoder
from qbb_export.verification import Arrays, Comparison


def compile_and_compare(
    model: Path, target: str, output: Path, *, force: bool = False, verify: bool = True, mode: str | None = None
) -> list[Comparison]:
    """Compile, then run both on made-up inputs. A decoder with a cache reads a prompt and one token more.

    Args:
        model: an .onnx file that we exported.
        target: see ``runtimes.tvm.targets``.
        output: folder.
        force: replace an existing one.
        verify: compare; False, or a target that is not this machine's: no rows.
        mode: see ``runtimes.tvm.compile``.

    Returns:
        The verification table.

    Raises:
        QbbError: see ``runtimes.tvm.compile``.
    """
    from qbb_export.runtimes import ort
    from qbb_export.runtimes.tvm import Decoder, load
    from qbb_export.runtimes.tvm.build import compile_model

    machine = compile_model(model, target, output, force=force, mode=mode)
    if not verify or machine.machine != platform.machine():
        return []
    inputs = verification.graph_inputs(ir.load(model))
    feeds = verification.sample_inputs(inputs, tokenizer_beside(model))
    compiled = load(output)
    if any(spec.name.startswith(PAST) for spec in inputs):
        ids = feeds["input_ids"]
        new = ids[:, :1]

        def steps(decoder: Decoder | OrtDecoder) -> Arrays:
            return {"logits": decoder.step(ids), "logits after a token more": decoder.step(new)}

        found = steps(Decoder(compiled, len(ids)))

        def reference(of: str) -> Arrays:
            return steps(OrtDecoder(ort.session(model, mode=of), ids.shape[1] + 1, len(ids)))
    else:
        found = compiled.run(feeds)

        def reference(of: str) -> Arrays:
            return verification.run_file(model, feeds, library=True, mode=of)

    exact = reference("exact")
    rounding = _roundings(reference, exact, _modes(model, mode))
    return verification.compare("TVM / ONNX Runtime", found, exact, max(verification.BODY_BOUND, 2 * rounding))


def _modes(model: Path, mode: str | None) -> set[str]:
    """Modes of the products in a file, or the one that was asked for."""
    if mode is not None:
        return {mode}
    nodes = binary_basis_nodes(ir.load(model))
    return {MODES[node.attributes.get_int("mode", 0)] for node in nodes}


def _roundings(reference: Callable[[str], Arrays], exact: Arrays, modes: set[str]) -> float:
    """How far our own kernels in these modes are from exact ones.

    TVM's round by the same rules, but float32 sums in another order now and then fall on the other side of a half, and
    what follows is rounded differently: so the two are compared with exact arithmetic, not with each other.
    """
    errors = [0.0]
    for mode in modes - {"exact"}:
        errors += [row.error for row in verification.compare(mode, reference(mode), exact, None)]
    return max(errors)
