"""int8 and int16 activations: every instruction set against the definition, and the definition against float64."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from qbb_export import format as fmt
from tests.kernels import abi
from tests.kernels.integer_modes import INT8, INT16, expected, promise
from tests.kernels.layers import Layer, group_sizes, in_layout, least_many, make_layer, many_rows, with_garbage

CASES = [
    (1, 5, 1, 1),
    (3, 33, 8, 3),
    (31, 16, 2, 31),
    (33, 17, 4, 32),
    (100, 31, 4, 64),
    (130, 64, 3, 64),
    (257, 20, 2, 257),
    (300, 40, 5, 96),
    (1000, 50, 3, 1000),
    (2500, 600, 2, 320),
    (4096, 48, 3, 128),
    (6500, 40, 1, 128),  # tables of one row exceed L1
]


def activations(rng: np.random.Generator, rows: int, K: int, dtype: type) -> np.ndarray:
    """Normal, with an outlier here and there, and one row of zeros."""
    x = rng.normal(size=(rows, K)) * np.where(rng.random((rows, K)) < 0.01, 30, 1)
    x[rows // 2] = 0
    return x.astype(dtype)


def check(layer: Layer, x: np.ndarray, mode: int) -> None:
    want, bound = expected(layer, x, mode)
    exact = layer.exact(x)
    half = np.abs(want) * 2.0**-11 + 2.0**-25 if x.dtype == np.float16 else 0  # Y is rounded, too
    results = {isa: abi.Kernel(layer, isa, mode)(x) for isa in abi.isas()}
    for isa, y in results.items():
        worst = np.max(np.abs(y.astype(np.float64) - want) / (bound + half + 1e-300))
        assert worst <= 1, f"{isa}: {worst:.2f} times the bound"
        promised = promise(layer, x, mode) + bound + half + 2.0**-100
        assert np.all(np.abs(y.astype(np.float64) - exact) <= promised), isa
        assert y.tobytes() == results["scalar"].tobytes(), isa
        rows = abi.Kernel(in_layout(layer, fmt.LAYOUT_ROWS), isa, mode)
        assert rows(x).tobytes() == y.tobytes(), f"{isa}: layout 0"
        if not many_rows(layer.spec.bases, len(x), mode):
            alone = np.concatenate([rows(x[i : i + 1]) for i in range(len(x))])
            assert alone.tobytes() == y.tobytes(), f"{isa}: row by row"
        else:
            wide = np.concatenate([x[3:], *[x] * (600 // len(x)), x])  # more than is rounded at a time
            assert rows(wide)[-len(x) :].tobytes() == y.tobytes(), f"{isa}: among others"


@pytest.mark.parametrize("x_dtype", [np.float32, np.float16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_few_rows(case: tuple[int, int, int, int], x_dtype: type) -> None:
    K, N, bases, group_size = case
    rng = np.random.default_rng([K, N])
    for mode, dtype, offset in itertools.product((INT8, INT16), (np.float16, np.float32), (False, True)):
        layer = make_layer(rng, K, N, bases, group_size, dtype=dtype, offset=offset)
        most = 40 if bases <= 2 else least_many(bases, mode) - 1  # 40: more than are rounded at a time
        for rows in (int(rng.integers(1, most)), most):
            check(layer, activations(rng, rows, K, x_dtype), mode)


@pytest.mark.parametrize("x_dtype", [np.float32, np.float16])
@pytest.mark.parametrize("case", [c for c in CASES if c[2] > 2], ids=str)
def test_many_rows_int8(case: tuple[int, int, int, int], x_dtype: type) -> None:
    K, N, bases, group_size = case
    rng = np.random.default_rng([K, N])
    for dtype, offset in itertools.product((np.float16, np.float32), (False, True)):
        layer = make_layer(rng, K, N, bases, group_size, dtype=dtype, offset=offset)
        check(layer, activations(rng, least_many(bases) + int(rng.integers(0, 30)), K, x_dtype), INT8)


def test_many_rows_int16_are_exact_mode() -> None:
    """16 bits would gain nothing there, so nothing is rounded."""
    rng = np.random.default_rng(0)
    layer = make_layer(rng, 300, 40, 3, 96)
    x = activations(rng, least_many(3, INT16), 300, np.float32)
    for isa in abi.isas():
        assert abi.Kernel(layer, isa, INT16)(x).tobytes() == abi.Kernel(layer, isa)(x).tobytes()


@pytest.mark.parametrize("K", [*range(1, 40), 63, 64, 65, 95, 96, 97, 127, 128, 129, 130])
def test_shapes(K: int) -> None:
    """All numbers of bases and row counts around the borders of tiles, on every instruction set."""
    rng = np.random.default_rng(K)
    for N, bases in itertools.product((1, 17, 33), (1, 2, 3, 4, 7, 8)):
        layer = make_layer(rng, K, N, bases, int(rng.choice(group_sizes(K))), offset=bool(rng.integers(2)))
        for M, mode in ((1, INT8), (2, INT16), (5, INT8), (15, INT16), (17, INT8)):
            x = activations(rng, M, K, np.float32)
            rounds = mode == INT8 or not many_rows(bases, M, mode)
            want, bound = expected(layer, x, mode) if rounds else (layer.exact(x), layer.bound(x))
            results = {isa: abi.Kernel(layer, isa, mode)(x) for isa in abi.isas()}
            for isa, y in results.items():
                assert np.all(np.abs(y - want) <= bound), f"{layer.spec} M={M} mode {mode} {isa}"
                assert y.tobytes() == results["scalar"].tobytes(), isa


@pytest.mark.parametrize("M", [1, 3, 16])
@pytest.mark.parametrize("mode", [INT8, INT16])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_activations_that_are_not_finite(bad: float, mode: int, M: int) -> None:
    """Their row is NaN or infinite; the other rows are as they were."""
    rng = np.random.default_rng(0)
    layer = make_layer(rng, 130, 20, 3, 64)
    x = activations(rng, M, 130, np.float32)
    for isa in abi.isas():
        kernel = abi.Kernel(layer, isa, mode)
        good = kernel(x)
        for k in (0, 77, 129):
            spoilt = x.copy()
            spoilt[M - 1, k] = bad
            y = kernel(spoilt)
            assert not np.isfinite(y[M - 1]).any(), isa
            assert y[: M - 1].tobytes() == good[: M - 1].tobytes(), isa


@pytest.mark.parametrize("mode", [INT8, INT16])
def test_tiny_and_huge_activations(mode: int) -> None:
    rng = np.random.default_rng(0)
    layer = make_layer(rng, 96, 20, 3, 32)
    for scale in (2.0**-149, 2.0**-101, 2.0**-99, 2.0**-20, 2.0**100):
        for M in (2, 16):
            x = (activations(rng, M, 96, np.float64) * scale).astype(np.float32)
            want, bound = (
                expected(layer, x, mode)
                if mode == INT8 or not many_rows(3, M, mode)
                else (layer.exact(x), layer.bound(x))
            )
            for isa in abi.isas():
                y = abi.Kernel(layer, isa, mode)(x)
                assert np.all(np.abs(y - want) <= bound + 2.0**-149), (scale, M, isa)


@pytest.mark.parametrize("mode", [INT8, INT16])
def test_padding_is_ignored(mode: int) -> None:
    rng = np.random.default_rng(5)
    for (K, N, group_size), bases, M in itertools.product(
        ((1, 1, 1), (33, 3, 32), (97, 17, 97), (130, 33, 64)), (1, 3), (2, 17)
    ):
        layer = make_layer(rng, K, N, bases, group_size, dtype=np.float16)
        dirty = with_garbage(rng, layer)
        x = activations(rng, M, K, np.float32)
        for isa in abi.isas():
            assert abi.Kernel(dirty, isa, mode)(x).tobytes() == abi.Kernel(layer, isa, mode)(x).tobytes(), isa


def test_zero_scales() -> None:
    rng = np.random.default_rng(6)
    layer = make_layer(rng, 64, 20, 3, 32, offset=False, bias=False)
    layer.scales[:, :, 0] = 0
    for mode, M in itertools.product((INT8, INT16), (1, 16)):
        x = activations(rng, M, 64, np.float32)
        x[:, 32:] = 0
        for isa in abi.isas():
            assert not abi.Kernel(layer, isa, mode)(x).any()


def test_modes_differ_and_int16_is_closer() -> None:
    """The modes really are different computations, in the order of their promises."""
    rng = np.random.default_rng(7)
    layer = make_layer(rng, 1024, 64, 3, 128)
    x = rng.normal(size=(4, 1024)).astype(np.float32)
    exact = layer.exact(x)
    errors = [np.abs(abi.Kernel(layer, None, mode)(x) - exact).max() for mode in (0, INT16, INT8)]
    assert errors[0] * 5 < errors[1]
    assert errors[1] * 50 < errors[2]


def test_unknown_mode() -> None:
    with pytest.raises(abi.Failed, match=r"unknown mode; expected 0 \(exact\), 1 \(int8\) or 2 \(int16\); got 3"):
        abi.Kernel(make_layer(np.random.default_rng(0), 4, 4, 1), None, 3)
