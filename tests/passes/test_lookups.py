"""Rows of a packed table, in ONNX Runtime, against the dense table of the float64 reference, to the bit."""

import numpy as np
import onnx.checker
import onnx_ir as ir
import pytest

from qbb_export.errors import QbbError
from qbb_export.format import LAYOUT_ROWS, LAYOUT_TILED
from qbb_export.passes.binarize import BinarizeLinears
from qbb_export.passes.function_body import AttachFunctionBody
from qbb_export.passes.fuse import FuseLinears
from qbb_export.passes.linears import find_linears
from qbb_export.passes.lookups import BinarizeLookups, find_lookups
from qbb_export.passes.normalize import NormalizeLinears
from tests.passes.graphs import exact_layer, graph, integers, run

RNG = np.random.default_rng(5)
IDS = np.array([[0, 15, 16], [36, 7, 36]])


def table_graph(k: int = 24, kind: str = "float", opset: int = 20, index: str = "int64") -> ir.Model:
    text = f"g ({index}[b, s] ids) => ({kind}[b, s, {k}] y) {{ y = Gather (w, ids) }}"
    return graph(text, {"w": integers(RNG, 37, k, dtype={"float": np.float32, "float16": np.float16}[kind])}, opset)


@pytest.mark.parametrize("layout", [LAYOUT_TILED, LAYOUT_ROWS])
@pytest.mark.parametrize("offset", [True, False])
@pytest.mark.parametrize(("k", "group_size"), [(24, 0), (64, 32), (70, 32), (33, 0), (100, 96)])
def test_rows(layout, offset, k, group_size):
    model = table_graph(k)
    (lookup,) = find_lookups(model)
    assert (lookup.name, lookup.out_features, lookup.in_features) == ("w", 37, k)
    packed, dense = exact_layer(lookup, bases=3, group_size=group_size, offset=offset, layout=layout)
    assert BinarizeLookups({"w": packed})(model).modified
    assert "w" not in model.graph.initializers
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    (y,) = run(model, {"ids": IDS})
    assert np.array_equal(y, dense[IDS])
    for odd in (np.zeros((0, 3), np.int64), IDS[:1, :1]):
        assert np.array_equal(run(model, {"ids": odd})[0], dense[odd])
    assert not BinarizeLookups({"w": packed})(model).modified


@pytest.mark.parametrize(("kind", "opset", "index"), [("float16", 20, "int64"), ("float", 13, "int32")])
def test_types(kind, opset, index):
    model = table_graph(kind=kind, opset=opset, index=index)
    (lookup,) = find_lookups(model)
    packed, dense = exact_layer(lookup)
    BinarizeLookups({"w": packed})(model)
    (y,) = run(model, {"ids": IDS.astype(index)})
    assert y.dtype == {"float": np.float32, "float16": np.float16}[kind]
    assert np.array_equal(y, dense[IDS])


def test_a_table_that_is_also_a_layer_is_stored_once():
    text = """g (int64[b, s] ids) => (float[b, s, 37] y) {
      e = Gather (w, ids) t = Transpose <perm = [1, 0]> (w) y = MatMul (e, t) }"""
    model = graph(text, {"w": integers(RNG, 37, 24)})
    linears, lookups = find_linears(model)[0], find_lookups(model)
    assert [linears[0].name, lookups[0].name] == ["w", "w"]
    packed, dense = exact_layer(linears[0])
    NormalizeLinears(linears)(model)
    BinarizeLinears({"w": packed})(model)
    BinarizeLookups({"w": packed})(model)
    FuseLinears()(model)
    AttachFunctionBody()(model)
    assert sorted(model.graph.initializers) == [
        "qbb_no_bias",
        *(f"w.qbb_{n}" for n in ("group_of_input", "offset", "planes", "scales")),
    ]
    (y,) = run(model, {"ids": IDS})
    assert np.array_equal(y, dense[IDS] @ dense.T)


@pytest.mark.parametrize(
    "body",
    [
        "y = Gather <axis = 1> (w, ids)",
        "t = Transpose (w) y = Gather (t, ids)",
        "i = Constant <value = int64[2, 2] {0, 1, 2, 3}> () y = Gather (w, i)",
        "r = Relu (w) y = Gather (r, ids)",
    ],
)
def test_what_is_no_table(body):
    model = graph(f"g (int64[b, s] ids) => (float[b, s, k] y) {{ {body} }}", {"w": integers(RNG, 37, 24)})
    assert find_lookups(model) == []


def test_an_old_opset_is_refused():
    model = table_graph(opset=12)
    packed, _ = exact_layer(find_lookups(model)[0])
    with pytest.raises(QbbError, match="opset is too old"):
        BinarizeLookups({"w": packed})(model)
