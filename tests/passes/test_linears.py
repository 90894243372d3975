import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qbb_export.passes.linears import find_linears
from qbb_export.passes.prepare import prepare_passes
from tests.passes.graphs import graph

W = np.ones((4, 3), np.float32)


def found(text, weights=None, **kwargs):
    model = graph(text, {"w": W} if weights is None else weights, **kwargs)
    prepare_passes()(model)
    linears, rejected = find_linears(model)
    return [(x.name, x.transposed, x.in_features, x.out_features) for x in linears], [r.reason[:6] for r in rejected]


@pytest.mark.parametrize(
    ("body", "weight", "transposed"),
    [
        ("y = MatMul (x, w)", W, False),
        ("t = Transpose <perm = [1, 0]> (w) y = MatMul (x, t)", W.T, True),
        ("t = Transpose (w) y = MatMul (x, t)", W.T, True),
        ("t = Transpose <perm = [0, 1]> (w) y = MatMul (x, t)", W, False),
        ("t = Transpose (w) u = Identity (t) v = Transpose (u) y = MatMul (x, v)", W, False),
        ("t = Cast <to = 1> (w) y = MatMul (x, t)", W.astype(np.float16), False),
        ("t = Cast <to = 1> (w) u = Transpose (t) y = MatMul (x, u)", W.T.astype(np.float64), True),
        ("y = Gemm (x, w)", W, False),
        ("y = Gemm <transB = 1> (x, w)", W.T, True),
        ("t = Transpose (w) y = Gemm <transB = 1> (x, t)", W, False),
    ],
)
def test_forms_of_a_weight(body, weight, transposed):
    text = f"g (float[2, 4] x) => (float[2, 3] y) {{ {body} }}"
    assert found(text, {"w": weight}) == ([("w", transposed, 4, 3)], [])


@pytest.mark.parametrize(
    ("text", "weights", "reason"),
    [
        ("g (float[2, 4] x, float[4, 3] w) => (float[2, 3] y) { y = MatMul (x, w) }", None, "rule 4"),
        (
            "g (float[5, 2, 4] x) => (float[5, 2, 3] y) { y = MatMul (x, w) }",
            {"w": np.ones((5, 4, 3), np.float32)},
            "rule 3",
        ),
        ("g (double[2, 4] x) => (double[2, 3] y) { y = MatMul (x, w) }", {"w": W.astype(np.float64)}, "rule 5"),
        ("g (int32[2, 4] x) => (int32[2, 3] y) { y = MatMul (x, w) }", {"w": W.astype(np.int32)}, "rule 3"),
        ("g (float[2, 4] x) => (float[2, 0] y) { y = MatMul (x, w) }", {"w": np.ones((4, 0), np.float32)}, "rule 3"),
    ],
)
def test_rejected_with_the_rule_that_failed(text, weights, reason):
    assert found(text, weights) == ([], [reason])


@pytest.mark.parametrize(
    "text",
    [
        "g (float[4, 4] x) => (float[4, 4] y) { y = MatMul (x, x) }",  # not constant
        "g (float[3, 5] x) => (float[4, 5] y) { y = MatMul (w, x) }",  # constant on the left
        "g (float[2, 4] x) => (float[2, 3] y) { r = Relu (w) y = MatMul (x, r) }",
    ],
)
def test_no_linear_layer(text):
    assert found(text) == ([], [])


def test_names_come_from_the_module_where_the_exporter_kept_them():
    for name, expected in [("layers.0.fc.weight", "layers.0.fc"), ("onnx::MatMul_12", "n"), ("val_7", "n"), ("w", "w")]:
        model = graph("g (float[2, 4] x) => (float[2, 3] y) { [n] y = MatMul (x, w) }", {"w": W})
        model.graph.initializers["w"].name = name
        assert [x.name for x in find_linears(model)[0]] == [expected]


def test_a_weight_with_two_users_is_found_twice_under_one_name():
    names, _ = found("g (float[2, 4] x) => (float[2, 3] y) { a = MatMul (x, w) b = MatMul (x, w) y = Add (a, b) }")
    assert [n[0] for n in names] == ["w", "w"]


def test_constants_and_functions_are_seen_through():
    values = ", ".join(["1"] * 64)
    constant = f"c = Constant <value = float[8, 8] {{{values}}}> ()"
    text = f"g (float[2, 8] x) => (float[2, 8] y) {{ {constant} y = MatMul (x, c) }}"
    assert found(text, {})[0] == [("c", False, 8, 8)]
    text = """g (float[2, 4] x) => (float[2, 3] y) { y = d.linear (x, w) }
      <domain: "d", opset_import: ["": 20]> linear (a, b) => (c) { c = MatMul (a, b) }"""
    header = '<ir_version: 10, opset_import: ["": 20, "d": 1]>'
    proto = onnx.parser.parse_model(f"{header} {text}")
    proto.graph.initializer.append(onnx.numpy_helper.from_array(W, "w"))
    model = ir.from_proto(proto)
    assert find_linears(model)[0] == []
    prepare_passes()(model)
    assert [x.name for x in find_linears(model)[0]] == ["w"]
