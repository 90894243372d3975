import numpy as np
import onnx_ir as ir
import pytest

from qbb_export.errors import QbbError
from qbb_export.format import LAYOUT_ROWS, LAYOUT_TILED
from qbb_export.passes.binarize import BinarizeLinears
from qbb_export.passes.function_body import AttachFunctionBody, binary_basis_nodes
from qbb_export.passes.linears import find_linears
from qbb_export.passes.normalize import NormalizeLinears
from tests.passes.graphs import binarized, exact_layer, graph, integers, run

RNG = np.random.default_rng(7)
W = integers(RNG, 40, 24)
BIAS = integers(RNG, 24)

CASES = {
    "matmul": ("y = MatMul (x, w)", W),
    "bias": ("m = MatMul (x, w) y = Add (m, c)", W),
    "bias first": ("m = MatMul (x, w) y = Add (c, m)", W),
    "scalar bias": ("m = MatMul (x, w) y = Add (m, s)", W),
    "transposed": ("t = Transpose (w) m = MatMul (x, t) y = Add (m, c)", W.T),
    "cast": ("f = Cast <to = 1> (w) y = MatMul (x, f)", W.astype(np.float16)),
    "gemm": ("y = Gemm (x, w, c)", W),
    "gemm transB": ("y = Gemm <transB = 1> (x, w, c)", W.T),
    "gemm transA": ("t = Transpose (x) y = Gemm <transA = 1> (t, w, c)", W),
    "gemm alpha": ("y = Gemm <alpha = 0.5> (x, w)", W),
    "gemm alpha beta": ("y = Gemm <alpha = 2.0, beta = -4.0> (x, w, c)", W),
    "gemm beta 0": ("y = Gemm <beta = 0.0> (x, w, c)", W),
    "gemm everything": ("t = Transpose (x) y = Gemm <alpha = 0.5, beta = 2.0, transA = 1, transB = 1> (t, w, c)", W.T),
    "product used twice": ("m = MatMul (x, w) a = Add (m, c) y = Mul (a, m)", W),
    "bias from an input": ("m = MatMul (x, w) s = ReduceMax <keepdims = 1> (x) y = Add (m, s)", W),
    "shared weight": ("a = MatMul (x, w) b = MatMul (x, w) y = Sub (a, b)", W),
}


def model_of(case, weight, **kwargs):
    others = {"c": BIAS, "s": np.float32(2).reshape(())}
    used = {name: value for name, value in others.items() if f"{name})" in case or f"({name}," in case}
    if "s =" in case:
        del used["s"]
    weights = {"w": weight, **used}
    return graph(f"g (float[b, 40] x) => (float[b, 24] y) {{ {case} }}", weights, **kwargs)


@pytest.mark.parametrize("layout", [LAYOUT_ROWS, LAYOUT_TILED])
@pytest.mark.parametrize("name", CASES)
def test_computes_what_the_dense_weights_compute(name, layout):
    case, weight = CASES[name]
    ours, dense = binarized(model_of(case, weight), group_size=32, layout=layout)
    assert binary_basis_nodes(ours)
    assert not any(n.op_type in ("MatMul", "Gemm") for n in ours.graph)
    x = integers(RNG, 5, 40)
    assert np.array_equal(run(ours, {"x": x})[0], run(dense, {"x": x})[0])


@pytest.mark.parametrize("name", ["bias", "bias first", "gemm", "gemm transB", "transposed", "scalar bias"])
def test_a_constant_bias_goes_into_the_node(name):
    case, weight = CASES[name]
    ours, _ = binarized(model_of(case, weight))
    assert [n.op_type for n in ours.graph if n.op_type == "Add"] == []


def test_a_bias_that_widens_the_result_stays_outside():
    wide = integers(RNG, 3, 1, 24)
    text = "g (float[2, 40] x) => (float[3, 2, 24] y) { m = MatMul (x, w) y = Add (m, c) }"
    ours, dense = binarized(graph(text, {"w": W, "c": wide}))
    assert [n.op_type for n in ours.graph] == ["BinaryBasisMatMul", "Add"]
    x = integers(RNG, 2, 40)
    assert np.array_equal(run(ours, {"x": x})[0], run(dense, {"x": x})[0])


def test_a_product_that_is_an_output_keeps_its_add():
    text = "g (float[2, 40] x) => (float[2, 24] m, float[2, 24] y) { m = MatMul (x, w) y = Add (m, c) }"
    ours, dense = binarized(graph(text, {"w": W, "c": BIAS}))
    assert [o.name for o in ours.graph.outputs] == ["m", "y"]
    x = integers(RNG, 2, 40)
    for a, b in zip(run(ours, {"x": x}), run(dense, {"x": x}), strict=True):
        assert np.array_equal(a, b)


