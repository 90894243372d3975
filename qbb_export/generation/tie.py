"""Tie the initializers of a decoder's graph to the parameters that they came from."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir

from qbb_export.capture import parameter_tensor
from qbb_export.errors import QbbError


class Slice(NamedTuple):
    """Rows of a parameter ``[rows, columns]``.

    Attributes:
        parameter: its name.
        start: first row.
        stop: last row + 1.
        transposed: the graph holds them as columns.
    """

    parameter: str
    start: int
    stop: int
    transposed: bool


def tie_weights(
    model: ir.Model, slices: Mapping[str, Slice], parameters: Mapping[str, Any], required: set[str]
) -> None:
    """Give every initializer that holds a matrix of the model the name and the values of that parameter.

    1. one that holds all rows becomes an initializer ``[rows, columns]`` of float32, with Cast and Transpose behind it
       where the graph wants another type or columns: what quantisation reads is what the model holds. The Cast comes
       first, so that a matrix used both ways is stored in that type
    2. several that hold rows of one parameter (q, k and v of a packed projection) and are multiplied with the same
       activations become one product with a Split behind it
    3. parameters in ``required`` are in the graph when this is done

    Args:
        model: the graph, whose initializers are changed.
        slices: what initializers hold, by name.
        parameters: PyTorch parameters by name.
        required: weights of the model's linear layers.

    Raises:
        QbbError: rows that do not fit together, or a linear layer that is not in the graph (rule 3).
    """
    parts: defaultdict[str, list[str]] = defaultdict(list)
    for name, piece in slices.items():
        if name in model.graph.initializers:
            parts[piece.parameter].append(name)
    for parameter, names in parts.items():
        rows = len(parameters[parameter])
        whole = [name for name in names if (slices[name].start, slices[name].stop) == (0, rows)]
        cut = sorted({*names} - {*whole}, key=lambda name: slices[name].start)
        if cut:
            _merge(model.graph, parameter, rows, cut, slices)
        for name in (*whole, *cut[:1]):
            _tie(model.graph, model.graph.initializers[name], parameter, parameters[parameter], slices[name].transposed)
    model.graph.sort()
    missing = sorted(required - set(model.graph.initializers))
    if missing:
        got = f"{len(missing)} of {len(required)} missing"
        raise QbbError("linear layer is not in the graph with a KV cache", where=missing[0], got=got)


def _merge(graph: ir.Graph, parameter: str, rows: int, names: list[str], slices: Mapping[str, Slice]) -> None:
    """Rule 2: the first initializer stands for all of them afterwards."""
    values = [graph.initializers[name] for name in names]
    products = [use.node for value in values for use in value.uses()]
    ends = [0, *(slices[name].stop for name in names)]
    fits = (
        len(products) == len(values)
        and ends[-1] == rows
        and all(node.op_type == "MatMul" and node.inputs[0] is products[0].inputs[0] for node in products)
        and all(slices[name].transposed and slices[name].start == end for name, end in zip(names, ends, strict=False))
    )
    if not fits:
        got = ", ".join(f"{slices[name].start}:{slices[name].stop}" for name in names)
        raise QbbError("rows of a weight do not fit together", where=parameter, expected=f"0:{rows}", got=got)
    x, first = products[0].inputs[0], products[0]
    assert x is not None
    layer = parameter.removesuffix(".weight")
    product = ir.node("MatMul", [x, values[0]], name=layer)
    y = product.outputs[0]
    y.name, y.type = f"{layer}.output", first.outputs[0].type
    if first.outputs[0].shape is not None:
        y.shape = ir.Shape([*first.outputs[0].shape[:-1], ends[-1]])
    lengths = np.asarray([slices[name].stop - slices[name].start for name in names], np.int64)
    sizes = ir.Value(
        name=f"{layer}.split_sizes", const_value=ir.tensor(lengths), shape=ir.Shape([len(names)]),
        type=ir.TensorType(ir.DataType.INT64),
    )  # fmt: skip
    graph.register_initializer(sizes)
    split = ir.node("Split", [y, sizes], {"axis": -1}, num_outputs=len(names), name=f"{layer}.split")
    old = [node.outputs[0] for node in products]
    ir.convenience.replace_nodes_and_values(graph, first, products, [product, split], old, split.outputs)
    for value in values[1:]:
        graph.initializers.pop(value.name or "")


def _tie(graph: ir.Graph, value: ir.Value, parameter: str, tensor: Any, transposed: bool) -> None:
    """Rule 1."""
    dtype = value.dtype
    assert dtype is not None
    weight = graph.initializers.get(parameter)
    graph.initializers.pop(value.name or "")
    value.name = f"{value.name}/of_builder"  # the parameter may have the name that the builder gave to it
    if weight is None or weight is value:
        shape = ir.Shape(tuple(tensor.shape))
        const = parameter_tensor(tensor, parameter, ir.DataType.FLOAT, shape)
        weight = ir.Value(name=parameter, shape=shape, type=ir.TensorType(ir.DataType.FLOAT), const_value=const)
        graph.register_initializer(weight)
    typed = weight if dtype == weight.dtype else _behind(graph, "Cast", weight, {"to": int(dtype)})
    if transposed:  # a Transpose behind it, as of a head that is also the embedding, gives the parameter itself
        for use in list(value.uses()):
            if use.node.op_type == "Transpose" and list(use.node.attributes.get_ints("perm", (1, 0))) == [1, 0]:
                use.node.outputs[0].replace_all_uses_with(typed)
                graph.remove(use.node, safe=True)
    if value.uses():
        value.replace_all_uses_with(_behind(graph, "Transpose", typed, {"perm": [1, 0]}) if transposed else typed)


def _behind(graph: ir.Graph, op_type: str, value: ir.Value, attributes: dict[str, Any]) -> ir.Value:
    """The result of a Transpose or Cast of a constant, made once."""
    name = f"{value.name}/{op_type}"
    for use in value.uses():
        if use.node.name == name:
            return use.node.outputs[0]
    node = ir.node(op_type, [value], attributes, name=name)
    result = node.outputs[0]
    shape = None if value.shape is None else list(value.shape)
    result.name = f"{name}/output"
    result.shape = None if shape is None else ir.Shape(shape[::-1] if op_type == "Transpose" else shape)
    result.type = ir.TensorType(ir.DataType(attributes["to"])) if op_type == "Cast" else value.type
    graph.insert_before(graph[0], node)
    return result
