"""Every instruction set against float64, over shapes; through the C interface."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from qbb_export import format as fmt
from qbb_export.custom_ops import library_info
from tests.kernels import abi
from tests.kernels.layers import Layer, group_sizes, in_layout, least_many, make_layer, many_rows, with_garbage

NS = (1, 2, 3, 31, 32, 33, 64)
MS = (1, 2, 3, 5, 8, 17)
# Around every border of 4 (a table), 32 (a word), 64 and 128; `-m slow` runs all of 1..130.
KS = (1, 2, 3, 4, 5, 8, 15, 16, 17, 20, 31, 32, 33, 36, 47, 63, 64, 65, 80, 95, 96, 97, 113, 127, 128, 129, 130)


def same_bytes(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.tobytes() == b.tobytes()


def check_exact(K: int) -> None:
    """Integer activations and power-of-two scales leave nothing to round before the output is stored."""
    rng = np.random.default_rng(K)
    x = rng.integers(-8, 9, (max(MS), K)).astype(np.float32)
    for N, bases in itertools.product(NS, range(1, fmt.MAX_BASES + 1)):
        group_size = int(rng.choice(group_sizes(K)))
        offset, bias, wide = rng.integers(0, 2, 3)
        dtype = (np.float16, np.float32)[wide]
        tiled = make_layer(
            rng, K, N, bases, group_size, dtype=dtype, offset=bool(offset), bias=bool(bias), powers_of_two=True
        )
        exact = tiled.exact(x)
        for layout, isa in itertools.product(fmt.LAYOUTS, abi.isas()):
            kernel = abi.Kernel(in_layout(tiled, layout), isa)
            assert kernel.isa == isa
            what = f"{tiled.spec} {dtype.__name__} layout {layout} {isa}"
            for M in MS:
                assert same_bytes(kernel(x[:M]) + np.float32(0), exact[:M].astype(np.float32)), f"{what} M={M}"
            half = kernel(x.astype(np.float16))
            np.testing.assert_array_equal(half, exact.astype(np.float16), err_msg=what, strict=True)


@pytest.mark.parametrize("K", KS)
def test_exact(K: int) -> None:
    check_exact(K)


@pytest.mark.slow
@pytest.mark.parametrize("K", [k for k in range(1, 131) if k not in KS])
def test_exact_all_k(K: int) -> None:
    check_exact(K)


@pytest.mark.parametrize("M", [16, 127, 128, 129, 260])
def test_exact_many_rows(M: int) -> None:
    """More rows and tiles than a task takes, rows that do not fill a register block, every number of bases."""
    rng = np.random.default_rng(M)
    x = rng.integers(-8, 9, (M, 300)).astype(np.float32)
    for bases in range(1, fmt.MAX_BASES + 1):
        layer = make_layer(rng, 300, 16 * 9 + 5, bases, 96, offset=bases % 2 == 0, powers_of_two=True)
        exact = layer.exact(x)
        for isa in abi.isas():
            np.testing.assert_array_equal(abi.Kernel(layer, isa)(x), exact.astype(np.float32), strict=True)
            half = abi.Kernel(layer, isa)(x.astype(np.float16))
            np.testing.assert_array_equal(half, exact.astype(np.float16), strict=True)


@pytest.mark.parametrize("group_size", [32, 64, 96, 160, 256, 288, 320, 1024, 2500])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_exact_long_rows(group_size: int, dtype: type) -> None:
    """More words than one block of tables holds, groups that end inside a block, a short last group and last word."""
    rng = np.random.default_rng(group_size)
    layer = make_layer(rng, 2500, 37, 3, group_size, dtype=dtype, powers_of_two=True)
    x = rng.integers(-8, 9, (11, 2500)).astype(np.float32)
    exact = layer.exact(x)
    for isa in abi.isas():
        np.testing.assert_array_equal(abi.Kernel(layer, isa)(x), exact.astype(np.float32), strict=True)


def float_cases() -> list[tuple[int, int, int, int]]:
    return [
        (1, 5, 1, 1),
        (3, 33, 8, 3),
        (31, 16, 2, 31),
        (100, 17, 4, 32),
        (130, 64, 3, 64),
        (300, 40, 5, 96),
        (1000, 50, 3, 1000),
        (4096, 600, 3, 128),
    ]


@pytest.mark.parametrize("x_dtype", [np.float32, np.float16])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("case", float_cases(), ids=str)
def test_float_within_bound_and_all_isas_equal(case: tuple[int, int, int, int], dtype: type, x_dtype: type) -> None:
    K, N, bases, group_size = case
    rng = np.random.default_rng([K, N])
    layer = make_layer(rng, K, N, bases, group_size, dtype=dtype)
    border = least_many(bases) if bases > 2 else 40
    for rows in (border - 1, border, border + 5):
        check_float(layer, rng.normal(size=(rows, K)).astype(x_dtype))


def check_float(layer: Layer, x: np.ndarray) -> None:
    exact, bound = layer.exact(x), layer.bound(x)
    results = {isa: abi.Kernel(layer, isa)(x) for isa in abi.isas()}
    for isa, y in results.items():
        slack = bound if x.dtype == np.float32 else bound + np.abs(exact) * 2.0**-11 + 2.0**-25  # Y is rounded, too
        worst = np.max(np.abs(y.astype(np.float64) - exact) / slack)
        assert worst <= 1, f"{isa}: {worst:.2f} times the bound"
        assert same_bytes(y, results["scalar"]), isa
        rows = abi.Kernel(in_layout(layer, fmt.LAYOUT_ROWS), isa)
        assert same_bytes(rows(x), y), f"{isa}: layout 0"
        # A row does not depend on the rows that it is computed with, as long as they are few or many.
        if not many_rows(layer.spec.bases, len(x)):
            assert same_bytes(np.concatenate([rows(x[i : i + 1]) for i in range(len(x))]), y), f"{isa}: row by row"
        else:
            wide = np.concatenate([x[3:], x, x, x[:3], x, x, x])  # more than one task high
            assert same_bytes(rows(wide)[-len(x) :], y), f"{isa}: among others"


def test_bound_has_teeth() -> None:
    """One wrong bit among 4096 inputs is far outside the bound, so the test above can fail."""
    rng = np.random.default_rng(1)
    layer = make_layer(rng, 4096, 16, 1, 128)
    x = rng.normal(size=(4, 4096)).astype(np.float32)
    good = abi.Kernel(layer)(x)
    layer.planes[0, 0, 3, 5] ^= 1
    assert np.max(np.abs(abi.Kernel(layer)(x) - good)[:, 5] / layer.bound(x)[:, 5]) > 1


@pytest.mark.parametrize("layout", fmt.LAYOUTS)
@pytest.mark.parametrize("K,N,group_size", [(1, 1, 1), (33, 3, 32), (97, 17, 97), (130, 33, 64)])
def test_padding_is_ignored(K: int, N: int, group_size: int, layout: int) -> None:
    rng = np.random.default_rng(K)
    for bases, dtype in itertools.product((1, 3), (np.float16, np.float32)):
        layer = make_layer(rng, K, N, bases, group_size, layout=layout, dtype=dtype)
        dirty = with_garbage(rng, layer)
        assert not np.array_equal(dirty.planes, layer.planes)
        x = rng.normal(size=(9, K)).astype(np.float32)
        for isa in abi.isas():
            assert same_bytes(abi.Kernel(dirty, isa)(x), abi.Kernel(layer, isa)(x)), isa


@pytest.mark.parametrize("layout", fmt.LAYOUTS)
def test_broadcast_offset_and_bias(layout: int) -> None:
    """[1, 1] and [1] stand for the same value everywhere, not only for 0."""
    rng = np.random.default_rng(0)
    layer = make_layer(rng, 70, 19, 2, 32, layout=layout, offset=False, powers_of_two=True)
    x = rng.integers(-8, 9, (3, 70)).astype(np.float32)
    for z, c in ((0, 0), (0.25, 0), (0, -3), (-2, 5)):
        wide = Layer(layer.spec, layer.planes, layer.scales, np.full((1, 1), z, np.float32), np.full(1, c, np.float32))
        for isa in abi.isas():
            np.testing.assert_array_equal(abi.Kernel(wide, isa)(x), wide.exact(x).astype(np.float32), strict=True)


def test_every_half_converts_as_in_numpy() -> None:
    """All finite float16 values in (X and S) and out, subnormals included; float32 that overflow or round to even."""
    bits = np.arange(0x10000, dtype=np.uint32).astype(np.uint16).view(np.float16)
    finite = bits[np.isfinite(bits)]
    layer = make_layer(np.random.default_rng(0), 1, 1, 1, offset=False, bias=False)
    layer.planes[:], layer.scales[:] = 1, 1
    as_scales = make_layer(np.random.default_rng(0), 1, len(finite), 1, dtype=np.float16, offset=False, bias=False)
    as_scales.planes[:], as_scales.scales[:] = 1, 0
    as_scales.scales.transpose(0, 2, 1, 3).reshape(-1)[: len(finite)] = finite
    # Outputs: halfway points and their neighbours, through the bias.
    middle = finite.astype(np.float32)
    middle = np.concatenate([(middle[:-1] + middle[1:]) / 2, [65519.996, 65520, 1e30, -65520, 2.0**-25, 2.0**-26]])
    out = np.concatenate([np.nextafter(middle, np.inf), middle, np.nextafter(middle, -np.inf)]).astype(np.float32)
    as_bias = make_layer(np.random.default_rng(0), 1, len(out), 1, offset=False)
    as_bias.planes[:], as_bias.scales[:], as_bias.bias[:] = 1, 0, out
    one = np.ones((1, 1), np.float32)
    for isa in abi.isas():
        np.testing.assert_array_equal(abi.Kernel(layer, isa)(finite[:, None])[:, 0], finite)
        np.testing.assert_array_equal(abi.Kernel(as_scales, isa)(one)[0], finite.astype(np.float32))
        with np.errstate(over="ignore"):
            np.testing.assert_array_equal(abi.Kernel(as_bias, isa)(one.astype(np.float16))[0], out.astype(np.float16))


def test_unaligned_weights() -> None:
    """A file may put data at any address."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(2, 100)).astype(np.float32)
    for layout in fmt.LAYOUTS:
        layer = make_layer(rng, 100, 20, 2, 32, layout=layout, dtype=np.float16)
        arrays = []
        for array in (layer.planes, layer.scales, layer.offset, layer.bias):
            odd = np.empty(array.nbytes + 1, np.uint8)[1:].view(array.dtype).reshape(array.shape)
            odd[...] = array
            assert odd.ctypes.data % 2 == 1
            arrays.append(odd)
        for isa in abi.isas():
            assert same_bytes(abi.Kernel(Layer(layer.spec, *arrays), isa)(x), abi.Kernel(layer, isa)(x))


def test_library_lists_what_was_tested() -> None:
    info = library_info()
    assert list(info.isas)[-1] == "scalar"
    assert info.isas["scalar"]
    assert info.layouts == fmt.LAYOUTS
    for name in abi.isas():
        assert abi.Kernel(make_layer(np.random.default_rng(0), 4, 4, 1), name).isa == name
