"""Store constants in the type and order in which they are read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir


class FoldWeights(ir.passes.InPlacePass):
    """A Cast or a Transpose of an initializer goes into the initializer, read when it is written.

    1. all users of the initializer are Casts to one type, or Transposes of one permutation: otherwise the file would hold
       it twice
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


def _fold(graph: ir.Graph, value: ir.Value) -> bool:
    users = [use.node for use in value.uses()]
    tensor = value.const_value
    if not users or tensor is None or value.is_graph_input() or value.is_graph_output():
        return False
    kinds = {(node.op_type, node.domain, str(sorted(node.attributes.items()))) for node in users}
    first, result = users[0], users[0].outputs[0]
    if len(kinds) > 1 or first.op_type not in ("Cast", "Transpose") or first.graph is not graph:  # rule 1
        return False
    if any(node.outputs[0].is_graph_output() for node in users):  # rule 2
        return False
    shape = tensor.shape.numpy()
    if first.op_type == "Cast":
        dtype = ir.DataType(first.attributes["to"].as_int())
        change: Callable[[npt.NDArray[Any]], npt.NDArray[Any]] = lambda array: array.astype(dtype.numpy())
    else:
        dtype = tensor.dtype
        perm = list(first.attributes.get_ints("perm", list(range(len(shape)))[::-1]))
        shape = tuple(shape[axis] for axis in perm)
        change = lambda array: np.ascontiguousarray(array.transpose(perm))

    def read() -> ir.TensorProtocol:
        return ir.tensor(change(tensor.numpy()), name=value.name)

    value.const_value = ir.LazyTensor(read, dtype=dtype, shape=ir.Shape(shape), name=value.name)
    value.shape, value.type = ir.Shape(shape), ir.TensorType(dtype)
    for node in users:
        node.outputs[0].replace_all_uses_with(value)
        graph.remove(node, safe=True)
    return True
