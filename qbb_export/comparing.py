"""What a finished export is compared with: the float model, PyTorch with quantised weights, and the function body."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx_ir as ir

from qbb_export import verification
from qbb_export.errors import QbbError
from qbb_export.passes.function_body import binary_basis_nodes
from qbb_export.passes.linears import Linear
from qbb_export.record import Record
from qbb_export.source import TorchModel, embedding_name
from qbb_export.verification import Arrays, Comparison


def float_outputs(model: ir.Model, source: str, loaded: TorchModel | None) -> tuple[Arrays | None, Arrays | None]:
    """Inputs to compare on, and what the float model makes of them.

    No outputs where running it would take too much memory; no inputs either where the model does not take what we
    make up (an .onnx file does not say what its integers mean).
    """
    if loaded is not None:
        from qbb_export.module import run_module

        names = verification.results_of(model)
        feeds = verification.sample_inputs(loaded.inputs or verification.graph_inputs(model), loaded.tokenizer)
        return feeds, run_module(loaded.module, feeds, names, by_name=loaded.program is None)
    feeds = verification.sample_inputs(verification.graph_inputs(model), None)
    if not verification.body_is_affordable(model):
        return feeds, None
    try:
        return feeds, verification.run_file(Path(source), feeds, library=False)
    except QbbError:
        return None, None


def student_of(
    loaded: TorchModel | None, linears: list[Linear], lookups: list[Linear], record: Record | None
) -> TorchModel | None:
    """The PyTorch model with the quantised weights in it, in float32; it takes the float model's place."""
    if loaded is None:
        return None
    from qbb_export.module import make_student

    # Names as they were before the graph was rewritten: those of the parameters.
    owners = {linear.weight.name or "": linear for linear in linears}
    for lookup in lookups:  # a table that is also the head: as the embedding's, it counts for both
        owners.pop(lookup.weight.name or "", None)
        owners[embedding_name(loaded, lookup.weight.name or "")] = lookup
    layers = {} if record is None else {name: record.load(linear.name) for name, linear in owners.items()}
    flipped = {name for name, linear in owners.items() if not linear.transposed}
    return replace(loaded, module=make_student(loaded.module, layers, flipped).float())


def compare_all(
    model: ir.Model,
    output: Path,
    student: TorchModel | None,
    feeds: Arrays | None,
    float_outputs: Arrays | None,
    mode: str,
) -> list[Comparison]:
    """The verification table: library in exact mode against student and function body; against the float model, and of
    another mode, for information.
    """
    if feeds is None:
        return verification.check_layers(output)
    ours = verification.run_file(output, feeds, library=True)
    rows: list[Comparison] = []
    if student is not None:
        from qbb_export.module import run_module

        expected = run_module(student.module, feeds, list(ours), by_name=student.program is None)
        rows += verification.compare("library / student", ours, expected, verification.STUDENT_BOUND)
    if not verification.body_is_affordable(model):
        rows += verification.check_layers(output)
    elif binary_basis_nodes(model):
        body = verification.run_file(output, feeds, library=False)
        rows += verification.compare("body / library", body, ours, verification.BODY_BOUND)
    if float_outputs is not None:
        rows += verification.compare("library / float model", ours, float_outputs, None)
    if mode != "exact":
        rounded = verification.run_file(output, feeds, library=True, mode=mode)
        rows += verification.compare(f"library, {mode} / exact", rounded, ours, None)
        if float_outputs is not None:
            rows += verification.compare(f"library, {mode} / float model", rounded, float_outputs, None)
    return rows
