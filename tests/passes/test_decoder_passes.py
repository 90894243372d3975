"""What a decoder's graph goes through besides the linear layers: norms, packed attention, constants."""

import numpy as np
import onnx.parser
import onnx_ir as ir
import onnxruntime
import pytest

from qbb_export.passes.fold_weights import FoldWeights
from qbb_export.passes.pack_attention import PackAttention
from qbb_export.passes.standard_norms import StandardNorms


def model_of(text: str, **arrays: np.ndarray) -> ir.Model:
    proto = onnx.parser.parse_model(text)
    for name, array in arrays.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return ir.from_proto(proto)


def run(model: ir.Model, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    data = ir.to_proto(model).SerializeToString()
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"]).run(None, feeds)


def test_norms():
    """The same bits under the name that ONNX knows."""
    text = """<ir_version: 10, opset_import: ["": 21]>
      g (float[b, 24] x) => (float[b, 24] y) {
        y = SimplifiedLayerNormalization <axis = -1, epsilon = 0.01, stash_type = 1> (x, w) }"""
    rng = np.random.default_rng(1)
    model = model_of(text, w=rng.standard_normal(24).astype(np.float32))
    feeds = {"x": rng.standard_normal((3, 24)).astype(np.float32)}
    before = run(model, feeds)
    assert StandardNorms()(model).modified
    assert [node.op_type for node in model.graph] == ["RMSNormalization"]
    assert model.opset_imports[""] == 23
    assert np.array_equal(run(model, feeds)[0], before[0])
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    assert not StandardNorms()(model).modified


def test_models_without_such_norms_keep_their_opset():
    model = model_of('<ir_version: 8, opset_import: ["": 17]> g (float[2] x) => (float[2] y) { y = Relu (x) }')
    assert not StandardNorms()(model).modified
    assert model.opset_imports[""] == 17


ATTENTION = """<ir_version: 10, opset_import: ["": 21, "com.microsoft": 1]>
  g (float[1, s, 64] x, float[1, 1, p, 16] pk, float[1, 1, p, 16] pv, int32[1] last, int32 total)
    => (float[1, s, 32] y, float[1, 1, t, 16] k2, float[1, 1, t, 16] v2) {
    q, k, v = Split <axis = -1> (x, sizes)
    y, k2, v2 = com.microsoft.GroupQueryAttention <num_heads = 2, kv_num_heads = 1> (INPUTS, pk, pv, last, total) }"""


def attention(inputs: str, sizes: tuple[int, ...] = (32, 16, 16)) -> ir.Model:
    return model_of(ATTENTION.replace("INPUTS", inputs), sizes=np.array(sizes, np.int64))


def test_packed_attention():
    rng = np.random.default_rng(2)
    feeds = {
        "x": rng.standard_normal((1, 5, 64)).astype(np.float32),
        "pk": np.zeros((1, 1, 0, 16), np.float32),
        "pv": np.zeros((1, 1, 0, 16), np.float32),
        "last": np.array([4], np.int32),
        "total": np.array(5, np.int32),
    }
    model = attention("q, k, v")
    before = run(model, feeds)
    assert PackAttention()(model).modified
    assert [node.op_type for node in model.graph] == ["GroupQueryAttention"]
    for a, b in zip(run(model, feeds), before, strict=True):
        assert np.array_equal(a, b)
    assert not PackAttention()(model).modified


@pytest.mark.parametrize("inputs", ["q, v, k", "q, k, k", "x, k, v"])
def test_attention_in_another_order_is_left_alone(inputs):
    assert not PackAttention()(attention(inputs)).modified


def test_a_split_that_others_read_is_left_alone():
    text = (
        ATTENTION.replace("INPUTS", "q, k, v")
        .replace(") {", ", float[1, s, 16] r) {")
        .replace("total) }", "total) r = Relu (k) }")
    )
    assert not PackAttention()(model_of(text, sizes=np.array([32, 16, 16], np.int64))).modified


def fold(body: str, w: np.ndarray, outputs: str = "float16[b, n] y") -> ir.Model:
    text = f'<ir_version: 8, opset_import: ["": 17]> g (float16[b, 6] x) => ({outputs}) {{ {body} }}'
    return model_of(text, w=w)


def test_constants_are_stored_as_they_are_read():
    w = np.random.default_rng(3).standard_normal((4, 6)).astype(np.float32)
    model = fold("t = Transpose <perm = [1, 0]> (w) h = Cast <to = 10> (t) y = MatMul (x, h)", w)
    feeds = {"x": np.ones((2, 6), np.float16)}
    before = run(model, feeds)
    assert FoldWeights()(model).modified
    assert [node.op_type for node in model.graph] == ["MatMul"]
    assert np.array_equal(model.graph.initializers["w"].const_value.numpy(), w.T.astype(np.float16))
    assert np.array_equal(run(model, feeds)[0], before[0])
    assert not FoldWeights()(model).modified


def test_a_constant_that_is_read_two_ways_is_stored_once():
    """A head that is also the embedding: one type, two orders."""
    w = np.random.default_rng(3).standard_normal((6, 6)).astype(np.float32)
    body = "h = Cast <to = 10> (w) t = Transpose (h) a = MatMul (x, t) b = MatMul (x, h) y = Add (a, b)"
    model = fold(body, w)
    feeds = {"x": np.ones((2, 6), np.float16)}
    before = run(model, feeds)
    assert FoldWeights()(model).modified
    assert [node.op_type for node in model.graph] == ["Transpose", "MatMul", "MatMul", "Add"]
    assert model.graph.initializers["w"].const_value.dtype == ir.DataType.FLOAT16
    assert np.array_equal(run(model, feeds)[0], before[0])


def test_a_constant_that_is_an_output_is_left_alone():
    w = np.ones((6, 6), np.float32)
    assert not FoldWeights()(
        fold("h = Cast <to = 10> (w) y = MatMul (x, h)", w, "float16[b, n] y, float16[6, 6] h")
    ).modified
