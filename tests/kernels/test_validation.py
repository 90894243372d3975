"""What the C interface refuses: each check has a test that dies without it."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from qbb_export import format as fmt
from tests.kernels import abi
from tests.kernels.layers import Layer, make_layer

ATTRIBUTES = [
    ({"format": 2}, r"unknown format version .*; expected 1; got 2"),
    ({"format": 0}, r"unknown format version .*; expected 1; got 0"),
    ({"layout": 2}, r"unknown layout; expected 0 or 1; got 2"),
    ({"layout": -1}, r"unknown layout; .*got -1"),
    ({"K": 0}, r"empty matrix; .*got K=0, N=20"),
    ({"K": -100}, r"empty matrix"),
    ({"N": 0}, r"empty matrix; .*got K=100, N=0"),
    ({"bases": 0}, r"bad number of bases; expected 1\.\.8; got 0"),
    ({"bases": 9}, r"bad number of bases; .*got 9"),
    ({"group_size": 0}, r"bad group_size; expected K \(100\) or a multiple of 32 below it; got 0"),
    ({"group_size": -32}, r"bad group_size"),
    ({"group_size": 48}, r"bad group_size"),
    ({"group_size": 128}, r"bad group_size; .*got 128"),
    ({"N": 2**62}, r"matrix too large; .*N=4611686018427387904"),
    ({"K": 2**62, "group_size": 2**62}, r"matrix too large"),
    ({"K": 129}, r"wrong shape of B \(planes\); expected \[2, 2, 5, 16\]; got \[2, 2, 4, 16\]"),
    ({"N": 37}, r"wrong shape of B \(planes\); expected \[2, 3, 4, 16\]; got \[2, 2, 4, 16\]"),
    ({"bases": 3}, r"wrong shape of B \(planes\)"),
    ({"group_size": 64}, r"wrong shape of S \(scales\); expected \[2, 2, 2, 16\]; got \[2, 2, 4, 16\]"),
    ({"layout": 0}, r"wrong shape of B \(planes\); expected \[2, 20, 4\]"),
    ({"N": 21}, r"wrong shape of C \(bias\); expected \[21\] or \[1\]; got \[20\]"),
]


def small() -> Layer:
    return make_layer(np.random.default_rng(0), 100, 20, 2, 32)


def create(matrix: abi.Matrix, isa: bytes | None = None) -> ctypes.c_void_p:
    handle = ctypes.c_void_p(1)
    try:
        abi.call(abi.library().qbb_kernel_create, ctypes.byref(matrix), 0, isa, ctypes.byref(handle))
    except abi.Failed:
        assert not handle, "a failed creation must leave NULL"
        raise
    return handle


@pytest.mark.parametrize("changes,message", ATTRIBUTES, ids=lambda v: str(v) if isinstance(v, dict) else "")
def test_bad_attributes(changes: dict[str, int], message: str) -> None:
    matrix = abi.matrix(small(), **changes)
    for action in (create, lambda m: abi.call(abi.library().qbb_matrix_validate, ctypes.byref(m))):
        with pytest.raises(abi.Failed, match=message) as info:
            action(matrix)
        assert info.value.status == abi.INVALID


def set_field(tensor: str, field: str, value: object) -> Callable[[abi.Matrix], None]:
    def change(matrix: abi.Matrix) -> None:
        setattr(getattr(matrix, tensor), field, value)

    return change


TENSORS = [
    (set_field("planes", "dtype", 6), r"wrong type of B \(planes\); expected uint32; got ONNX type 6"),
    (set_field("scales", "dtype", 11), r"wrong type of S \(scales\); expected float16 or float32; got ONNX type 11"),
    (set_field("offset", "dtype", 10), r"wrong type of Z \(offset\); expected float32; got float16"),
    (set_field("bias", "dtype", 10), r"wrong type of C \(bias\); expected float32; got float16"),
    (set_field("planes", "rank", 3), r"wrong shape of B \(planes\).*got \[2, 2, 4\]"),
    (set_field("scales", "rank", 0), r"wrong shape of S \(scales\).*got \[\]"),
    (set_field("offset", "rank", 2), r"wrong shape of Z \(offset\); expected \[2, 4, 16\] or \[1, 1\]; got \[2, 4\]"),
    (set_field("bias", "rank", -1), r"bad shape of C \(bias\)"),
    (set_field("bias", "dims", None), r"bad shape of C \(bias\)"),
    (set_field("planes", "data", None), r"no data of B \(planes\)"),
    (set_field("scales", "data", None), r"no data of S \(scales\)"),
    (set_field("offset", "data", None), r"no data of Z \(offset\)"),
    (set_field("bias", "data", None), r"no data of C \(bias\)"),
]


@pytest.mark.parametrize("change,message", TENSORS, ids=[str(i) for i in range(len(TENSORS))])
def test_bad_tensors(change: Callable[[abi.Matrix], None], message: str) -> None:
    matrix = abi.matrix(small())
    change(matrix)
    with pytest.raises(abi.Failed, match=message):
        create(matrix)


def test_good_matrix_validates() -> None:
    abi.call(abi.library().qbb_matrix_validate, ctypes.byref(abi.matrix(small())))


@pytest.mark.parametrize("isa", ["sse9", "AVX2", "scalar "])
def test_unknown_isa(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(abi.Failed, match=f"unknown instruction set named by isa; .*scalar; got {isa}$") as info:
        abi.Kernel(small(), isa)
    assert info.value.status == abi.UNSUPPORTED
    monkeypatch.setenv("QBB_ISA", isa)
    with pytest.raises(abi.Failed, match=f"unknown instruction set named by QBB_ISA; .*got {isa}$"):
        abi.Kernel(small())


def test_a_message_is_one_line_whatever_it_quotes() -> None:
    with pytest.raises(abi.Failed, match=r"got two  lines$"):
        abi.Kernel(small(), "two\r\nlines")


def test_isa_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for isa in abi.isas():
        monkeypatch.setenv("QBB_ISA", isa)
        assert abi.Kernel(small()).isa == isa
    for unset in ("", None):
        monkeypatch.delenv("QBB_ISA") if unset is None else monkeypatch.setenv("QBB_ISA", unset)
        assert abi.Kernel(small()).isa == abi.isas()[0]


def run(x_dtype: int, M: int, x: object, y: object) -> None:
    kernel = abi.Kernel(small())
    abi.call(abi.library().qbb_kernel_run, kernel.handle, x_dtype, M, x, y, None, None)


def test_run_checks() -> None:
    x, y = np.zeros((1, 100), np.float32), np.zeros((1, 20), np.float32)
    with pytest.raises(abi.Failed, match=r"wrong type of X; expected float32 \(1\) or float16 \(10\); got 11"):
        run(11, 1, x.ctypes.data, y.ctypes.data)
    with pytest.raises(abi.Failed, match=r"bad number of rows of X; expected M >= 0; got -1"):
        run(1, -1, x.ctypes.data, y.ctypes.data)
    with pytest.raises(abi.Failed, match=r"too many rows of X"):
        run(1, 2**60, x.ctypes.data, y.ctypes.data)
    with pytest.raises(abi.Failed, match=r"missing argument x"):
        run(1, 1, None, y.ctypes.data)
    with pytest.raises(abi.Failed, match=r"missing argument y"):
        run(1, 1, x.ctypes.data, None)
    run(1, 0, None, None)  # no rows, nothing to read


def test_missing_arguments() -> None:
    lib = abi.library()
    handle = ctypes.c_void_p()
    with pytest.raises(abi.Failed, match="missing argument matrix"):
        abi.call(lib.qbb_matrix_validate, None)
    with pytest.raises(abi.Failed, match="missing argument matrix"):
        abi.call(lib.qbb_kernel_create, None, 0, None, ctypes.byref(handle))
    with pytest.raises(abi.Failed, match="missing argument kernel"):
        abi.call(lib.qbb_kernel_create, ctypes.byref(abi.matrix(small())), 0, None, None)
    with pytest.raises(abi.Failed, match="missing argument kernel"):
        abi.call(lib.qbb_kernel_run, None, 1, 0, None, None, None, None)
    lib.qbb_kernel_destroy(None)


def test_messages_are_cut_and_terminated() -> None:
    matrix = abi.matrix(small(), format=7)
    buffer = ctypes.create_string_buffer(b"x" * 20)
    lib = abi.library()
    assert lib.qbb_matrix_validate(ctypes.byref(matrix), buffer, 10) == abi.INVALID
    assert buffer.raw[:11] == b"unknown f\0x"
    assert lib.qbb_matrix_validate(ctypes.byref(matrix), None, 0) == abi.INVALID
    assert lib.qbb_matrix_validate(ctypes.byref(matrix), buffer, 0) == abi.INVALID
    assert buffer.raw[:11] == b"unknown f\0x"


def test_cpp_and_python_agree_on_what_is_legal() -> None:
    """format.Spec and core/spec.cc are written twice, so they are compared."""
    rng = np.random.default_rng(5)
    seen = set()
    for _ in range(3000):
        K, N = (int(v) for v in rng.integers(0, 200, 2))
        bases, layout, version = int(rng.integers(0, 10)), int(rng.integers(-1, 3)), int(rng.choice([1, 1, 1, 0, 2]))
        group_size = int(rng.choice([K, 0, 32, 64, 96, 33, -32, K + 32]))
        try:
            fmt.Spec(K, N, bases, group_size, layout, version)
            legal = True
        except fmt.QbbError:
            legal = False
        # All shapes are wrong, so the first complaint of a legal one is about a shape.
        matrix = abi.matrix(small(), K=K, N=N, bases=bases, group_size=group_size, layout=layout, format=version)
        matrix.planes.rank = 1
        with pytest.raises(abi.Failed) as info:
            create(matrix)
        assert bool(re.match(r"wrong shape of B", str(info.value))) == legal, str(info.value)
        seen.add(legal)
    assert seen == {True, False}


def at_odd_address(array: np.ndarray) -> np.ndarray:
    """The same values one byte off."""
    memory = np.zeros(array.nbytes + 1, np.uint8)
    memory[1:] = np.frombuffer(array.tobytes(), np.uint8)
    return memory[1:].view(array.dtype).reshape(array.shape)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("layout", fmt.LAYOUTS)
def test_weights_and_inputs_at_any_address(layout: int, dtype: type) -> None:
    layer = make_layer(np.random.default_rng(1), 100, 20, 2, 32, layout=layout, dtype=dtype, powers_of_two=True)
    moved = replace(
        layer, **{name: at_odd_address(getattr(layer, name)) for name in ("planes", "scales", "offset", "bias")}
    )
    for x_dtype in (np.float32, np.float16):
        x = np.random.default_rng(2).integers(-8, 9, (3, 100)).astype(x_dtype)
        for isa in abi.isas():
            got = abi.Kernel(moved, isa)(at_odd_address(x))
            np.testing.assert_array_equal(got, layer.exact(x).astype(x_dtype), strict=True)


@pytest.mark.parametrize("layout", fmt.LAYOUTS)
@pytest.mark.parametrize("offset,bias", [(0.0, 0.0), (0.5, 0.0), (0.0, -1.5)])
def test_one_offset_and_one_bias_for_all(layout: int, offset: float, bias: float) -> None:
    layer = make_layer(np.random.default_rng(1), 100, 20, 2, 32, layout=layout, powers_of_two=True)
    layer = replace(layer, offset=np.full((1, 1), offset, np.float32), bias=np.full(1, bias, np.float32))
    x = np.random.default_rng(2).integers(-8, 9, (3, 100)).astype(np.float32)
    np.testing.assert_array_equal(abi.Kernel(layer)(x), layer.exact(x).astype(np.float32), strict=True)


def test_two_megabytes_are_repacked_on_huge_pages() -> None:
    layer = make_layer(np.random.default_rng(1), 4096, 2100, 2, 4096, layout=fmt.LAYOUT_ROWS, powers_of_two=True)
    x = np.random.default_rng(2).integers(-1, 2, (1, 4096)).astype(np.float32)
    np.testing.assert_array_equal(abi.Kernel(layer)(x), layer.exact(x).astype(np.float32), strict=True)
