"""Make one node of ``BinaryBasisMatMul`` nodes that read the same activations."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Hashable, Sequence
from itertools import chain

import numpy as np
import onnx_ir as ir

from qbb_export.format import LAYOUT_TILED, OP_TYPE, TILE_ROWS
from qbb_export.passes.binarize import add_initializer
from qbb_export.passes.function_body import MIN_OPSET, binary_basis_nodes

# Names of B, S, Z and C end so; the axis of the rows, or of tiles of rows, is the same in both layouts.
_ROW_AXES = {"qbb_planes": 1, "qbb_scales": 1, "qbb_offset": 0, "qbb_bias": 0}

Values = tuple[ir.Value, ...]


class FuseLinears(ir.passes.InPlacePass):
    """Nodes that share X (q, k and v; gate and up) become one with all their rows, and a Split behind it.

    *Why:* what a kernel makes of X, tables and quantised activations, is then made once.

    Nodes of one graph are fused where all of these hold, the others are left alone:

    1. X is the same value, and all attributes but N are equal (no ``mode`` is mode 0)
    2. B and S have one type each; Z is a zero of [1, 1] for all, or of full size for all
    3. B, S, Z and C are initializers, and no graph inputs or outputs
    4. in layout 1 rows fill whole tiles; the first node where they do not comes last, further ones are left alone
    5. no weight is stored twice: one with several users is fused only if all of them are, with the same others
    6. the model has opset 13 or later (sizes of Split as an input)

    The new node:

    7. stands where the first one stood; the outputs of the Split have the names of the old outputs
    8. has B, S, Z and C put together when they are read, so that memory holds those of one node; a C of [1] is
       repeated, unless all share it. What several groups share is put together once
    9. is named after its layers, ``layers.0.self_attn.q_proj+k_proj+v_proj``; old initializers without a reader go

    Visits the main graph and its subgraphs. Running it again changes nothing.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        opset = model.opset_imports.get("", model.opset_imports.get("ai.onnx", 0))
        nodes = binary_basis_nodes(model)
        groups = _groups(nodes) if opset >= MIN_OPSET else []  # rule 6
        position = {node: index for index, node in enumerate(nodes)}
        names = _Names(model)
        made: dict[Values, ir.Value] = {}
        for group in groups:
            _fuse(group, min(group, key=position.__getitem__), names, made)
        return ir.passes.PassResult(model, bool(groups))


class _Names:
    """Gives out names that neither a value nor a node of the model has."""

    def __init__(self, model: ir.Model) -> None:
        self._taken: set[str | None] = set()
        for graph in model.graphs():
            values = (*graph.inputs, *graph.initializers.values(), *(v for node in graph for v in node.outputs))
            self._taken.update(item.name for item in (*values, *graph))

    def new(self, wanted: str) -> str:
        name, count = wanted, 1
        while name in self._taken:
            count += 1
            name = f"{wanted}@{count}"
        self._taken.add(name)
        return name


def _groups(nodes: Sequence[ir.Node]) -> list[list[ir.Node]]:
    """Nodes to fuse, each group in the order of its rows."""
    alike: defaultdict[Hashable, list[ir.Node]] = defaultdict(list)
    for node in nodes:
        key = _key(node)
        if key is not None:
            alike[key].append(node)
    groups = [group for group in map(_whole_tiles, alike.values()) if len(group) > 1]
    place = {
        node: (index, [other.inputs[1] for other in group]) for group in groups for index, node in enumerate(group)
    }

    def stored_once(node: ir.Node) -> bool:
        return all(place.get(use.node) == place[node] for value in _weight(node) for use in value.uses())

    return [group for group in groups if all(map(stored_once, group))]  # rule 5


def _key(node: ir.Node) -> Hashable | None:
    """What the nodes of a group have in common; None for a node that is left alone."""
    constants = _constants(node)
    if len(node.inputs) != 1 + len(_ROW_AXES) or len(constants) != len(_ROW_AXES):
        return None  # rule 3
    attributes = {"mode": 0} | {name: attribute.value for name, attribute in node.attributes.items()}
    del attributes["N"]
    b, s, z, _ = constants
    no_offset = _shape(z) == (1, 1)
    if no_offset and np.any(_tensor(z).numpy()):
        return None  # rule 2
    # Shared weights find each other first: their users need not have the same unshared company (rule 5).
    users = tuple(sorted(id(use.node.inputs[0]) for use in b.uses()))
    types = _tensor(b).dtype, _tensor(s).dtype, no_offset
    return node.graph, node.inputs[0], tuple(sorted(attributes.items())), types, users


