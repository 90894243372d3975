"""Quantization in the metric of the inputs: exact steps never make it worse, and the sweep is GPTQ's."""

from __future__ import annotations

import array_api_compat.numpy as xp
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qbb_export.format import unpack_words
from qbb_export.quantize import Quantized, QuantizeSettings, quantize
from qbb_export.quantize.sweep import Codes, damped, descend, error, inverse_factor, refit_levels, sweep

Array = npt.NDArray[np.float32]


def codes_of(layer: Quantized) -> Codes:
    bits = [unpack_words(words, layer.spec.K).astype(np.uint8) << b for b, words in enumerate(layer.words)]
    scales = np.ascontiguousarray(np.moveaxis(layer.scales.astype(np.float32), 0, -1))
    return Codes(np.bitwise_or.reduce(bits), scales, layer.offset, layer.spec.group_size)


def problem(seed: int, N: int, K: int, bases: int, offset: bool, group: int) -> tuple[Array, Array, Codes]:
    """Weights, a Hessian of correlated inputs, and a start from the weights alone."""
    rng = np.random.default_rng(seed)
    weights = rng.standard_normal((N, K)).astype(np.float32)
    mixed = rng.standard_normal((2 * K, K)) * np.geomspace(1, 0.05, K) @ rng.standard_normal((K, K))
    hessian = damped(xp, (mixed.T @ mixed / len(mixed)).astype(np.float32), 0.01)
    chosen = QuantizeSettings(bases=bases, group_size=group, offset=offset, rounds=5, shakes=0)
    return weights, hessian, codes_of(quantize(weights, chosen))


def total(weights: Array, hessian: Array, state: Codes) -> float:
    """The error in float64."""
    gap = weights.astype(np.float64) - state.dense(xp).astype(np.float64)
    return float(((gap @ hessian.astype(np.float64)) * gap).sum())


shapes = st.tuples(
    st.integers(0, 2**32),
    st.integers(1, 9),
    st.integers(1, 150),
    st.integers(1, 4),
    st.booleans(),
    st.sampled_from([0, 32]),
)


@settings(max_examples=40, deadline=None)
@given(shapes)
def test_exact_steps_never_increase_the_error(shape: tuple[int, int, int, int, bool, int]) -> None:
    weights, hessian, state = problem(*shape)
    before = total(weights, hessian, state)
    start = total(weights, hessian, Codes(state.codes, state.scales * 0, None, state.group_size))
    # Rounding: a step is found in float32, from sums of K terms of the size of the whole weights' error.
    slack = 4 * weights.shape[1] * np.finfo(np.float32).eps * start
    for _ in range(2):
        for step in (refit_levels, descend):
            state = step(weights, hessian, state)
            after = total(weights, hessian, state)
            assert after <= before + slack, step.__name__
            before = after


@pytest.mark.parametrize("bases", [1, 2, 3])
def test_after_descent_no_single_code_can_be_improved_much(bases: int) -> None:
    weights, hessian, state = problem(3, 5, 70, bases, True, 32)
    for _ in range(60):  # until it stands still
        state = descend(weights, hessian, state)
    assert np.array_equal(descend(weights, hessian, state).codes, state.codes)
    best = total(weights, hessian, state)
    for row in range(5):
        for column in range(0, 70, 7):
            for code in range(1 << bases):
                changed = state.codes.copy()
                changed[row, column] = code
                other = Codes(changed, state.scales, state.offset, state.group_size)
                assert total(weights, hessian, other) >= best * (1 - 1e-5)


