"""What is legal in a finished file, as a table. Run at the end of an export and again when a file is opened."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import onnx_ir as ir

from qbb_export.errors import QbbError
from qbb_export.format import DOMAIN, MODES, OP_TYPE, OPSET_VERSION, Spec
from qbb_export.passes.function_body import binary_basis_nodes, function_body

# Domains that ONNX Runtime itself serves.
KNOWN_DOMAINS = frozenset(
    {"", "ai.onnx", "ai.onnx.ml", "com.microsoft", "com.microsoft.nchwc", "com.microsoft.experimental", DOMAIN}
)
_ATTRIBUTES = ("K", "N", "bases", "group_size", "layout", "format")
_INPUTS = ("X", "B", "S", "Z", "C")
_TYPES: dict[str, frozenset[ir.DataType]] = {
    "X": frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16}),
    "B": frozenset({ir.DataType.UINT32}),
    "S": frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16}),
    "Z": frozenset({ir.DataType.FLOAT}),
    "C": frozenset({ir.DataType.FLOAT}),
}

# Function bodies are inlined before anything runs, and a few lines can say 2**60 nodes. Nested deeper than this, ONNX's
# checker gives up; models of people have a handful of levels and well below a million nodes.
MAX_NODES = 1_000_000
MAX_DEPTH = 100

Problem = tuple[str, object, object]  # what, expected, got


def node_place(node: ir.Node) -> str:
    """How errors name a node: many exporters leave names empty."""
    outputs = ", ".join(str(value.name) for value in node.outputs)
    return f"node '{node.name or f'{node.op_type} of {outputs}'}'"


def node_spec(node: ir.Node) -> Spec:
    """The attributes of a node but for the optional ``mode``.

    Raises:
        QbbError: an attribute is missing or unknown, is no integer, or has a value that format 1 does not have.
    """
    where = node_place(node)
    if set(node.attributes) - {"mode"} != set(_ATTRIBUTES):
        raise QbbError("wrong attributes", where=where, expected=list(_ATTRIBUTES), got=sorted(node.attributes))
    values: dict[str, int] = {}
    for name in _ATTRIBUTES:
        attribute = node.attributes[name]
        if attribute.type != ir.AttributeType.INT or attribute.is_ref():
            raise QbbError(f"attribute {name} is no integer", where=where, expected="int", got=attribute.type.name)
        values[name] = attribute.as_int()
    try:
        return Spec(**values)
    except QbbError as error:
        raise QbbError(str(error), where=where) from None


def node_mode(node: ir.Node) -> int:
    """The attribute ``mode`` of a node, a place in ``format.MODES``; 0 where it is absent.

    Raises:
        QbbError: no integer, or no mode.
    """
    attribute = node.attributes.get("mode")
    if attribute is None:
        return 0
    integer = attribute.type == ir.AttributeType.INT and not attribute.is_ref()
    if not integer or not 0 <= attribute.as_int() < len(MODES):
        got = attribute.as_int() if integer else attribute.type.name
        expected = f"0..{len(MODES) - 1} ({', '.join(MODES)})"
        raise QbbError("unknown mode", where=node_place(node), expected=expected, got=got)
    return attribute.as_int()


def _inputs_present(node: ir.Node, spec: Spec) -> Iterator[Problem]:
    if len(node.inputs) != len(_INPUTS) or any(value is None for value in node.inputs):
        yield "wrong inputs", "X, B, S, Z, C, none left out", [value and value.name for value in node.inputs]
    if len(node.outputs) != 1:
        yield "wrong number of outputs", 1, len(node.outputs)


def _weights(node: ir.Node, spec: Spec) -> Iterator[Problem]:
    allowed: dict[str, list[tuple[int, ...]]] = {
        "B": [spec.planes_shape],
        "S": [spec.scales_shape],
        "Z": [spec.offset_shape, (1, 1)],
        "C": [(spec.N,), (1,)],
    }
    for (name, shapes), value in zip(allowed.items(), node.inputs[1:], strict=True):
        constant = value is not None and value.is_initializer() and not value.is_graph_input()
        tensor = value.const_value if value is not None and constant else None
        if tensor is None:
            yield f"{name} is not constant", "an initializer", value and value.name
        elif tuple(tensor.shape.numpy()) not in shapes:
            yield f"wrong shape of {name}", list(shapes[0]), list(tensor.shape.numpy())
        elif tensor.dtype not in _TYPES[name]:
            yield f"wrong type of {name}", _either(_TYPES[name]), tensor.dtype.name


def _activation(node: ir.Node, spec: Spec) -> Iterator[Problem]:
    x = node.inputs[0]
    if x is not None and x.dtype is not None and x.dtype not in _TYPES["X"]:
        yield "wrong type of X", _either(_TYPES["X"]), x.dtype.name
    shape = None if x is None else x.shape
    if shape is not None and (len(shape) == 0 or (isinstance(shape[-1], int) and shape[-1] != spec.K)):
        yield "wrong shape of X", f"[..., {spec.K}]", str(shape)


def _either(types: frozenset[ir.DataType]) -> str:
    return " or ".join(sorted(each.name for each in types))


# One rule a line; the first problem found is the one reported.
NODE_RULES: tuple[Callable[[ir.Node, Spec], Iterator[Problem]], ...] = (
    _inputs_present,
    _weights,
    _activation,
)


class VerifyBinaryBasis(ir.passes.InPlacePass):
    """Refuse a model that breaks one of the rules. Changes nothing.

    1. every operator domain is known to ONNX Runtime, is ours, or has its functions in the file
    2. our domain holds nothing but ``BinaryBasisMatMul``, at opset version 1
    3. attributes of each node are those of format 1 (``node_spec``, ``node_mode``)
    4. each node passes ``NODE_RULES``
    5. the function body is the one that this release would attach
    6. foreign functions are nested ``MAX_DEPTH`` deep at most (none calls itself) and make ``MAX_NODES`` nodes at most

    Visits the main graph and its subgraphs, and the functions for rules 1 and 6.

    Raises:
        QbbError: naming the node, what is wrong, what was expected and what was found.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        _check_domains(model)
        nodes = binary_basis_nodes(model)
        for node in nodes:
            spec = node_spec(node)  # rule 3
            node_mode(node)
            for rule in NODE_RULES:  # rule 4
                for what, expected, got in rule(node, spec):
                    raise QbbError(what, where=node_place(node), expected=expected, got=got)
        _check_body(model, nodes)
        _check_expansion(model)
        return ir.passes.PassResult(model, False)