def test_float_weights_go_unless_somebody_else_reads_them():
    ours, _ = binarized(model_of(*CASES["gemm transB"]))
    assert "w" not in ours.graph.initializers
    text = """g (int64[b] i, float[b, 40] x) => (float[b, 40] e, float[b, 24] y) {
      e = Gather (w, i) t = Transpose (w) y = MatMul (x, t)
    }"""
    tied = graph(text, {"w": W.T.copy()})
    ours, _ = binarized(tied)
    assert np.array_equal(ours.graph.initializers["w"].const_value.numpy(), W.T)
    out = graph(
        "g (float[b, 40] x) => (float[40, 24] v, float[b, 24] y) { v = Identity (w) y = MatMul (x, w) }", {"w": W}
    )
    ours, _ = binarized(out)
    assert np.array_equal(run(ours, {"x": integers(RNG, 1, 40)})[0], W)


def test_shared_weights_are_packed_once():
    ours, _ = binarized(model_of(*CASES["shared weight"]))
    first, second = binary_basis_nodes(ours)
    assert [v.name for v in first.inputs[1:]] == [v.name for v in second.inputs[1:]]


def test_layers_in_a_row():
    text = (
        "g (float[b, 40] x) => (float[b, 40] y) { m = MatMul (x, w) n = MatMul (m, v) a = Add (n, d) y = Gemm (a, u) }"
    )
    weights = {"w": W, "v": W.T.copy(), "d": integers(RNG, 40), "u": integers(RNG, 40, 40)}
    ours, dense = binarized(graph(text, weights), bases=1)
    x = integers(RNG, 2, 40)
    assert np.array_equal(run(ours, {"x": x})[0], run(dense, {"x": x})[0])


def test_subgraphs():
    text = """g (bool k, float[b, 40] x) => (float[b, 24] y) {
      y = If (k) <then_branch = yes () => (float[b, 24] p) { p = MatMul (x, w) },
                  else_branch = no () => (float[b, 24] q) { m = MatMul (x, w) q = Add (m, c) }>
    }"""
    ours, dense = binarized(graph(text, {"w": W, "c": BIAS}))
    assert len(binary_basis_nodes(ours)) == 2
    x = integers(RNG, 3, 40)
    for k in (True, False):
        feeds = {"k": np.asarray(k), "x": x}
        assert np.array_equal(run(ours, feeds)[0], run(dense, feeds)[0])


@pytest.mark.parametrize("shape", [(40,), (3, 40), (2, 3, 40), (2, 1, 3, 40), (0, 40)])
def test_any_rank(shape):
    dims = ", ".join(map(str, shape))
    text = f"g (float[{dims}] x) => (float[{', '.join([*map(str, shape[:-1]), '24'])}] y) {{ y = MatMul (x, w) }}"
    ours, dense = binarized(graph(text, {"w": W}))
    x = integers(RNG, *shape)
    assert np.array_equal(run(ours, {"x": x})[0], run(dense, {"x": x})[0])


@pytest.mark.parametrize("opset", [13, 14, 15, 17, 20, 23])
def test_opsets(opset):
    ours, dense = binarized(model_of(*CASES["gemm transB"], opset=opset))
    x = integers(RNG, 3, 40)
    assert np.array_equal(run(ours, {"x": x})[0], run(dense, {"x": x})[0])


def test_an_opset_without_the_operators_is_refused():
    with pytest.raises(QbbError, match=r"opset .* expected >= 13; got 11"):
        binarized(model_of(*CASES["matmul"], opset=11))


def test_float16():
    text = "g (float16[b, 40] x) => (float16[b, 24] y) { m = MatMul (x, w) y = Add (m, c) }"
    ours, dense = binarized(graph(text, {"w": W.astype(np.float16), "c": BIAS.astype(np.float16)}))
    x = integers(RNG, 3, 40, dtype=np.float16)
    assert np.array_equal(run(ours, {"x": x})[0], run(dense, {"x": x})[0])


def test_running_it_again_changes_nothing():
    ours, _ = binarized(model_of(*CASES["gemm everything"]))
    before = ir.to_proto(ours).SerializeToString(deterministic=True)
    assert not NormalizeLinears(find_linears(ours)[0])(ours).modified
    assert not BinarizeLinears({})(ours).modified
    AttachFunctionBody()(ours)
    assert ir.to_proto(ours).SerializeToString(deterministic=True) == before


def test_a_layer_that_is_not_there_or_does_not_fit():
    model = model_of(*CASES["matmul"])
    packed, _ = exact_layer(find_linears(model)[0][0])
    with pytest.raises(QbbError, match=r"v: no such linear layer"):
        BinarizeLinears({"v": packed})(model)
    other = graph("g (float[b, 24] x) => (float[b, 40] y) { y = MatMul (x, w) }", {"w": W.T.copy()})
    with pytest.raises(QbbError, match=r"w: packed layer does not fit the graph; expected K=24, N=40; got K=40, N=24"):
        BinarizeLinears({"w": packed})(other)
