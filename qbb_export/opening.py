"""MODEL to its graph, and to the linear layers that a user chose in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from qbb_export.capture import capture
from qbb_export.distill.cost import Matrix
from qbb_export.format import LAYOUT_ROWS, Spec, effective_group_size
from qbb_export.passes.linears import Linear, find_linears
from qbb_export.passes.prepare import prepare_passes
from qbb_export.passes.verify import VerifyBinaryBasis
from qbb_export.quantize import QuantizeSettings
from qbb_export.select import Selection, select_layers
from qbb_export.source import LoadOptions, TorchModel, parameter_owners


@dataclass(frozen=True)
class OpenModel:
    """What :func:`open_model` found.

    Attributes:
        graph: the prepared graph; weights are read when asked for.
        torch_model: the PyTorch model behind it, or None.
        linears: the chosen layers in execution order, one for each weight.
        chosen: their settings, by name.
    """

    graph: ir.Model
    torch_model: TorchModel | None
    linears: tuple[Linear, ...]
    chosen: dict[str, QuantizeSettings]


def open_model(source: str, load: LoadOptions, selection: Selection, settings: QuantizeSettings) -> OpenModel:
    """Open MODEL and choose its layers; see ``capture`` and ``select_layers`` for arguments and errors."""
    graph, torch_model = capture(source, load)
    prepare_passes()(graph)
    VerifyBinaryBasis()(graph)
    linears, rejected = find_linears(graph)
    owners = None if torch_model is None else parameter_owners(torch_model)
    chosen = select_layers(graph, linears, rejected, selection, settings, owners)
    by_name: dict[str, Linear] = {}
    for linear in linears:
        if linear.name in chosen:
            by_name.setdefault(linear.name, linear)
    return OpenModel(graph, torch_model, tuple(by_name.values()), chosen)


def matrices_of(model: OpenModel, offset_up_to: int, block_of: Callable[[str], str] = str) -> list[Matrix]:
    """The chosen layers as a recipe would store them, in the order of ``linears``.

    Args:
        model: with its choice of layers.
        offset_up_to: where the settings leave it open, the recipe adds an offset on up to so many bases.
        block_of: the name of the block that a parameter belongs to.
    """
    found = []
    for linear in model.linears:
        settings = model.chosen[linear.name]
        size = effective_group_size(linear.in_features, settings.group_size)
        spec = Spec(linear.in_features, linear.out_features, settings.bases, size, LAYOUT_ROWS)
        offset = settings.bases <= offset_up_to if settings.offset is None else settings.offset
        found.append(Matrix(spec, offset, block_of(linear.weight.name or ""), linear.activation.name or linear.name))
    return found


def largest_of(linears: Sequence[Linear]) -> Linear:
    """The layer with the most weights."""
    return max(linears, key=lambda linear: linear.in_features * linear.out_features)
