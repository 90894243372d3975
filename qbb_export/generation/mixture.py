"""A mixture of experts in plain ONNX operators, where each expert sees only the tokens that are routed to it.

*Why not the builder's operator:* it holds all experts in one tensor. *Why no loop or condition:* an expert without
tokens multiplies no rows, which takes next to no time, and its weights are not read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import onnx.parser
import onnx_ir as ir
from onnx_ir.passes import common

from qbb_export.capture import parameter_tensor

_DOMAIN: Final = "qbb.mixture"


@dataclass(frozen=True)
class Routing:
    """How a block chooses: softmax over the router's products, then the largest.

    Attributes:
        experts: how many there are.
        chosen: of them, for each token.
        normalized: the weights of the chosen ones are brought to a sum of 1.
    """

    experts: int
    chosen: int
    normalized: bool


def make_mixture(
    model: ir.Model,
    x: ir.Value,
    place: str,
    routing: Routing,
    parameters: Mapping[str, Any],
    shared: ir.Value | None,
) -> ir.Value:
    """Append a mixture to a graph.

    1. router: float32 products, softmax, the largest, in their order
    2. rows of x, gathered in the order of their experts and cut into pieces, one for each expert, perhaps without rows
    3. each expert's three products with gate and activation (SiLU) between them
    4. rows times their weights, put back in the order of the tokens, and added up in the order of rule 1: always the
       same sum

    Steps 1, 2 and 4 are functions that come with the model; see :func:`inline_mixtures`.

    Args:
        model: its graph gets nodes and float32 initializers, which have the parameters' names and are read when needed.
        x: ``[batch, sequence, H]``.
        place: name of the block, e.g. ``model.layers.0.mlp``.
        routing: of the block.
        parameters: PyTorch parameters by name; below ``place``: ``gate``, ``experts.N.gate_proj``, ``up_proj`` and
            ``down_proj``, and ``shared_expert_gate`` where there is a shared expert.
        shared: result of the shared expert, like x, or None.

    Returns:
        The sum, like x.
    """
    graph, dtype = model.graph, x.dtype or ir.DataType.FLOAT
    hidden = len(parameters[f"{place}.experts.0.down_proj.weight"])
    functions = _functions(routing, dtype, model.opset_imports[""], hidden)

    def weight(name: str, *, typed: bool = True) -> ir.Value:
        full = f"{place}.{name}.weight"
        shape = ir.Shape(tuple(parameters[full].shape))
        const = parameter_tensor(parameters[full], full, ir.DataType.FLOAT, shape)
        value = ir.Value(name=full, shape=shape, type=ir.TensorType(ir.DataType.FLOAT), const_value=const)
        graph.register_initializer(value)
        return add("Cast", [value], name=f"{name}.cast", to=int(dtype)).outputs[0] if typed else value

    def add(op_type: str, inputs: list[ir.Value], outputs: int = 1, name: str = "", **attributes: Any) -> ir.Node:
        function = functions.get(op_type)
        if function is not None:
            model.functions[function.identifier()] = function
            model.opset_imports[_DOMAIN] = 1
        full = f"{place}.{name or op_type}"
        domain = "" if function is None else _DOMAIN
        node = ir.node(op_type, inputs, attributes, domain=domain, num_outputs=outputs, name=full)
        for number, value in enumerate(node.outputs):
            value.name, value.type = f"{full}/output_{number}", ir.TensorType(dtype)
        graph.append(node)
        return node

    def product(x: ir.Value, name: str) -> ir.Value:
        columns = add("Transpose", [weight(name)], name=f"{name}.columns", perm=[1, 0]).outputs[0]
        y = add("MatMul", [x, columns], name=name).outputs[0]
        assert x.shape is not None
        y.shape = ir.Shape([*x.shape[:-1], len(parameters[f"{place}.{name}.weight"])])
        return y

    rows, counts, slots, weights = add("Route", [x, weight("gate", typed=False)], 4).outputs
    counts.type = slots.type = ir.TensorType(ir.DataType.INT64)
    results = []
    for number, piece in enumerate(add("Split", [rows, counts], routing.experts, axis=0).outputs):
        expert = f"experts.{number}"
        # Each has a number of rows of its own. Unnamed, ONNX Runtime would give them all one name, and one buffer.
        piece.shape = ir.Shape([f"{place}.{expert}.rows", hidden])
        gate, up = product(piece, f"{expert}.gate_proj"), product(piece, f"{expert}.up_proj")
        sigmoid = add("Sigmoid", [gate], name=f"{expert}.sigmoid").outputs[0]
        active = add("Mul", [gate, sigmoid], name=f"{expert}.act_fn").outputs[0]
        gated = add("Mul", [active, up], name=f"{expert}.gated").outputs[0]
        for value in (sigmoid, active, gated):
            value.shape = gate.shape
        results.append(product(gated, f"{expert}.down_proj"))
    joined = add("Concat", results, name="joined", axis=0).outputs[0]
    y = add("Combine", [x, joined, slots, weights]).outputs[0]
    if shared is not None:
        opening = product(x, "shared_expert_gate")
        share = add("Sigmoid", [opening], name="share").outputs[0]
        part = add("Mul", [share, shared], name="shared_part").outputs[0]
        y = add("Add", [y, part], name="sum").outputs[0]
    y.shape = x.shape
    return y


def inline_mixtures(model: ir.Model) -> None:
    """Put the functions' nodes in the place of their calls; to be done once all mixtures are made."""
    common.InlinePass(criteria=lambda function: function.domain == _DOMAIN)(model)
    model.opset_imports.pop(_DOMAIN, None)


