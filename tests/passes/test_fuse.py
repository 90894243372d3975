import numpy as np
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from qbb_export.artifact import read_graph, save
from qbb_export.format import LAYOUT_ROWS, LAYOUT_TILED
from qbb_export.passes.function_body import binary_basis_nodes
from qbb_export.passes.fuse import FuseLinears
from qbb_export.passes.verify import VerifyBinaryBasis
from qbb_export.runtimes.ort import session
from tests.passes.graphs import binarized, graph, integers, run

RNG = np.random.default_rng(11)
K = 70


def layers(*widths, body="", weights=None, x="float[b, 70] x", **kwargs):
    """``y0 = MatMul (x, m.w0)``, ``y1 = …``: layers on one X, all of them outputs."""
    outputs = ", ".join(f"float[b, {n}] y{i}" for i, n in enumerate(widths))
    lines = " ".join(f"y{i} = MatMul (x, w{i})" for i in range(len(widths)))
    arrays = {f"w{i}": integers(RNG, K, n) for i, n in enumerate(widths)}
    model = graph(f"g ({x}) => ({outputs}) {{ {body or lines} }}", arrays | (weights or {}), **kwargs)
    for i in range(len(widths)):
        model.graph.initializers[f"w{i}"].name = f"m.w{i}.weight"
    return model


def serialized(model):
    return ir.to_proto(model).SerializeToString(deterministic=True)


def parts(model):
    """Rows of the layers in each node; one number for a node on its own."""
    found = []
    for node in binary_basis_nodes(model):
        (use, *_) = node.outputs[0].uses() or (None,)
        fused = use is not None and use.node.op_type == "Split"
        found.append(use.node.inputs[1].const_value.numpy().tolist() if fused else node.attributes["N"].as_int())
    return found


def check(model, dense, rows=3, **feeds):
    """The dense model's outputs, exactly; names as they were; a second run changes nothing."""
    VerifyBinaryBasis()(model)
    assert [v.name for v in model.graph.outputs] == [v.name for v in dense.graph.outputs]
    feeds = feeds or {"x": integers(RNG, rows, K)}
    for library in (False, True):
        for got, expected in zip(run(model, feeds, library=library), run(dense, feeds), strict=True):
            np.testing.assert_array_equal(got, expected)
    before = serialized(model)
    assert not FuseLinears()(model).modified
    assert serialized(model) == before


@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("offset", [True, False])
@pytest.mark.parametrize("layout", [LAYOUT_ROWS, LAYOUT_TILED])
def test_layers_on_one_input(layout, offset, rows):
    apart, dense = binarized(layers(48, 16, 32), layout=layout, offset=offset, group_size=32)
    fused = apart.clone()
    assert FuseLinears()(fused).modified
    assert parts(fused) == [[48, 16, 32]]
    check(fused, dense, rows)


@pytest.mark.parametrize("mode", range(3))
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_kernels_give_the_same_bits(mode, rows):
    """Rows of W are added up on their own, and what becomes of X depends on X alone."""
    apart, _ = binarized(layers(48, 16, 100), group_size=32)
    for node in binary_basis_nodes(apart):
        attribute("mode", mode)(node)
    fused = apart.clone()
    FuseLinears()(fused)
    assert parts(fused) == [[48, 16, 100]]
    x = {"x": RNG.standard_normal((rows, K), dtype=np.float32)}
    for got, expected in zip(run(fused, x, library=True), run(apart, x, library=True), strict=True):
        np.testing.assert_array_equal(got, expected)


def test_names():
    model, _ = binarized(layers(16, 16), fuse=True)
    (node,) = binary_basis_nodes(model)
    assert node.name == "m.w0+w1"
    assert [v.name for v in node.inputs] == [
        "x", "m.w0+w1.qbb_planes", "m.w0+w1.qbb_scales", "m.w0+w1.qbb_offset", "qbb_no_bias",
    ]  # fmt: skip
    assert sorted(model.graph.initializers) == sorted([*(v.name for v in node.inputs[1:]), "m.w0+w1.qbb_split"])
    assert [n.op_type for n in model.graph] == ["BinaryBasisMatMul", "Split"]
    assert (str(node.outputs[0].shape), node.outputs[0].dtype) == ("[b,32]", ir.DataType.FLOAT)


def test_names_that_are_taken():
    body = "y0 = MatMul (x, w0) y1 = MatMul (x, w1) [other] y2 = MatMul (x, w2)"
    model, dense = binarized(layers(16, 16, 5, body=body), each={"m.w2": {"bases": 1}})
    model.graph.node("other").name = "m.w0+w1"
    model.graph.initializers["m.w2.qbb_planes"].name = "m.w0+w1.qbb_planes"
    FuseLinears()(model)
    assert [n.name for n in binary_basis_nodes(model)] == ["m.w0+w1@2", "m.w0+w1"]
    check(model, dense)


