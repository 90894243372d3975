"""What must hold for every matrix: never worse than its starts, the same bytes whichever way it is worked on."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import array_api_compat.numpy as xp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qbb_export.format import unpack_words
from qbb_export.quantize import MatrixRows, Quantized, QuantizeSettings, dequantize, matrix, quantize, rows
from qbb_export.quantize.alternating import Fit, alternate, least_squares, solve_positive
from qbb_export.quantize.levels import level_values, nearest_codes
from qbb_export.quantize.sorted_groups import SortedGroups, partition


def matrix_of(seed: int, N: int, K: int, kind: str = "normal") -> np.ndarray[Any, Any]:
    rng = np.random.default_rng(seed)
    if kind == "normal":
        values = rng.standard_normal((N, K))
    elif kind == "heavy":
        values = rng.standard_t(3, (N, K))
    elif kind == "shifted":
        values = rng.exponential(1.0, (N, K)) - 0.3
    else:
        values = rng.integers(-3, 4, (N, K)).astype(np.float64)
    return (0.02 * values).astype(np.float32)


def same_bytes(a: Quantized, b: Quantized) -> bool:
    pairs = [(a.words, b.words), (a.scales, b.scales), (a.offset, b.offset)]
    return a.errors == b.errors and all(
        (x is None and y is None) or (x is not None and y is not None and x.tobytes() == y.tobytes()) for x, y in pairs
    )


def clipped_rtn_error(w: np.ndarray[Any, Any], group: int, bases: int, offset: bool, clip: float) -> float:
    """Round to nearest in float64, written independently of the package."""
    error = 0.0
    for start in range(0, w.shape[1], group):
        part = w[:, start : start + group].astype(np.float64)
        low, high = part.min(axis=1, keepdims=True), part.max(axis=1, keepdims=True)
        if not offset:
            high = np.maximum(abs(low), abs(high))
            low = -high
        low, high = low * clip, high * clip
        step = np.where(high > low, (high - low) / (2**bases - 1), 1.0)
        code = np.clip(np.rint((part - low) / step), 0, 2**bases - 1)
        error += float((((low + code * step) - part) ** 2).sum())
    return error / float((w.astype(np.float64) ** 2).sum())


KINDS = st.sampled_from(["normal", "heavy", "shifted", "grid"])
SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 150))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), SHAPES, KINDS, st.integers(1, 5), st.sampled_from([0, 32, 64]), st.booleans())
def test_trace_falls_and_stored_error_is_true(
    seed: int, shape: tuple[int, int], kind: str, bases: int, group: int, offset: bool
) -> None:
    w = matrix_of(seed, *shape, kind)
    q = quantize(w, QuantizeSettings(bases, group, offset, rounds=6, shakes=2, scale_dtype="float32"))
    assert len(q.errors) == 6 + 1 + 1 + 1
    slack = 1e-12  # squared errors are differences of sums in float64
    assert all(after <= before + slack for before, after in pairwise(q.errors[:-1]))
    norm = float((w.astype(np.float64) ** 2).sum())
    if norm:
        true = float(((dequantize(q).astype(np.float64) - w) ** 2).sum()) / norm
        assert q.relative_error == pytest.approx(true, rel=1e-3, abs=1e-12)
        # float32 scales cost next to nothing
        assert q.relative_error <= q.errors[-2] * 1.001 + 1e-11


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), SHAPES, KINDS, st.integers(1, 5), st.booleans(), st.sampled_from([1.0, 0.85, 0.6]))
def test_never_worse_than_round_to_nearest_or_greedy(
    seed: int, shape: tuple[int, int], kind: str, bases: int, offset: bool, clip: float
) -> None:
    w = matrix_of(seed, *shape, kind)
    if not w.any():
        return
    chosen = QuantizeSettings(bases, 64, offset, rounds=0, shakes=0, scale_dtype="float32")
    q = quantize(w, chosen)
    slack = 1e-10
    assert q.errors[0] <= clipped_rtn_error(w, min(64, w.shape[1]), bases, offset, clip) + slack
    greedy = quantize(w, QuantizeSettings(bases, 64, scale_dtype="float32"), "greedy")
    assert q.errors[0] <= greedy.errors[bases] + slack
    assert q.relative_error <= greedy.relative_error * (1 + 1e-5) + slack


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5), st.booleans(), KINDS)
def test_each_exact_step_cannot_increase_the_error(seed: int, bases: int, offset: bool, kind: str) -> None:
    w = matrix_of(seed, 6, 40, kind)
    groups = SortedGroups.of(xp, w)
    scales = 0.02 * np.random.default_rng(seed).random((6, bases))
    z = np.zeros(6) if offset else None
    parts = partition(xp, groups, scales, z)
    # A partition is the nearest level for every weight ...
    levels = level_values(xp, scales, z)
    gaps = np.abs(w[:, :, None].astype(np.float64) - levels[:, None, :])
    np.testing.assert_allclose(parts.error, (gaps.min(axis=2) ** 2).sum(axis=1), atol=1e-12)
    # ... least squares is as good as lstsq for its codes ...
    codes = nearest_codes(xp, w, scales, z)
    fit = least_squares(xp, parts, bases, offset)
    for row in range(6):
        signs = (codes[row][:, None] >> np.arange(bases) & 1) * 2.0 - 1.0
        columns = np.concatenate([signs, np.ones((40, 1))], axis=1) if offset else signs
        expected = np.linalg.lstsq(columns, w[row].astype(np.float64), rcond=None)[0]
        best = float(((columns @ expected - w[row]) ** 2).sum())
        assert best <= parts.error[row] + 1e-12
        after = partition(xp, groups, fit.scales, fit.offset).error[row]
        assert after <= best * (1 + 1e-6) + 1e-12
    # ... and so the errors fall.
    _, errors = alternate(xp, groups, Fit(scales, z), 5)
    assert all((b <= a).all() for a, b in pairwise(errors))


def test_greedy_is_the_papers_cascade() -> None:
    w = matrix_of(3, 5, 96)
    w[0, :4] = 0.0
    q = quantize(w, QuantizeSettings(3, 32, scale_dtype="float32"), "greedy")
    delta = w.astype(np.float64).reshape(5, 3, 32)
    for b in range(3):
        sign = np.where(delta >= 0, 1.0, -1.0)
        alpha = np.abs(delta).mean(axis=2)
        assert np.array_equal(unpack_words(q.words[b], 96), sign.reshape(5, 96) > 0)
        np.testing.assert_allclose(q.scales[b], alpha, rtol=1e-6)
        delta = delta - alpha[:, :, None] * sign
        norm = float((w.astype(np.float64) ** 2).sum())
        assert q.errors[b + 1] == pytest.approx(float((delta**2).sum()) / norm)


@pytest.mark.parametrize(
    ("bases", "group", "offset", "recipe"),
    [
        (1, 0, True, "fast"),
        (3, 32, False, "fast"),
        (4, 128, True, "fast"),
        (8, 64, False, "fast"),
        (4, 64, False, "greedy"),
    ],
)
def test_numpy_and_torch_give_the_same_bytes(bases: int, group: int, offset: bool, recipe: str) -> None:
    w = matrix_of(7, 8, 200, "heavy")
    chosen = QuantizeSettings(bases, group, offset, rounds=4, shakes=1)
    ours = quantize(w, chosen, recipe)
    torch = pytest.importorskip("torch")
    assert same_bytes(ours, quantize(torch.from_numpy(w), chosen, recipe))
    assert same_bytes(ours, quantize(torch.nn.Parameter(torch.from_numpy(w)), chosen, recipe))
    assert same_bytes(ours, quantize(MatrixRows(np.ascontiguousarray(w.T), transposed=True), chosen, recipe))
    assert same_bytes(ours, quantize(w, chosen, recipe))


@pytest.mark.parametrize("backend", ["numpy", "torch"])
def test_result_does_not_depend_on_the_block_size(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    w: Any = matrix_of(11, 12, 150, "shifted")
    chosen = QuantizeSettings(3, 64, True, rounds=2, shakes=1)
    if backend == "torch":
        w = pytest.importorskip("torch").from_numpy(w)
    whole = quantize(w, chosen)
    for block, group_block in ((7 * 150, 5 * 64), (1, 1), (5 * 150, 1 << 19)):
        monkeypatch.setattr(rows, "BLOCK", block)
        monkeypatch.setattr(matrix, "GROUP_BLOCK", group_block)
        assert same_bytes(whole, quantize(w, chosen))


def test_rows_are_independent() -> None:
    w = matrix_of(13, 12, 130)
    chosen = QuantizeSettings(4, 32, rounds=4, shakes=1)
    whole = quantize(w, chosen)
    part = quantize(w[5:8], chosen)
    assert np.array_equal(whole.words[:, 5:8], part.words)
    assert np.array_equal(whole.scales[:, 5:8], part.scales)


def test_half_precision_weights_are_taken_as_they_are() -> None:
    torch = pytest.importorskip("torch")
    w = torch.from_numpy(matrix_of(17, 8, 64)).to(torch.bfloat16)
    chosen = QuantizeSettings(3, 32, rounds=3, shakes=1)
    assert same_bytes(quantize(w, chosen), quantize(w.float().numpy(), chosen))


def test_more_starts_and_shakes_pay() -> None:
    w = matrix_of(19, 32, 256)
    plain = quantize(w, QuantizeSettings(4, 64, shakes=0))
    shaken = quantize(w, QuantizeSettings(4, 64, shakes=8))
    ladder = min(clipped_rtn_error(w, 64, 4, False, clip) for clip in (1.0, 0.9, 0.8, 0.7))
    assert shaken.relative_error < 0.985 * plain.relative_error
    assert plain.relative_error < 0.85 * ladder


def test_a_grid_is_found_exactly() -> None:
    """Weights that lie on a uniform grid with a zero point are an exact special case of bases with an offset."""
    rng = np.random.default_rng(23)
    codes = np.concatenate([np.arange(16), rng.integers(0, 16, 48)])
    w = ((codes - 5) * 0.25).astype(np.float32)[None, :]
    q = quantize(w, QuantizeSettings(4, 64, offset=True))
    assert q.relative_error == 0.0
    assert np.array_equal(dequantize(q), w)


def test_solver_agrees_with_lapack() -> None:
    rng = np.random.default_rng(29)
    a = rng.standard_normal((50, 6, 4))
    a = np.swapaxes(a, 1, 2) @ a + 0.1 * np.eye(4)
    b = rng.standard_normal((50, 4))
    ours = solve_positive([[a[:, i, j] for j in range(4)] for i in range(4)], [b[:, i] for i in range(4)])
    np.testing.assert_allclose(np.stack(ours, axis=-1), np.linalg.solve(a, b[:, :, None])[:, :, 0], rtol=1e-9)