def _functions(routing: Routing, dtype: ir.DataType, opset: int, hidden: int) -> dict[str, ir.Function]:
    """By their names. T tokens, k experts a token; a slot is a place in the T·k pairs of token and expert."""
    k, header = routing.chosen, f'<domain: "{_DOMAIN}", opset_import: ["": {opset}]>'
    everyone = ", ".join(map(str, range(routing.experts)))
    normalize = "total = ReduceSum (largest, minus_1) top = Div (largest, total)"
    texts = {
        "Route": f"""Route (x, router) => (rows, counts, slots, weights) {{
            zero = Constant <value = int64[1] {{0}}> ()
            one = Constant <value = int64[1] {{1}}> ()
            first = Constant <value = int64 {{1}}> ()
            minus_1 = Constant <value = int64[1] {{-1}}> ()
            k = Constant <value = int64[1] {{{k}}}> ()
            everyone = Constant <value = int64[{routing.experts}, 1] {{{everyone}}}> ()
            tokens = Flatten <axis = -1> (x)
            tokens_float = Cast <to = 1> (tokens)
            columns = Transpose <perm = [1, 0]> (router)
            logits = MatMul (tokens_float, columns)
            chances = Softmax <axis = -1> (logits)
            largest, experts = TopK <axis = -1> (chances, k)
            {normalize if routing.normalized else "top = Identity (largest)"}
            expert_of_slot = Reshape (experts, minus_1)
            row_of_slots = Unsqueeze (expert_of_slot, zero)
            is_his = Equal (everyone, row_of_slots)
            is_one = Cast <to = 7> (is_his)
            counts = ReduceSum <keepdims = 0> (is_one, one)
            pairs = NonZero (is_his)
            slots = Gather <axis = 0> (pairs, first)
            token_of_row = Div (slots, k)
            rows = Gather <axis = 0> (tokens, token_of_row)
            top_of_slot = Reshape (top, minus_1)
            top_of_row = Gather <axis = 0> (top_of_slot, slots)
            top_typed = Cast <to = {int(dtype)}> (top_of_row)
            weights = Unsqueeze (top_typed, one)
        }}""",
        "Combine": f"""Combine (x, rows, slots, weights) => (y) {{
            one = Constant <value = int64[1] {{1}}> ()
            by_slot = Constant <value = int64[3] {{-1, {k}, {hidden}}}> ()
            weighted = Mul (rows, weights)
            places = Unsqueeze (slots, one)
            placed = ScatterND (weighted, places, weighted)
            of_token = Reshape (placed, by_slot)
            sums = ReduceSum <keepdims = 0> (of_token, one)
            shape = Shape (x)
            y = Reshape (sums, shape)
        }}""",
    }
    return {
        name: ir.serde.deserialize_function(onnx.parser.parse_function(header + text)) for name, text in texts.items()
    }