def test_the_function_body_in_onnx_reference():
    model, dense = binarized(layers(32, 16, 5), fuse=True, group_size=32)
    x = {"x": integers(RNG, 3, K)}
    for got, expected in zip(ReferenceEvaluator(ir.to_proto(model)).run(None, x), run(dense, x), strict=True):
        np.testing.assert_array_equal(got, expected)


BIASES = {"c0": integers(RNG, 32), "c1": np.full(1, 3, np.float32)}


@pytest.mark.parametrize("layout", [LAYOUT_ROWS, LAYOUT_TILED])
def test_biases_of_every_kind(layout):
    body = "a = MatMul (x, w0) y0 = Add (a, c0) b = MatMul (x, w1) y1 = Add (c1, b) y2 = MatMul (x, w2)"
    model, dense = binarized(layers(32, 16, 5, body=body, weights=BIASES), layout=layout, fuse=True)
    (node,) = binary_basis_nodes(model)
    bias = np.concatenate([BIASES["c0"], np.repeat(BIASES["c1"], 16), np.zeros(5)])
    np.testing.assert_array_equal(node.inputs[4].const_value.numpy(), bias)
    check(model, dense)


def test_single_numbers_as_biases():
    body = "a = MatMul (x, w0) y0 = Add (a, c1) y1 = MatMul (x, w1)"
    model, dense = binarized(layers(32, 16, body=body, weights={"c1": BIASES["c1"]}), fuse=True)
    assert parts(model) == [[32, 16]]
    check(model, dense)


def test_a_bias_that_another_layer_has_too_stays_for_that_one():
    body = "a = MatMul (x, w0) y0 = Add (a, c0) y1 = MatMul (x, w1) r = Relu (x) b = MatMul (r, w2) y2 = Add (b, c0)"
    model, dense = binarized(layers(32, 16, 32, body=body, weights=BIASES | {"c1": BIASES["c0"]}), fuse=True)
    assert parts(model) == [[32, 16], 32]
    assert "c0.qbb_bias" in model.graph.initializers
    check(model, dense)


@pytest.mark.parametrize(
    ("layout", "widths", "expected"),
    [
        (LAYOUT_ROWS, (5, 32, 7), [[5, 32, 7]]),
        (LAYOUT_ROWS, (1, 1), [[1, 1]]),
        (LAYOUT_TILED, (5, 32, 16), [[32, 16, 5]]),
        (LAYOUT_TILED, (16, 5, 32, 7), [[16, 32, 5], 7]),
        (LAYOUT_TILED, (5, 7), [5, 7]),
        (LAYOUT_TILED, (16,), [16]),
    ],
)
@pytest.mark.parametrize("offset", [True, False])
def test_rows_that_fill_no_tile(layout, widths, expected, offset):
    """One group for a whole row, so that with one row Z is [1, 1] in layout 0."""
    model, dense = binarized(layers(*widths), layout=layout, offset=offset, fuse=True)
    if widths == (1, 1) and offset:
        expected = [1, 1]  # [1, 1] that is not zero
    assert parts(model) == expected
    check(model, dense)


def attribute(name, value):
    return lambda node: node.attributes.add(ir.AttrInt64(name, value))


def scalar_offset(node):
    value = ir.Value(name="z", const_value=ir.tensor(np.ones((1, 1), np.float32)))
    node.graph.register_initializer(value)
    node.replace_input_with(3, value)


def bias_from_a_node(node):
    tensor = ir.tensor(np.ones(1, np.float32))
    constant = ir.node("Constant", [], {"value": tensor})
    constant.outputs[0].name, constant.outputs[0].const_value = "c", tensor
    node.graph.insert_before(node, constant)
    node.replace_input_with(4, constant.outputs[0])


@pytest.mark.parametrize(
    ("settings", "change"),
    [
        ({"bases": 3}, None),
        ({"group_size": 64}, None),
        ({"offset": False}, None),
        ({"scale_type": np.float32}, None),
        ({}, attribute("mode", 1)),
        ({}, attribute("layout", LAYOUT_ROWS)),
        ({}, attribute("format", 2)),
        ({}, scalar_offset),
        ({}, lambda node: node.graph.outputs.append(node.inputs[1])),
        ({}, lambda node: node.graph.outputs.append(node.inputs[4])),
        ({}, lambda node: node.graph.inputs.append(node.inputs[2])),
        ({}, lambda node: node.replace_input_with(4, node.graph.inputs[0])),
        ({}, bias_from_a_node),
        ({}, lambda node: node.resize_inputs(4)),
    ],
)
def test_layers_that_differ_stay_apart(settings, change):
    body = "y0 = MatMul (x, w0) b = MatMul (x, w1) y1 = Add (b, c1)"
    model, _ = binarized(layers(32, 16, body=body, weights={"c1": BIASES["c1"]}), each={"m.w1": settings})
    if change is not None:
        change(binary_basis_nodes(model)[1])
    before = serialized(model)
    assert not FuseLinears()(model).modified
    assert serialized(model) == before


