"""Store constants in the type and order in which they are read."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir


class FoldWeights(ir.passes.InPlacePass):
    """A Cast or a Transpose of an initializer goes into the initializer, read when it is written.

    1. all users of the initializer are Casts to one type, or Transposes of one permutation: otherwise the file would
       hold it twice
    2. it is no graph input and no graph output, and neither is the result
    3. done again until nothing changes, so that chains go, too

    Visits the main graph.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        work = list(model.graph.initializers.values())
        while work:
            value = work.pop()
            if _fold(model.graph, value):
                modified = True
                work.append(value)
        return ir.passes.PassResult(model, modified)


def _change(node: ir.Node, rank: int) -> tuple[str, tuple[int, ...]]:
    """What a node does to a constant: ("Cast", (type,)), ("Transpose", permutation), or ("", ()) for anything else."""
    if node.domain == "" and node.op_type == "Cast":
        return "Cast", (node.attributes["to"].as_int(),)
    if node.domain == "" and node.op_type == "Transpose":
        return "Transpose", tuple(node.attributes.get_ints("perm", range(rank)[::-1]))
    return "", ()


def _fold(graph: ir.Graph, value: ir.Value) -> bool:
    users, tensor = [use.node for use in value.uses()], value.const_value
    if not users or tensor is None or value.is_graph_input() or value.is_graph_output():  # rule 2
        return False
    shape = tuple(tensor.shape.numpy())
    changes = {_change(node, len(shape)) for node in users}
    kind, how = changes.pop()
    if changes or not kind or any(n.outputs[0].is_graph_output() or n.graph is not graph for n in users):  # rules 1, 2
        return False
    dtype = ir.DataType(how[0]) if kind == "Cast" else tensor.dtype
    if kind == "Transpose":
        shape = tuple(shape[axis] for axis in how)

    def read() -> ir.TensorProtocol:
        array = tensor.numpy()
        array = array.astype(dtype.numpy()) if kind == "Cast" else np.ascontiguousarray(array.transpose(how))
        return ir.tensor(array, name=value.name)

    value.const_value = ir.LazyTensor(read, dtype=dtype, shape=ir.Shape(shape), name=value.name)
    value.shape, value.type = ir.Shape(shape), ir.TensorType(dtype)
    for node in users:
        node.outputs[0].replace_all_uses_with(value)
        graph.remove(node, safe=True)
    return True
