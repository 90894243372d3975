"""The custom op in real ONNX Runtime sessions."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from qbb_export import format as fmt
from qbb_export.custom_ops import library_path
from tests.kernels import abi
from tests.kernels.layers import Layer, make_initializers, make_layer, make_node, make_node_model


def open_session(model: onnx.ModelProto, threads: int = 1, *, library: bool = True) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # refusals are expected here
    if library:
        options.register_custom_ops_library(str(library_path()))
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(session: ort.InferenceSession, x: np.ndarray) -> np.ndarray:
    return session.run(None, {"X": x})[0]


def integers(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    return rng.integers(-8, 9, shape).astype(dtype)


@pytest.mark.parametrize("x_dtype", [np.float32, np.float16])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("layout", fmt.LAYOUTS)
@pytest.mark.parametrize("K,N,group_size", [(100, 20, 32), (33, 1, 33), (256, 48, 128), (1, 17, 1)])
def test_exact(K: int, N: int, group_size: int, layout: int, dtype: type, x_dtype: type) -> None:
    rng = np.random.default_rng([K, layout])
    for offset, bias in ((True, True), (False, False)):
        options = {"layout": layout, "dtype": dtype, "offset": offset, "bias": bias}
        layer = make_layer(rng, K, N, 3, group_size, powers_of_two=True, **options)
        x = integers(rng, (5, K), x_dtype)
        got = run(open_session(make_node_model(layer, dtype=x_dtype)), x)
        np.testing.assert_array_equal(got, layer.exact(x).astype(x_dtype), strict=True)


@pytest.mark.parametrize("x_dtype", [np.float32, np.float16])
@pytest.mark.parametrize("shape", [(), (3,), (0,), (2, 3), (2, 0), (2, 1, 3), (0, 2, 2)], ids=str)
def test_ranks_and_empty_inputs(shape: tuple[int, ...], x_dtype: type) -> None:
    rng = np.random.default_rng(1)
    layer = make_layer(rng, 70, 19, 2, 32, powers_of_two=True)
    x = integers(rng, (*shape, 70), x_dtype)
    for dims in (shape, tuple(f"d{i}" for i in range(len(shape)))):
        got = run(open_session(make_node_model(layer, dtype=x_dtype, dims=dims)), x)
        np.testing.assert_array_equal(got, layer.exact(x).astype(x_dtype), strict=True)


def test_shapes_are_inferred_and_names_of_dimensions_kept() -> None:
    """The model leaves the type of Y open; the session must find [batch, tokens, N]."""
    layer = make_layer(np.random.default_rng(1), 70, 19, 2, 32)
    model = make_node_model(layer, dims=("batch", "tokens"))
    model.graph.output[0].type.Clear()
    output = open_session(model).get_outputs()[0]
    assert (output.shape, output.type) == (["batch", "tokens", 19], "tensor(float)")
    # Where nothing is known of X, nothing is claimed of Y, and the model runs.
    model.graph.input[0].type.tensor_type.ClearField("shape")
    x = np.ones((2, 3, 70), np.float32)
    assert run(open_session(model), x).shape == (2, 3, 19)


def test_nodes_in_a_row_with_different_types() -> None:
    """Scales of both types and activations of both types in one session: each node finds its own kernel."""
    rng = np.random.default_rng(2)
    first = make_layer(rng, 40, 64, 1, dtype=np.float16, powers_of_two=True, offset=False, bias=False)
    second = make_layer(rng, 64, 8, 1, 32, dtype=np.float32, powers_of_two=True, offset=False, bias=False)
    nodes = [
        make_node(first, "X", "H", "a"),
        helper.make_node("Cast", ["H"], ["H16"], to=TensorProto.FLOAT16),
        make_node(second, "H16", "Y16", "b", name="second"),
        helper.make_node("Cast", ["Y16"], ["Y"], to=TensorProto.FLOAT),
    ]
    model = make_node_model(first, initializers=[*make_initializers(first, "a"), *make_initializers(second, "b")])
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 8
    x = rng.integers(-1, 2, (4, 40)).astype(np.float32)
    hidden = first.exact(x).astype(np.float16)
    want = second.exact(hidden).astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(run(open_session(model), x), want, strict=True)


def test_large_m() -> None:
    rng = np.random.default_rng(3)
    layer = make_layer(rng, 96, 40, 2, 32, powers_of_two=True)
    x = integers(rng, (3001, 96), np.float32)
    want = layer.exact(x).astype(np.float32)
    np.testing.assert_array_equal(run(open_session(make_node_model(layer), 2), x), want, strict=True)


@pytest.mark.parametrize("M", [1, 7, 70])
def test_same_bytes_for_any_number_of_threads(M: int) -> None:
    rng = np.random.default_rng(4)
    layer = make_layer(rng, 1100, 700, 3, 128, dtype=np.float16)
    x = rng.normal(size=(M, 1100)).astype(np.float32)
    model = make_node_model(layer)
    alone = abi.Kernel(layer)(x)
    for threads in (1, 2, 4):
        session = open_session(model, threads)
        for _ in range(10):
            assert run(session, x).tobytes() == alone.tobytes(), threads


def test_many_threads_on_one_session() -> None:
    rng = np.random.default_rng(5)
    layer = make_layer(rng, 200, 300, 2, 64)
    session = open_session(make_node_model(layer), 2)
    inputs = [rng.normal(size=(m, 200)).astype(np.float32) for m in (1, 2, 3, 5, 8, 17, 33, 40)]
    alone = [run(session, x).tobytes() for x in inputs]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(10):
            assert [y.tobytes() for y in pool.map(lambda x: run(session, x), inputs)] == alone


def test_sessions_come_and_go() -> None:
    rng = np.random.default_rng(6)
    model = make_node_model(make_layer(rng, 40, 20, 1))
    x = rng.normal(size=(2, 40)).astype(np.float32)
    first = open_session(model)
    want = run(first, x).tobytes()
    for _ in range(20):
        assert run(open_session(model), x).tobytes() == want
    assert run(first, x).tobytes() == want


# --- refusals: an exception of the session that names the node and says what is wrong ---------------------------------


def refused(model: onnx.ModelProto, message: str) -> None:
    with pytest.raises(Exception, match=message) as info:
        open_session(model)
    assert "qbb::BinaryBasisMatMul 'linear'" in str(info.value)


def base() -> Layer:
    return make_layer(np.random.default_rng(7), 100, 20, 2, 32)


BAD_ATTRIBUTES: list[tuple[str, int, str]] = [
    ("format", 2, "unknown format version .*; expected 1; got 2"),
    ("layout", 2, "unknown layout; expected 0 or 1; got 2"),
    ("bases", 9, "bad number of bases; expected 1..8; got 9"),
    ("bases", 3, re.escape("wrong shape of B (planes); expected [3, 2, 4, 16]; got [2, 2, 4, 16]")),
    ("group_size", 33, "bad group_size; .*got 33"),
    ("K", -1, "empty matrix"),
    ("N", 2**62, "matrix too large|wrong shape"),
]


@pytest.mark.parametrize("name,value,message", BAD_ATTRIBUTES)
def test_bad_attribute(name: str, value: int, message: str) -> None:
    model = make_node_model(base())
    next(a for a in model.graph.node[0].attribute if a.name == name).i = value
    refused(model, message)


@pytest.mark.parametrize("name", ["K", "N", "bases", "group_size", "layout", "format"])
def test_missing_attribute(name: str) -> None:
    model = make_node_model(base())
    kept = [a for a in model.graph.node[0].attribute if a.name != name]
    del model.graph.node[0].attribute[:]
    model.graph.node[0].attribute.extend(kept)
    refused(model, f"missing attribute {name}; expected an integer; got none")


def test_attribute_of_another_type() -> None:
    model = make_node_model(base())
    attribute = next(a for a in model.graph.node[0].attribute if a.name == "bases")
    attribute.CopyFrom(helper.make_attribute("bases", 2.0))
    refused(model, "missing attribute bases; expected an integer")


BAD_SHAPES: list[tuple[str, Callable[[np.ndarray], np.ndarray], str]] = [
    ("B", lambda a: a[:1], "wrong shape of B (planes); expected [2, 2, 4, 16]; got [1, 2, 4, 16]"),
    ("B", lambda a: a.reshape(-1), "wrong shape of B (planes); expected [2, 2, 4, 16]; got [256]"),
    ("S", lambda a: a[..., :15], "wrong shape of S (scales); expected [2, 2, 4, 16]; got [2, 2, 4, 15]"),
    ("Z", lambda a: a[:1], "wrong shape of Z (offset); expected [2, 4, 16] or [1, 1]; got [1, 4, 16]"),
    ("C", lambda a: a[:19], "wrong shape of C (bias); expected [20] or [1]; got [19]"),
    ("C", lambda a: a[:0], "wrong shape of C (bias); expected [20] or [1]; got [0]"),
]


@pytest.mark.parametrize("name,change,message", BAD_SHAPES, ids=[f"{n}{i}" for i, (n, _, _) in enumerate(BAD_SHAPES)])
def test_bad_shape(name: str, change: Callable[[np.ndarray], np.ndarray], message: str) -> None:
    layer = base()
    initializers = make_initializers(layer)
    at = "BSZC".index(name)
    initializers[at] = numpy_helper.from_array(
        np.ascontiguousarray(change(numpy_helper.to_array(initializers[at]))), name
    )
    refused(make_node_model(layer, initializers=initializers), re.escape(message))


@pytest.mark.parametrize("name", list("BSZC"))
def test_weights_must_be_constant(name: str) -> None:
    """As an input of the graph, and as an initializer that an input of the same name may replace."""
    layer = base()
    initializers = make_initializers(layer)
    at = "BSZC".index(name)
    chosen = initializers[at]
    value = helper.make_tensor_value_info(name, chosen.data_type, chosen.dims)
    for kept in (initializers, initializers[:at] + initializers[at + 1 :]):
        model = make_node_model(layer, initializers=kept, graph_inputs=[value])
        refused(model, rf"input {name} \(.*\) is not constant; expected an initializer")


def test_wrong_types_are_refused() -> None:
    """ONNX Runtime finds no kernel for these, and says so itself."""
    layer = base()
    for at, dtype in ((0, np.int32), (1, np.float64), (2, np.float16), (3, np.float16)):
        initializers = make_initializers(layer)
        array = numpy_helper.to_array(initializers[at]).astype(dtype)
        initializers[at] = numpy_helper.from_array(array, "BSZC"[at])
        with pytest.raises(Exception, match="BinaryBasisMatMul"):
            open_session(make_node_model(layer, initializers=initializers))


def test_wrong_number_of_inputs() -> None:
    model = make_node_model(base())
    del model.graph.node[0].input[4]
    with pytest.raises(Exception, match="BinaryBasisMatMul"):
        open_session(model)


@pytest.mark.parametrize("dims,shape", [(("M",), (3, 99)), (("M",), (3, 101)), ((), (0,))])
def test_wrong_last_dimension_at_run_time(dims: tuple[str, ...], shape: tuple[int, ...]) -> None:
    """The graph does not say how long X is, so only the kernel can notice."""
    model = make_node_model(base(), dims=dims)
    model.graph.input[0].type.tensor_type.shape.dim[-1].dim_param = "anything"
    session = open_session(model)
    message = f"node qbb::BinaryBasisMatMul 'linear': wrong shape of X; expected [..., 100]; got {list(shape)}"
    with pytest.raises(Exception, match=re.escape(message)):
        run(session, np.ones(shape, np.float32))


def test_scalar_x_is_refused() -> None:
    model = make_node_model(base())
    model.graph.input[0].type.tensor_type.ClearField("shape")
    session = open_session(model)
    with pytest.raises(Exception, match=r"wrong shape of X; expected \[..., 100\]; got \[\]"):
        run(session, np.ones((), np.float32))


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    monkeypatch.delenv("QBB_ISA", raising=False)
    yield monkeypatch


def test_forced_isa(environment: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(8)
    model = make_node_model(base())
    x = rng.normal(size=(3, 100)).astype(np.float32)
    want = run(open_session(model), x).tobytes()
    for isa in abi.isas():
        environment.setenv("QBB_ISA", isa)
        assert run(open_session(model), x).tobytes() == want
    environment.setenv("QBB_ISA", "mmx")
    refused(model, "unknown instruction set named by QBB_ISA; expected one of .*scalar; got mmx")


def test_kernel_wins_over_a_function_of_the_same_name() -> None:
    """A body that gives -1 shows which of the two ran."""
    layer = base()
    body = [
        helper.make_node("ReduceSum", ["X"], ["sum"], keepdims=1),
        helper.make_node("Mul", ["sum", "zero"], ["nothing"]),
        helper.make_node("Sub", ["nothing", "one"], ["Y"]),
    ]
    constants = [
        helper.make_node("Constant", [], ["zero"], value_float=0.0),
        helper.make_node("Constant", [], ["one"], value_float=1.0),
    ]
    names = ["K", "N", "bases", "group_size", "layout", "format"]
    opsets = [helper.make_opsetid("", 20)]
    function = helper.make_function(
        fmt.DOMAIN, fmt.OP_TYPE, ["X", "B", "S", "Z", "C"], ["Y"], [*constants, *body], opsets, attributes=names
    )
    model = make_node_model(layer, functions=[function])
    del model.graph.output[0].type.tensor_type.shape.dim[:]
    x = np.random.default_rng(9).normal(size=(3, 100)).astype(np.float32)
    assert np.all(run(open_session(model, library=False), x) == -1)
    assert run(open_session(model), x).tobytes() == abi.Kernel(layer)(x).tobytes()