@pytest.mark.parametrize(("K", "act_order"), [(1, True), (37, False), (64, True), (300, True)])
def test_the_sweep_is_gptq(K: int, act_order: bool) -> None:
    """Against GPTQ as the paper writes it: the inverse of H is updated by elimination after each column."""
    weights, hessian, start = problem(K, 6, K, 2, True, 32)
    H = hessian.astype(np.float64)
    order = np.argsort(-np.diag(H), kind="stable") if act_order else np.arange(K)
    inverse = np.linalg.inv(H[np.ix_(order, order)])
    open_weights = weights[:, order].astype(np.float64)
    levels = start.levels(xp).astype(np.float64)
    codes = np.zeros((6, K), dtype=np.uint8)
    margin = np.full((6, K), np.inf)
    for j, column in enumerate(order):
        table = levels[:, column // start.group_size, :]
        gaps = np.sort(np.abs(open_weights[:, j : j + 1] - table), axis=1)
        margin[:, column] = gaps[:, 1] - gaps[:, 0]
        codes[:, column] = np.abs(open_weights[:, j : j + 1] - table).argmin(axis=1)
        gap = open_weights[:, j] - np.take_along_axis(table, codes[:, column, None].astype(int), 1)[:, 0]
        open_weights[:, j:] -= np.outer(gap / inverse[j, j], inverse[j, j:])
        inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    ours = sweep(weights, hessian, start, act_order=act_order).codes
    # A row may part from the other where two levels are equally near up to rounding; nowhere else.
    for row in range(6):
        different = np.flatnonzero(ours[row, order] != codes[row, order])
        assert not len(different) or margin[row, order[different[0]]] < 1e-3


def test_inverse_factor() -> None:
    _, hessian, _ = problem(1, 1, 60, 1, False, 0)
    factor = inverse_factor(xp, hessian)
    assert np.array_equal(factor, np.triu(factor))
    product = factor.T @ factor @ hessian.astype(np.float64)
    assert np.abs(product - np.eye(60)).max() < 60 * np.linalg.cond(hessian.astype(np.float64)) * 2.0**-50


@pytest.mark.parametrize(("bases", "offset"), [(2, True), (3, False), (4, False)])
def test_it_pays(bases: int, offset: bool) -> None:
    """On correlated inputs the sweep beats the start clearly, and the exact steps beat the sweep."""
    weights, hessian, start = problem(5, 64, 256, bases, offset, 64)
    swept = sweep(weights, hessian, start)
    state = swept
    for _ in range(3):
        state = descend(weights, hessian, refit_levels(weights, hessian, state))
    first, second, third = (total(weights, hessian, s) for s in (start, swept, state))
    assert second < 0.7 * first
    assert third < 0.9 * second


def test_a_negative_scale_turns_the_signs_around() -> None:
    """Least squares may find a negative scale: the same levels, told with a positive one."""
    weights = -np.ones((1, 64), dtype=np.float32)
    state = Codes(np.ones((1, 64), dtype=np.uint8), np.full((1, 1, 1), 0.5, dtype=np.float32), None, 64)
    found = refit_levels(weights, np.eye(64, dtype=np.float32), state)
    assert found.scales[0, 0, 0] == pytest.approx(1.0, rel=1e-5)  # the ridge costs 1.5e-6
    assert not found.codes.any()


@pytest.mark.parametrize("offset", [False, True])
def test_torch_gives_what_numpy_gives(offset: bool) -> None:
    torch = pytest.importorskip("torch")
    weights, hessian, start = problem(9, 16, 100, 3, offset, 32)
    moved = None if start.offset is None else torch.from_numpy(start.offset)
    other = Codes(torch.from_numpy(start.codes), torch.from_numpy(start.scales), moved, start.group_size)
    for step in (sweep, refit_levels, descend):
        ours = total(weights, hessian, step(weights, hessian, start))
        theirs = step(torch.from_numpy(weights), torch.from_numpy(hessian), other)
        host = None if theirs.offset is None else theirs.offset.numpy()
        again = Codes(theirs.codes.numpy(), theirs.scales.numpy(), host, theirs.group_size)
        assert total(weights, hessian, again) == pytest.approx(ours, rel=0.02)  # a code on the edge may fall otherwise


def test_error_is_by_row() -> None:
    weights, hessian, start = problem(2, 4, 40, 2, False, 0)
    rows = error(xp, weights, start.dense(xp), hessian)
    assert rows.shape == (4,)
    assert float(rows.sum()) == pytest.approx(total(weights, hessian, start), rel=1e-4)
