"""Random graphs, built with onnx-graphsurgeon as many of our users do, through all passes.

Each must pass ONNX's checker, give the outputs that the same graph gives with the dense weights, keep the names of its
inputs and outputs, be unchanged by a second run, and open in graphsurgeon again.
"""

from collections import Counter

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnx_ir as ir
import pytest

from qbb_export.format import TILE_ROWS
from qbb_export.passes.binarize import BinarizeLinears
from qbb_export.passes.function_body import AttachFunctionBody, binary_basis_nodes
from qbb_export.passes.fuse import FuseLinears
from qbb_export.passes.linears import find_linears
from qbb_export.passes.normalize import NormalizeLinears
from qbb_export.passes.prepare import prepare_passes
from tests.passes.graphs import binarized, integers, run

GRAPHS = 500
PER_TEST = 50


class Builder:
    """A random graph: every layer reads a random earlier value and appends its own."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.count = 0
        self.rank = int(self.rng.integers(2, 4))
        lead = ["batch", 3][: self.rank - 1]
        self.width = int(self.rng.integers(1, 70))
        self.x = gs.Variable("x", np.float32, [*lead, self.width])
        self.lead = lead
        self.values = [(self.x, self.width)]
        self.weights: list[tuple[gs.Constant, tuple[int, int]]] = []
        self.result: gs.Constant | None = None
        opset = int(self.rng.choice([13, 15, 17, 20]))
        self.graph = gs.Graph(inputs=[self.x], opset=opset, ir_version=10, name="generated")

    def chance(self, percent: int) -> bool:
        return bool(self.rng.integers(100) < percent)

    def name(self, kind: str) -> str:
        self.count += 1
        return f"{kind}_{self.count}"

    def emit(self, op: str, inputs: list, width: int, **attrs) -> gs.Variable:
        out = gs.Variable(self.name("v"), np.float32, [*self.lead, width])
        self.graph.nodes.append(gs.Node(op, self.name(op.lower()), attrs, inputs, [out]))
        return out

    def weight(self, rows: int, columns: int) -> gs.Constant:
        """A new matrix, or an earlier one of the same shape."""
        for constant, shape in self.weights:
            if shape == (rows, columns) and self.chance(60):
                return constant
        constant = gs.Constant(self.name("layers.w"), integers(self.rng, rows, columns))
        self.weights.append((constant, (rows, columns)))
        return constant

    def linear(self) -> None:
        source, k = self.values[self.rng.integers(len(self.values))]
        n = k if self.chance(30) else int(self.rng.integers(1, 70))
        n = -(-n // TILE_ROWS) * TILE_ROWS if self.chance(30) else n
        if self.rank == 2 and self.chance(60):
            self.gemm(source, k, n)
        else:
            self.matmul(source, k, n)

    def gemm(self, source: gs.Variable, k: int, n: int) -> None:
        flip = self.chance(50)
        attrs = {"transB": int(flip)}
        if self.chance(40):
            attrs["alpha"] = float(self.rng.choice([0.5, 2.0, -1.0]))
        inputs = [source, self.weight(*((n, k) if flip else (k, n)))]
        if self.chance(60):
            shape = [(n,), (1, n), (1,), ()][self.rng.integers(4)]
            inputs.append(gs.Constant(self.name("bias"), integers(self.rng, *shape)))
            if self.chance(40):
                attrs["beta"] = float(self.rng.choice([0.5, 2.0, 0.0]))
        if self.chance(20):
            turned = gs.Variable(self.name("v"), np.float32, [k, "batch"])
            self.graph.nodes.append(gs.Node("Transpose", self.name("turn"), {"perm": [1, 0]}, [source], [turned]))
            inputs[0], attrs["transA"] = turned, 1
        self.values.append((self.emit("Gemm", inputs, n, **attrs), n))

    def matmul(self, source: gs.Variable, k: int, n: int) -> None:
        if self.chance(40):
            turned = gs.Variable(self.name("w_t"), np.float32, [k, n])
            node = gs.Node("Transpose", self.name("turn"), {"perm": [1, 0]}, [self.weight(n, k)], [turned])
            self.graph.nodes.append(node)
            right = turned
        elif self.chance(20):
            right = gs.Variable(self.name("w_c"), np.float32, [k, n])
            half = gs.Constant(self.name("layers.h"), integers(self.rng, k, n).astype(np.float16))
            self.graph.nodes.append(gs.Node("Cast", self.name("cast"), {"to": 1}, [half], [right]))
        else:
            right = self.weight(k, n)
        out = self.emit("MatMul", [source, right], n)
        if self.chance(20):
            self.values.append((out, n))  # the product has another reader
        if self.chance(60):
            bias = gs.Constant(self.name("bias"), integers(self.rng, *[(n,), (1,), (1, n)][self.rng.integers(3)]))
            out = self.emit("Add", [out, bias] if self.chance(50) else [bias, out], n)
        self.values.append((out, n))

    def limit(self) -> None:
        """Keep values small and whole, so that float32 stays exact."""
        source, k = self.values[-1]
        low, high = (gs.Constant(self.name("limit"), np.asarray(v, np.float32)) for v in (-4, 4))
        clipped = self.emit("Clip", [source, low, high], k)
        self.values[-1] = (self.emit("Floor", [clipped], k), k)

    def build(self) -> onnx.ModelProto:
        for _ in range(int(self.rng.integers(1, 5))):
            self.linear()
            self.limit()
        chosen = {id(v): v for v, _ in [self.values[-1], *self.values[1:][:: int(self.rng.integers(1, 4))]]}
        self.graph.outputs = list(chosen.values())
        if self.weights and self.chance(20):  # a weight that is also a result
            self.result, shape = self.weights[0]
            out = gs.Variable(self.name("v"), np.float32, shape)
            self.graph.nodes.append(gs.Node("Identity", self.name("identity"), {}, [self.result], [out]))
            self.graph.outputs.append(out)
        return gs.export_onnx(self.graph.cleanup().toposort())


def nest(proto: onnx.ModelProto, rng: np.random.Generator) -> str:
    """Put one product into a branch, a loop or a function: which, or nothing."""
    products = [node for node in proto.graph.node if node.op_type in ("MatMul", "Gemm")]
    kind = str(rng.choice(["", "", "If", "Loop", "function"]))
    if not products or not kind:
        return ""
    node = onnx.NodeProto()
    chosen = products[rng.integers(len(products))]
    node.CopyFrom(chosen)
    (name,) = node.output
    rank = {v.name: len(v.type.tensor_type.shape.dim) for v in [*proto.graph.value_info, *proto.graph.output]}[name]
    inner = onnx.NodeProto()
    inner.CopyFrom(node)
    inner.output[0] = f"{name}_inner"
    typed = onnx.helper.make_tensor_value_info(f"{name}_inner", onnx.TensorProto.FLOAT, [None] * rank)
    if kind == "If":
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(True), "condition"))
        other = onnx.NodeProto()
        other.CopyFrom(inner)
        other.name, other.output[0] = f"{inner.name}_else", f"{name}_else"
        otherwise = onnx.helper.make_tensor_value_info(f"{name}_else", onnx.TensorProto.FLOAT, [None] * rank)
        bodies = {
            "then_branch": onnx.helper.make_graph([inner], "then", [], [typed]),
            "else_branch": onnx.helper.make_graph([other], "else", [], [otherwise]),
        }
        chosen.CopyFrom(onnx.helper.make_node("If", ["condition"], [name], name="if", **bodies))
    elif kind == "Loop":
        for constant, value in (("times", np.asarray(2)), ("go_on", np.asarray(True))):
            proto.graph.initializer.append(onnx.numpy_helper.from_array(value, constant))
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros([1] * rank, "f4"), "before"))
        scalar = [("i", onnx.TensorProto.INT64), ("go", onnx.TensorProto.BOOL), ("on", onnx.TensorProto.BOOL)]
        i, go, on = (onnx.helper.make_tensor_value_info(n, t, []) for n, t in scalar)
        before = onnx.helper.make_tensor_value_info("last", onnx.TensorProto.FLOAT, [None] * rank)
        steps = [onnx.helper.make_node("Identity", ["go"], ["on"], name="on"), inner]
        body = onnx.helper.make_graph(steps, "body", [i, go, before], [on, typed])
        chosen.CopyFrom(onnx.helper.make_node("Loop", ["times", "go_on", "before"], [name], name="loop", body=body))
    else:
        opset = onnx.helper.make_opsetid("", proto.opset_import[0].version)
        body = onnx.helper.make_function("local", "product", list(node.input), [name], [node], [opset])
        proto.functions.append(body)
        proto.opset_import.append(onnx.helper.make_opsetid("local", 1))
        chosen.CopyFrom(onnx.helper.make_node("product", list(node.input), [name], name="call", domain="local"))
    return kind


def count_ours(graph: gs.Graph) -> int:
    inner = [value for node in graph.nodes for value in node.attrs.values() if isinstance(value, gs.Graph)]
    return sum(node.op == "BinaryBasisMatMul" for node in graph.nodes) + sum(map(count_ours, inner))


def interface(model: ir.Model) -> list[str]:
    return [v.name for v in (*model.graph.inputs, *model.graph.outputs)]


def serialized(model: ir.Model) -> bytes:
    return ir.to_proto(model).SerializeToString(deterministic=True)


@pytest.mark.parametrize("first", range(0, GRAPHS, PER_TEST))
def test_generated_graphs(first: int) -> None:
    fused, nested = 0, Counter[str]()
    for seed in range(first, first + PER_TEST):
        builder = Builder(seed)
        proto = builder.build()
        nested[nest(proto, builder.rng)] += 1
        onnx.checker.check_model(proto, full_check=True)
        source = ir.from_proto(proto)
        names = interface(source)
        size = [32, 64, 0][seed % 3]
        ours, dense = binarized(
            source, bases=1 + seed % 3, group_size=size, layout=seed % 2, offset=seed % 5 > 0, fuse=seed % 4 > 1
        )
        fused += sum("+" in (node.name or "") for node in binary_basis_nodes(ours))
        assert interface(ours) == names, seed
        assert binary_basis_nodes(ours), seed
        assert not find_linears(ours)[0], seed
        x = integers(builder.rng, *([2, 3][: builder.rank - 1]), builder.width)
        wanted = run(dense, {"x": x})
        if builder.result is not None:  # who reads the float weight itself still gets it
            wanted[-1] = builder.result.values
        for got, expected in zip(run(ours, {"x": x}), wanted, strict=True):
            np.testing.assert_array_equal(got, expected, err_msg=f"seed {seed}")
        before = serialized(ours)
        prepare_passes()(ours)
        NormalizeLinears(find_linears(ours)[0])(ours)
        BinarizeLinears({})(ours)
        if seed % 4 > 1:
            FuseLinears()(ours)
        AttachFunctionBody()(ours)
        assert serialized(ours) == before, seed
        again = gs.import_onnx(ir.to_proto(ours))
        assert count_ours(again) == len(binary_basis_nodes(ours))
    assert len(nested) == 4, nested  # a branch, a loop, a function, nothing
    assert fused > 0  # of every chunk some graphs have layers that share their input
