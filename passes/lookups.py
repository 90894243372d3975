"""Tables of embeddings as sums of binary matrices: find them, and read their rows from packed bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np
import onnx.parser
import onnx_ir as ir
from onnx_ir.passes import common

from qbb_export.errors import QbbError
from qbb_export.format import LAYOUT_ROWS, TILE_ROWS, WORD_BITS
from qbb_export.passes.binarize import PackedLayer, add_initializer
from qbb_export.passes.function_body import MIN_OPSET, SIGN_STEPS, sign_constants
from qbb_export.passes.linears import Linear, constant_source, layer_name

# Not the operator's own domain: no library has kernels for this, ONNX Runtime runs the function's nodes.
DOMAIN: Final = "qbb.lookup"
_FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})


def find_lookups(model: ir.Model) -> list[Linear]:
    """Tables that rows are taken of by index, as linear layers that are multiplied with one-hot vectors.

    1. the node is a Gather along the first axis, in the main graph
    2. its table is a float initializer ``[rows, columns]``, perhaps in another type, and no graph input
    3. its indices are not constant
    """
    found = []
    for node in model.graph:
        if node.domain != "" or node.op_type != "Gather" or node.attributes.get_int("axis", 0) != 0:  # rule 1
            continue
        (weight, transposed), ids = constant_source(node.inputs[0]), node.inputs[1]
        tensor = None if weight is None else weight.const_value
        if weight is None or tensor is None or transposed or weight.is_graph_input():  # rule 2
            continue
        shape = tensor.shape.numpy()
        if len(shape) != 2 or tensor.dtype not in _FLOATS:  # rule 2
            continue
        if ids is None or ir.convenience.get_const_tensor(ids) is not None:  # rule 3
            continue
        found.append(Linear(layer_name(weight, node), node, ids, weight, True, int(shape[1]), int(shape[0])))
    return found


class BinarizeLookups(ir.passes.InPlacePass):
    """A Gather becomes a call of a function that unpacks the rows it wants.

    1. the packed initializers have the names of a linear layer's: a table that is also the head is stored once
    2. the float table goes if nobody else reads it

    The function comes with the model, in plain ONNX operators. Its cost is that of the rows, not of the table: ONNX
    Runtime cannot fold it, as the indices are an input. Visits the main graph.

    Args:
        layers: packed tables by name.
    """

    def __init__(self, layers: Mapping[str, PackedLayer]) -> None:
        super().__init__()
        self._layers = layers

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        lookups = [lookup for lookup in find_lookups(model) if lookup.name in self._layers]
        opset = model.opset_imports.get("", 0)
        if lookups and opset < MIN_OPSET:
            raise QbbError("opset is too old", where=lookups[0].name, expected=f">= {MIN_OPSET}", got=opset)
        for lookup in lookups:
            function = _replace(model, lookup, self._layers[lookup.name], opset)
            model.functions[function.identifier()] = function
        if lookups:
            model.opset_imports[DOMAIN] = 1
            common.RemoveUnusedNodesPass()(model)  # rule 2
        return ir.passes.PassResult(model, bool(lookups))


def _replace(model: ir.Model, lookup: Linear, packed: PackedLayer, opset: int) -> ir.Function:
    graph, spec, name, old = model.graph, packed.spec, lookup.name, lookup.node.outputs[0]
    inputs = [
        lookup.activation,
        add_initializer(graph, f"{name}.qbb_planes", packed.planes),
        add_initializer(graph, f"{name}.qbb_scales", packed.scales),
    ]
    if packed.offset is not None:
        inputs.append(add_initializer(graph, f"{name}.qbb_offset", packed.offset))
    group = np.arange(spec.K, dtype=np.int64) // spec.group_size
    inputs.append(add_initializer(graph, f"{name}.qbb_group_of_input", ir.tensor(group)))
    function = _function(spec.layout, packed.offset is not None, old.dtype or ir.DataType.FLOAT, opset)
    node = ir.node(function.name, inputs, domain=DOMAIN, name=lookup.node.name)
    ir.convenience.replace_nodes_and_values(graph, lookup.node, [lookup.node], [node], [old], node.outputs)
    return function


def _row(layout: int, source: str, axis: int) -> str:
    """ONNX text that takes rows ``ids`` of ``[..., tiles, D, 16]`` (or ``[..., rows, D]``) as ``[..., M, D]``."""
    if layout == LAYOUT_ROWS:
        return f"{source}_rows = Gather <axis = {axis}> ({source}, ids_1d)"
    return f"""{source}_tiles = Gather <axis = {axis}> ({source}, tile)
        {source}_shape = Shape ({source}_tiles)
        {source}_lead = Slice ({source}_shape, zero, minus_1)
        {source}_index_shape = Concat <axis = 0> ({source}_lead, one)
        {source}_index = Expand (lane, {source}_index_shape)
        {source}_lane = GatherElements <axis = -1> ({source}_tiles, {source}_index)
        {source}_rows = Squeeze ({source}_lane, minus_1)"""


def _function(layout: int, offset: bool, dtype: ir.DataType, opset: int) -> ir.Function:
    """Rows of ``W[n,k] = Σ_b S[b,n,g(k)]·sign(b,n,k) + Z[n,g(k)]``, summed in float32."""
    name = f"Rows{'WithOffset' if offset else ''}{'' if dtype == ir.DataType.FLOAT else dtype.name}"
    inputs = "ids, B, S, Z, group" if offset else "ids, B, S, group"
    allowzero = "<allowzero = 1>" if opset >= 14 else ""  # for no indices
    with_offset = f"""{_row(layout, "Z", 0)}
        Z_inputs = Gather <axis = 1> (Z_rows, group)
        W = Add (W_signs, Z_inputs)"""
    text = f"""
      <domain: "{DOMAIN}", opset_import: ["": {opset}]>
      {name} ({inputs}) => (Y)
      {{
        zero = Constant <value = int64[1] {{0}}> ()
        one = Constant <value = int64[1] {{1}}> ()
        two = Constant <value = int64[1] {{2}}> ()
        three = Constant <value = int64[1] {{3}}> ()
        minus_1 = Constant <value = int64[1] {{-1}}> ()
        word_bits = Constant <value = int64[1] {{{WORD_BITS}}}> ()
        tile_rows = Constant <value = int64[1] {{{TILE_ROWS}}}> ()
        lane_shape = Constant <value = int64[3] {{-1, 1, 1}}> ()
        {sign_constants(layout)}
        ids_long = Cast <to = 7> (ids)
        ids_1d = Reshape (ids_long, minus_1)
        tile = Div (ids_1d, tile_rows)
        lane_1d = Mod (ids_1d, tile_rows)
        lane = Reshape (lane_1d, lane_shape)
        {_row(layout, "B", 1)}
        {_row(layout, "S", 1)}
        word_column = Unsqueeze (B_rows, three)
        {SIGN_STEPS}
        B_dims = Shape (B_rows)
        signs_lead = Slice (B_dims, zero, minus_1)
        B_words = Slice (B_dims, minus_1, three)
        B_inputs = Mul (B_words, word_bits)
        signs_shape = Concat <axis = 0> (signs_lead, B_inputs)
        signs_all = Reshape (signs_by_nibble, signs_shape)
        K = Shape (group)
        signs = Slice (signs_all, zero, K, two)
        S_float = Cast <to = 1> (S_rows)
        S_inputs = Gather <axis = 2> (S_float, group)
        products = Mul (signs, S_inputs)
        W_signs = ReduceSum <keepdims = 0> (products, zero)
        {with_offset if offset else "W = Identity (W_signs)"}
        ids_shape = Shape (ids)
        Y_shape = Concat <axis = 0> (ids_shape, K)
        Y_float = Reshape {allowzero} (W, Y_shape)
        Y = Cast <to = {int(dtype)}> (Y_float)
      }}
    """
    return ir.serde.deserialize_function(onnx.parser.parse_function(text))
