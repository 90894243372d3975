"""Find the linear layers of a graph: matrix products with a constant two-dimensional float weight."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

import onnx_ir as ir

# What an exporter calls a value that has no name in the model.
_ANONYMOUS = re.compile(r"onnx::.*|(val_|MatMul_|Gemm_|Transpose_)?\d*")
_FLOAT_TYPES = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE})
_ACTIVATION_TYPES = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16})


@dataclass(frozen=True)
class Linear:
    """One linear layer in a graph.

    Attributes:
        name: the module's name where the exporter kept it, else the node's.
        node: the MatMul or Gemm.
        activation: its left input, [..., in_features].
        weight: the initializer, before any constant Transpose or Cast.
        transposed: True where the initializer is [out_features, in_features], False for [in_features, out_features].
        in_features: length of a row of the activation.
        out_features: length of a row of the product.
    """

    name: str
    node: ir.Node
    activation: ir.Value
    weight: ir.Value
    transposed: bool
    in_features: int
    out_features: int


@dataclass(frozen=True)
class Rejected:
    """A matrix product that cannot be replaced, and why."""

    name: str
    reason: str


def constant_source(value: ir.Value | None) -> tuple[ir.Value | None, bool]:
    """Follow Identity, Cast and two-dimensional Transpose back to an initializer.

    Returns:
        The initializer and whether an odd number of transposes lies between; (None, False) where there is none.
    """
    transposed = False
    while value is not None:
        if value.is_initializer():
            return value, transposed
        node = value.producer()
        if node is None or node.domain not in ("", "ai.onnx"):
            return None, False
        if node.op_type == "Transpose":
            # Without perm all dimensions are reversed; whether there are two is rule 3's business.
            perm = tuple(node.attributes.get_ints("perm", (1, 0)))
            if perm not in ((0, 1), (1, 0)):
                return None, False
            transposed ^= perm == (1, 0)
        elif node.op_type not in ("Identity", "Cast"):
            return None, False
        value = node.inputs[0]
    return None, False


def find_linears(model: ir.Model) -> tuple[list[Linear], list[Rejected]]:
    """All linear layers of the main graph and its subgraphs, in execution order, and what was left out.

    A node is a linear layer where all of these hold; the number of the first that fails is in the reason:

    1. it is MatMul or Gemm of the standard domain
    2. its right input comes from an initializer, through nothing but Cast, Transpose and Identity
    3. that initializer is float and two-dimensional, with a known shape
    4. that initializer is no graph input (a caller could override it)
    5. the product is computed in float32 or float16

    Bodies of local functions are not visited: ``prepare`` inlines them first.
    """
    linears: list[Linear] = []
    rejected: list[Rejected] = []
    names: dict[str, tuple[ir.Value, bool]] = {}
    for node in _matrix_products(model):
        found = _match(node)
        if isinstance(found, Rejected):
            rejected.append(found)
        elif found is not None:
            # A name stands for one matrix. Another weight, or the same one the other way round (a square weight can be
            # used both ways), gets its node's name as well.
            matrix = (found.weight, found.transposed)
            if names.setdefault(found.name, matrix) != matrix:
                found = replace(found, name=f"{found.name}@{node.name}")
            linears.append(found)
    return linears, rejected


def _matrix_products(model: ir.Model) -> Iterator[ir.Node]:
    for node in model.graph.all_nodes():
        if node.domain in ("", "ai.onnx") and node.op_type in ("MatMul", "Gemm") and len(node.inputs) >= 2:  # rule 1
            yield node


def _match(node: ir.Node) -> Linear | Rejected | None:
    activation, right = node.inputs[0], node.inputs[1]
    weight, transposed = constant_source(right)
    if weight is None or activation is None or right is None:  # rule 2
        return None
    name = layer_name(weight, node)
    shape = weight.shape
    if shape is None or not shape.is_static() or len(shape) != 2 or weight.dtype not in _FLOAT_TYPES:  # rule 3
        return Rejected(name, f"rule 3: weight is {weight.dtype} {shape}, not a float matrix")
    if weight.is_graph_input():  # rule 4
        return Rejected(name, "rule 4: weight is also a graph input, so a caller may override it")
    if weight.const_value is None:
        return Rejected(name, "rule 2: weight has no data")
    compute = activation.dtype or right.dtype or weight.dtype
    if compute not in _ACTIVATION_TYPES:  # rule 5
        return Rejected(name, f"rule 5: computed in {compute}, not FLOAT or FLOAT16")
    if node.op_type == "Gemm":
        transposed ^= bool(node.attributes.get_int("transB", 0))
    rows, columns = (int(d) for d in shape.numpy())
    out_features, in_features = (rows, columns) if transposed else (columns, rows)
    if out_features == 0 or in_features == 0:
        return Rejected(name, f"rule 3: weight is empty, {shape}")
    return Linear(name, node, activation, weight, transposed, in_features, out_features)


def layer_name(weight: ir.Value, node: ir.Node) -> str:
    """``layers.0.mlp.up_proj`` for ``layers.0.mlp.up_proj.weight``; the node's name for an anonymous weight."""
    name = weight.name or ""
    if _ANONYMOUS.fullmatch(name) and node.name:
        return node.name
    return name.removesuffix(".weight") or f"node_{node.op_type}"
