"""Replace linear layers by ``BinaryBasisMatMul`` nodes with packed initializers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from qbb_export.errors import QbbError
from qbb_export.format import DOMAIN, OP_TYPE, OPSET_VERSION, Spec
from qbb_export.passes.linears import constant_source, find_linears


@dataclass(frozen=True)
class PackedLayer:
    """The initializers of one node, in ``spec.layout``.

    Attributes:
        spec: the node's attributes.
        planes: B, uint32 ``spec.planes_shape``.
        scales: S, float16 or float32 ``spec.scales_shape``.
        offset: Z, float32 ``spec.offset_shape``; None for no offset.
    """

    spec: Spec
    planes: ir.TensorProtocol
    scales: ir.TensorProtocol
    offset: ir.TensorProtocol | None = None


class BinarizeLinears(ir.passes.InPlacePass):
    """MatMul, and the Add of a constant bias behind it, become one node.

    1. the layer's name is a key of ``layers``; K and N agree with the graph
    2. B, S and Z become initializers of the node's own graph, made once for a weight that several nodes share
    3. an Add of a constant with N or 1 elements becomes the bias C if it is the product's only consumer, the product
       is no graph output, and the constant does not widen the result
    4. names of graph inputs and outputs stay; float weights that nobody else reads are removed

    Dense weights are never read. Visits the main graph and its subgraphs.

    Args:
        layers: packed layers by layer name (``Linear.name``).
        mode: what kernels may do to activations, see ``format.MODES``; 0 leaves the attribute out.

    Raises:
        QbbError: a layer that is not in the graph as a MatMul, or whose shape differs.
    """

    def __init__(self, layers: Mapping[str, PackedLayer], mode: int = 0) -> None:
        super().__init__()
        self._layers, self._mode = layers, mode

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        linears = [linear for linear in find_linears(model)[0] if linear.name in self._layers]
        missing = sorted(set(self._layers) - {linear.name for linear in linears})
        if missing:
            raise QbbError("no such linear layer in the graph", where=missing[0])
        for linear in linears:
            spec = self._layers[linear.name].spec
            if (linear.in_features, linear.out_features) != (spec.K, spec.N):  # rule 1
                raise QbbError(
                    "packed layer does not fit the graph",
                    where=linear.name,
                    expected=f"K={linear.in_features}, N={linear.out_features}",
                    got=f"K={spec.K}, N={spec.N}",
                )
        for linear in linears:
            self._replace(linear.name, linear.node)
        if linears:
            model.graph.opset_imports[DOMAIN] = OPSET_VERSION
            common.RemoveUnusedNodesPass()(model)  # rule 4
        return ir.passes.PassResult(model, bool(linears))

    def _replace(self, name: str, matmul: ir.Node) -> None:
        graph = matmul.graph
        if not isinstance(graph, ir.Graph) or matmul.op_type != "MatMul":
            raise QbbError("linear layer is not normalised", where=name, expected="MatMul", got=matmul.op_type)
        packed = self._layers[name]
        spec = packed.spec
        planes = add_initializer(graph, f"{name}.qbb_planes", packed.planes)  # rule 2
        scales = add_initializer(graph, f"{name}.qbb_scales", packed.scales)
        if packed.offset is None:
            offset = add_initializer(graph, "qbb_no_offset", ir.tensor(np.zeros((1, 1), np.float32)))
        else:
            offset = add_initializer(graph, f"{name}.qbb_offset", packed.offset)
        add, bias = _constant_bias(matmul, spec.N)  # rule 3
        if add is None or bias is None:
            c = add_initializer(graph, "qbb_no_bias", ir.tensor(np.zeros(1, np.float32)))
        else:
            c = add_initializer(graph, f"{bias.name}.qbb_bias", _as_float32_vector(bias))
        last = add or matmul
        attributes = asdict(spec) | ({"mode": self._mode} if self._mode else {})
        inputs = [matmul.inputs[0], planes, scales, offset, c]
        node = ir.node(OP_TYPE, inputs, attributes, domain=DOMAIN, name=matmul.name)
        old = [matmul] if add is None else [matmul, add]
        ir.convenience.replace_nodes_and_values(graph, last, old, [node], [last.outputs[0]], [node.outputs[0]])


def add_initializer(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    """The initializer of that name, made of ``tensor`` if the graph has none."""
    existing = graph.initializers.get(name)
    if existing is not None:
        return existing
    value = ir.Value(
        name=name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    graph.register_initializer(value)
    return value


def _constant_bias(matmul: ir.Node, out_features: int) -> tuple[ir.Node | None, ir.Value | None]:
    """The Add behind a product and its constant operand, where they can become the bias."""
    product = matmul.outputs[0]
    uses = list(product.uses())
    if len(uses) != 1 or product.is_graph_output():
        return None, None
    add, index = uses[0].node, uses[0].idx
    if add.op_type != "Add" or add.domain not in ("", "ai.onnx") or add.graph is not matmul.graph:
        return None, None
    bias, _ = constant_source(add.inputs[1 - index])
    if bias is None or bias.is_graph_input() or bias.shape is None or not bias.shape.is_static():
        return None, None
    dims = [int(d) for d in bias.shape.numpy()]
    rank = 1 if product.shape is None else len(product.shape)
    broadcasts = len(dims) <= max(rank, 1) and all(d == 1 for d in dims[:-1])
    if not broadcasts or (dims[-1] if dims else 1) not in (1, out_features):
        return None, None
    return add, bias


def _as_float32_vector(bias: ir.Value) -> ir.TensorProtocol:
    tensor = bias.const_value
    assert tensor is not None
    size = int(np.prod([int(d) for d in tensor.shape.numpy()], dtype=np.int64))

    def read() -> ir.TensorProtocol:
        return ir.tensor(np.asarray(tensor.numpy(), dtype=np.float32).reshape(-1))

    return ir.LazyTensor(read, dtype=ir.DataType.FLOAT, shape=ir.Shape([size]), name=bias.name)