def _check_domains(model: ir.Model) -> None:
    local = {(function.domain, function.name) for function in model.functions.values()}
    graphs: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for graph in graphs:
        for node in ir.traversal.RecursiveGraphIterator(graph.graph if isinstance(graph, ir.Function) else graph):
            if node.domain not in KNOWN_DOMAINS and (node.domain, node.op_type) not in local:  # rule 1
                raise QbbError(
                    "operator of an unknown domain",
                    where=node_place(node),
                    expected="a domain of ONNX Runtime or a function in the file",
                    got=f"{node.domain}::{node.op_type}",
                )
            if node.domain == DOMAIN and node.op_type != OP_TYPE:  # rule 2
                raise QbbError(
                    "unknown operator", where=node_place(node), expected=OP_TYPE, got=f"{DOMAIN}::{node.op_type}"
                )
    version = model.opset_imports.get(DOMAIN, OPSET_VERSION)
    # A file that ONNX Runtime saved imports every domain that is registered in its process, under a made-up version.
    if version != OPSET_VERSION and binary_basis_nodes(model):
        raise QbbError("unknown version of our operators", where="opset_import", expected=OPSET_VERSION, got=version)


def _check_body(model: ir.Model, nodes: list[ir.Node]) -> None:
    ours = [function for function in model.functions.values() if function.domain == DOMAIN]
    if not nodes:
        return
    if len(ours) != 1:
        raise QbbError("function body is missing", where=OP_TYPE, expected="one function", got=len(ours))
    layouts = {node_spec(node).layout for node in nodes}
    if len(layouts) > 1:
        raise QbbError("one file holds one layout", where=OP_TYPE, expected="one layout", got=sorted(layouts))
    opset = model.opset_imports.get("", model.opset_imports.get("ai.onnx", 0))
    dtypes = {node.inputs[0].dtype for node in nodes if node.inputs[0] is not None}
    expected = _body_bytes(layouts.pop(), opset, dtypes.pop() if opset < 15 and len(dtypes) == 1 else None)
    try:
        got = ir.to_proto(ours[0]).SerializeToString()
    except Exception:  # whatever its parts were, they make no function
        got = None
    if got != expected:  # rule 5
        raise QbbError("function body is not ours", where=OP_TYPE, expected="the body of format 1", got="another one")


@cache
def _body_bytes(layout: int, opset: int, output_type: ir.DataType | None) -> bytes:
    content: bytes = ir.to_proto(function_body(layout, opset, output_type)).SerializeToString()
    return content


def _check_expansion(model: ir.Model) -> None:
    """Rule 6, without inlining anything: a function's size is known once those that it calls are."""
    sizes: dict[ir.OperatorIdentifier, int] = {}
    calls = {identifier: _calls(function.graph, model) for identifier, function in model.functions.items()}

    def size(identifier: ir.OperatorIdentifier, depth: int) -> int:
        if depth > MAX_DEPTH:
            raise QbbError(
                "functions are nested too deeply, or call themselves",
                where=f"function '{identifier[0]}::{identifier[1]}'",
                expected=f"at most {MAX_DEPTH} levels",
            )
        if identifier not in sizes:
            sizes[identifier] = sum(1 if each is None else size(each, depth + 1) for each in calls[identifier])
        return sizes[identifier]

    total = sum(1 if each is None else size(each, 1) for each in _calls(model.graph, model))
    if total > MAX_NODES:
        raise QbbError("too many nodes", where="functions inlined", expected=f"at most {MAX_NODES}", got=total)


def _calls(graph: ir.Graph, model: ir.Model) -> list[ir.OperatorIdentifier | None]:
    """For each node, subgraphs included, the foreign function that it calls; None for an operator and for our body."""
    identifiers = (node.op_identifier() for node in ir.traversal.RecursiveGraphIterator(graph))
    foreign = {identifier for identifier in model.functions if identifier[0] != DOMAIN}
    return [identifier if identifier in foreign else None for identifier in identifiers]