def _whole_tiles(group: list[ir.Node]) -> list[ir.Node]:
    """Rule 4."""
    if group[0].attributes.get_int("layout", LAYOUT_TILED) != LAYOUT_TILED:
        return group
    ragged = [node for node in group if _rows(node) % TILE_ROWS]
    return [node for node in group if _rows(node) % TILE_ROWS == 0] + ragged[:1]


def _rows(node: ir.Node) -> int:
    return node.attributes["N"].as_int()


def _layer_name(node: ir.Node) -> str:
    return (_constants(node)[0].name or "").removesuffix(".qbb_planes")


def _constants(node: ir.Node) -> Values:
    """B, S, Z and C, as far as they are constant for good."""
    return tuple(
        value
        for value in node.inputs[1:]
        if value is not None
        and value.is_initializer()
        and value.const_value is not None
        and not value.is_graph_input()
        and not value.is_graph_output()
    )


def _weight(node: ir.Node) -> Values:
    """What takes space: B, S, and Z where there are offsets."""
    return tuple(value for value in _constants(node)[:3] if _shape(value) != (1, 1))


def _tensor(value: ir.Value) -> ir.TensorProtocol:
    assert value.const_value is not None
    return value.const_value


def _shape(value: ir.Value) -> tuple[int, ...]:
    return tuple(int(d) for d in _tensor(value).shape.numpy())


def _fuse(group: list[ir.Node], first: ir.Node, names: _Names, made: dict[Values, ir.Value]) -> None:
    """Put one node and its Split in the place of ``first``; ``made`` holds what groups before have put together."""
    graph, x, sizes = first.graph, first.inputs[0], [_rows(node) for node in group]
    assert isinstance(graph, ir.Graph) and x is not None
    name = names.new(_joined(list(map(_layer_name, group))))  # rule 9
    constants: list[ir.Value] = []
    parts: list[Values] = list(zip(*map(_constants, group), strict=True))
    for (suffix, axis), values in zip(_ROW_AXES.items(), parts, strict=True):
        if values not in made:
            made[values] = _together(values, axis, sizes, names.new(f"{name}.{suffix}"))
        constants.append(made[values])
    attributes = {key: attribute.value for key, attribute in first.attributes.items()} | {"N": sum(sizes)}
    node = ir.node(OP_TYPE, [x, *constants], attributes, domain=first.domain, name=name)
    old, y = [each.outputs[0] for each in group], node.outputs[0]
    y.name, y.type = names.new(f"{name}.qbb_output"), old[0].type or x.type
    if old[0].shape is not None:
        y.shape = ir.Shape([*old[0].shape[:-1], sum(sizes)])
    split_sizes = add_initializer(graph, names.new(f"{name}.qbb_split"), ir.tensor(np.asarray(sizes, np.int64)))
    split = ir.node("Split", [y, split_sizes], {"axis": -1}, num_outputs=len(group), name=names.new(f"{name}.split"))
    ir.convenience.replace_nodes_and_values(graph, first, group, [node, split], old, split.outputs)  # rule 7
    for value in set(chain.from_iterable(parts)):
        if not value.uses() and isinstance(value.graph, ir.Graph):
            value.graph.initializers.pop(value.name or "")


def _together(values: Values, axis: int, sizes: list[int], name: str) -> ir.Value:
    """One initializer that holds all ``values`` (rule 8), in the graph that the first is in: all users see that one."""
    shapes = [_shape(value) for value in values]
    if shapes[0] == (1, 1) or (shapes[0] == (1,) and len(set(values)) == 1):  # no offset; one bias for all
        return values[0]
    tensors = [_tensor(value) for value in values]
    lengths = sizes if len(shapes[0]) == 1 else [shape[axis] for shape in shapes]  # rows, or tiles of rows
    shape = list(shapes[0])
    shape[axis] = sum(lengths)

    def read() -> ir.TensorProtocol:
        whole = np.empty(shape, tensors[0].dtype.numpy())
        rows = np.moveaxis(whole, axis, 0)
        start = 0
        for tensor, length in zip(tensors, lengths, strict=True):
            rows[start : start + length] = np.moveaxis(tensor.numpy(), axis, 0)
            start += length
        return ir.tensor(whole, name=name)

    graph = values[0].graph
    assert isinstance(graph, ir.Graph)
    return add_initializer(graph, name, ir.LazyTensor(read, tensors[0].dtype, ir.Shape(shape), name=name))


def _joined(names: list[str]) -> str:
    """``a.b.x+y`` for ``a.b.x`` and ``a.b.y``."""
    split = [re.split(r"(?<=[./])", name) for name in names]
    common = 0
    while all(words[common] == split[0][common] and len(words) > common + 1 for words in split):
        common += 1
    return "".join(split[0][:common]) + "+".join("".join(words[common:]) for words in split)