def test_without_the_change_they_would_be_fused():
    body = "y0 = MatMul (x, w0) b = MatMul (x, w1) y1 = Add (b, c1)"
    model, _ = binarized(layers(32, 16, body=body, weights={"c1": BIASES["c1"]}))
    attribute("mode", 0)(binary_basis_nodes(model)[1])  # as good as none
    assert FuseLinears()(model).modified
    assert parts(model) == [[32, 16]]


def test_the_mode_stays():
    model, _ = binarized(layers(32, 16))
    for node in binary_basis_nodes(model):
        attribute("mode", 2)(node)
    FuseLinears()(model)
    (node,) = binary_basis_nodes(model)
    assert node.attributes["mode"].as_int() == 2


def test_other_inputs_and_an_old_opset():
    body = "y0 = MatMul (x, w0) r = Relu (x) y1 = MatMul (r, w1) y2 = MatMul (r, w2)"
    model, dense = binarized(layers(16, 16, 32, body=body), fuse=True)
    assert parts(model) == [16, [16, 32]]
    check(model, dense)
    model, _ = binarized(layers(16, 16))
    model.graph.opset_imports[""] = 12
    assert not FuseLinears()(model).modified


SHARED = "y0 = MatMul (x, w0) y1 = MatMul (x, w1) r = Relu (x) y2 = MatMul (r, {}) y3 = MatMul (r, {})"


def test_layers_that_share_all_weights_are_stored_once():
    model, dense = binarized(layers(16, 32, 16, 32, body=SHARED.format("w0", "w1")), fuse=True)
    first, second = binary_basis_nodes(model)
    assert parts(model) == [[16, 32], [16, 32]]
    assert list(first.inputs[1:]) == list(second.inputs[1:])
    assert first.name != second.name
    assert len(model.graph.initializers) == 4 + 2  # B, S, Z, C and sizes
    check(model, dense)


def test_other_layers_on_one_of_the_inputs_do_not_keep_them_apart():
    body = SHARED.format("w0", "w1") + " y4 = MatMul (x, w4) y5 = MatMul (x, w5)"
    model, dense = binarized(layers(16, 32, 16, 32, 16, 48, body=body), fuse=True)
    assert sorted(parts(model)) == [[16, 32], [16, 32], [16, 48]]
    check(model, dense)


@pytest.mark.parametrize(
    "body",
    [
        SHARED.format("w0", "w3"),  # w0 is needed on its own
        "y0 = MatMul (x, w0) y1 = MatMul (x, w0) y2 = MatMul (x, w0) y3 = MatMul (x, w1)",
    ],
)
def test_a_shared_weight_is_not_stored_twice(body):
    model, dense = binarized(layers(16, 16, 16, 16, body=body.replace("w3", "w2")))
    stored = set(model.graph.initializers)
    FuseLinears()(model)
    assert {"m.w0.qbb_planes", "m.w0.qbb_scales"} <= stored & set(model.graph.initializers)
    assert all(isinstance(rows, int) for rows in parts(model))
    check(model, dense)


def test_the_node_stands_where_the_first_one_stood():
    """y1 is read before the layer that comes first in the fused node."""
    body = "y0 = MatMul (x, w0) r = Relu (y0) y1 = MatMul (x, w1) y2 = MatMul (r, w2)"
    model, dense = binarized(layers(5, 16, 16, body=body, weights={"w2": integers(RNG, 5, 16)}), fuse=True)
    assert [n.op_type for n in model.graph] == ["BinaryBasisMatMul", "Split", "Relu", "BinaryBasisMatMul"]
    assert parts(model) == [[16, 5], 16]
    check(model, dense)


def test_branches_of_an_if():
    """Two in one branch are fused; one in the other branch and one outside are not."""
    text = """g (bool k, float[b, 70] x) => (float[b, 32] y, float[b, 32] z) {
      z = MatMul (x, w)
      y = If (k) <then_branch = yes () => (float[b, 32] p) { c = MatMul (x, u) d = MatMul (x, v) p = Add (c, d) },
                  else_branch = no () => (float[b, 32] q) { q = MatMul (x, w) }>
    }"""
    weights = {name: integers(RNG, K, 32) for name in "uvw"}
    model, dense = binarized(graph(text, weights), fuse=True)
    assert sorted(parts(model), key=str) == [32, 32, [32, 32]]
    x = integers(RNG, 3, K)
    for k in (True, False):
        check(model, dense, k=np.asarray(k), x=x)


