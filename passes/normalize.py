"""Write chosen linear layers as MatMul with an optional Add, so that one rule replaces them all."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qbb_export.passes.linears import Linear


class NormalizeLinears(ir.passes.InPlacePass):
    """Split each chosen Gemm: ``alpha·op(A)·op(B) + beta·C``.

    1. transA: a Transpose in front of A
    2. transB: a Transpose in front of B (the weight is constant, so nothing runs)
    3. the product itself: MatMul
    4. alpha other than 1: Mul behind the product
    5. C: Add, with Mul in front of it for beta other than 1; left out for beta 0

    The output keeps its name and value. Visits the graphs that the chosen nodes are in.

    Args:
        linears: the layers to rewrite, from ``find_linears``; those that are MatMul already are left alone.
    """

    def __init__(self, linears: list[Linear]) -> None:
        super().__init__()
        self._linears = linears

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for linear in self._linears:
            if linear.node.op_type == "Gemm" and linear.node.graph is not None:
                _split_gemm(linear.node)
                modified = True
        return ir.passes.PassResult(model, modified)


def _split_gemm(gemm: ir.Node) -> None:
    a, b = gemm.inputs[0], gemm.inputs[1]
    c = gemm.inputs[2] if len(gemm.inputs) > 2 else None
    assert a is not None and b is not None
    attributes, activation_type = gemm.attributes, a.dtype
    output = gemm.outputs[0]
    nodes: list[ir.Node] = []

    def emit(op_type: str, *inputs: ir.Value, **attrs: list[int]) -> ir.Value:
        suffix = op_type if not nodes else f"{op_type}_{len(nodes)}"
        # The product keeps the node's name, which may be the layer's.
        node = ir.node(op_type, inputs, attrs, name=gemm.name if op_type == "MatMul" else f"{gemm.name}/{suffix}")
        node.outputs[0].type = output.type
        node.outputs[0].name = f"{output.name}/{suffix}"
        nodes.append(node)
        return node.outputs[0]

    def constant(value: float) -> ir.Value:
        dtype = (output.dtype or activation_type or ir.DataType.FLOAT).numpy()
        node = ir.node("Constant", [], {"value": ir.tensor(np.asarray(value, dtype=dtype))})
        node.outputs[0].name = f"{output.name}/constant_{len(nodes)}"
        nodes.append(node)
        return node.outputs[0]

    if attributes.get_int("transA", 0):  # rule 1
        a = emit("Transpose", a, perm=[1, 0])
    if attributes.get_int("transB", 0):  # rule 2
        weight = b
        b = emit("Transpose", weight, perm=[1, 0])
        if weight.shape is not None:
            b.shape = ir.Shape([weight.shape[1], weight.shape[0]])
    result = emit("MatMul", a, b)  # rule 3
    result.shape = output.shape
    alpha, beta = attributes.get_float("alpha", 1.0), attributes.get_float("beta", 1.0)
    if alpha != 1.0:  # rule 4
        result = emit("Mul", result, constant(alpha))
    if c is not None and beta != 0.0:  # rule 5
        if beta != 1.0:
            c = emit("Mul", c, constant(beta))
        result = emit("Add", result, c)
    graph = gemm.graph
    assert graph is not None
    ir.convenience.replace_nodes_and_values(graph, gemm, [gemm], nodes, [output], [result])