def test_body_of_a_loop():
    text = """g (int64 n, float[b, 70] x) => (float[b, 70] y) {
      y = Loop (n, , x) <body = again (int64 i, bool go, float[b, 70] s) => (bool on, float[b, 70] t) {
        on = Identity (go) c = MatMul (s, u) d = MatMul (s, v) e = Concat <axis = 1> (c, d) t = Clip (e, low, high)
      }>
    }"""
    limits = {"low": np.float32(-4).reshape(()), "high": np.float32(4).reshape(())}
    weights = {"u": integers(RNG, K, 64), "v": integers(RNG, K, 6)}
    model, dense = binarized(graph(text, weights | limits), fuse=True)
    assert parts(model) == [[64, 6]]
    check(model, dense, n=np.asarray(3), x=integers(RNG, 3, K))


@pytest.mark.parametrize("shape", [(K,), (2, 3, K), (0, K)])
def test_any_rank(shape):
    lead = "".join(f"{d}, " for d in shape[:-1])
    text = f"g (float[{lead}70] x) => (float[{lead}16] p, float[{lead}5] q) {{ p = MatMul (x, u) q = MatMul (x, v) }}"
    model, dense = binarized(graph(text, {"u": integers(RNG, K, 16), "v": integers(RNG, K, 5)}), fuse=True)
    assert parts(model) == [[16, 5]]
    check(model, dense, x=integers(RNG, *shape))


@pytest.mark.parametrize("opset", [13, 17, 18, 23])
def test_opsets(opset):
    model, dense = binarized(layers(16, 5, opset=opset), fuse=True)
    assert parts(model) == [[16, 5]]
    check(model, dense)


def test_float16():
    text = "g (float16[b, 70] x) => (float16[b, 16] p, float16[b, 5] q) { p = MatMul (x, u) q = MatMul (x, v) }"
    weights = {"u": integers(RNG, K, 16, dtype=np.float16), "v": integers(RNG, K, 5, dtype=np.float16)}
    model, dense = binarized(graph(text, weights), fuse=True)
    assert parts(model) == [[16, 5]]
    assert binary_basis_nodes(model)[0].outputs[0].dtype == ir.DataType.FLOAT16
    check(model, dense, x=integers(RNG, 3, K, dtype=np.float16))


def test_weights_are_read_when_they_are_written(tmp_path):
    model, dense = binarized(layers(16, 64))
    reads = []

    def lazy(value):
        tensor = value.const_value

        def read():
            reads.append(value.name)
            return tensor

        value.const_value = ir.LazyTensor(read, tensor.dtype, ir.Shape(tensor.shape))

    weights = [v for node in binary_basis_nodes(model) for v in node.inputs[1:3]]
    names = [v.name for v in weights]
    for value in weights:
        lazy(value)
    FuseLinears()(model)
    assert reads == []
    save(model, tmp_path / "m.onnx")
    assert sorted(reads) == sorted(names)
    check(read_graph(tmp_path / "m.onnx"), dense)


def test_a_finished_file(tmp_path):
    """Large initializers lie in the file that is written over."""
    model, dense = binarized(layers(192, 256), group_size=32)
    path = tmp_path / "m.onnx"
    save(model, path)
    model = read_graph(path)
    assert isinstance(binary_basis_nodes(model)[0].inputs[1].const_value, ir.ExternalTensor)
    assert FuseLinears()(model).modified
    save(model, path)
    assert parts(read_graph(path)) == [[192, 256]]
    x = {"x": integers(RNG, 3, K)}
    for library in (False, True):
        for got, expected in zip(session(path, library=library).run(None, x), run(dense, x), strict=True):
            np.testing.assert_array_equal(got, expected)


def test_graph_of_another_maker():
    """Built and read back with onnx-graphsurgeon; values without names of types and shapes."""
    gs = pytest.importorskip("onnx_graphsurgeon")
    x = gs.Variable("x", np.float32, ["b", K])
    nodes, outputs = [], []
    for i, n in enumerate((32, 7)):
        out = gs.Variable(f"out{i}", np.float32, ["b", n])
        weight = gs.Constant(f"/layers.0/attn/w{i}.weight", integers(RNG, K, n))
        nodes.append(gs.Node("MatMul", f"/layers.0/attn/w{i}/MatMul", {}, [x, weight], [out]))
        outputs.append(out)
    made = gs.Graph(nodes=nodes, inputs=[x], outputs=outputs, opset=17, ir_version=10)
    model, dense = binarized(ir.from_proto(gs.export_onnx(made)), fuse=True)
    assert [n.name for n in binary_basis_nodes(model)] == ["/layers.0/attn/w0+w1"]
    check(model, dense)
    again = gs.import_onnx(ir.to_proto(model))
    assert [node.op for node in again.nodes] == ["BinaryBasisMatMul", "Split"]
    assert [v.name for v in again.outputs] == ["out0", "out1"]
