"""The recipe rtn: plain round-to-nearest, said in binary bases."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qbb_export.format import unpack_words
from qbb_export.quantize import RECIPES, MatrixRows, Quantized, QuantizeSettings, dequantize, quantize

Array = np.ndarray[Any, Any]
UNIT = 2.0**-24  # unit roundoff of float32


def weights(seed: int, N: int, K: int, kind: str) -> Array:
    rng = np.random.default_rng(seed)
    values = {
        "normal": lambda: rng.standard_normal((N, K)),
        "heavy": lambda: rng.standard_t(3, (N, K)),
        "shifted": lambda: rng.exponential(1.0, (N, K)) + 5.0,
        "grid": lambda: rng.integers(-2, 3, (N, K)).astype(np.float64),
    }[kind]()
    return (0.02 * values).astype(np.float32)


def plain_rtn(group: Array, bits: int, asymmetric: bool) -> tuple[float, float, Array]:
    """Step, middle of the range and rounded weights of one group, in float64."""
    w = group.astype(np.float64)
    low, high = (w.min(), w.max()) if asymmetric else (-np.abs(w).max(), np.abs(w).max())
    step = (high - low) / (2**bits - 1)
    if step == 0.0:
        return 0.0, float(low), np.full_like(w, low)
    code = np.clip(np.rint((w - low) / step), 0, 2**bits - 1)
    return float(step), float((low + high) / 2), low + step * code


def exact(q: Quantized) -> Array:
    """The stored matrix, summed in float64."""
    group = np.arange(q.spec.K) // q.spec.group_size
    out = np.zeros((q.spec.N, q.spec.K)) if q.offset is None else q.offset.astype(np.float64)[:, group]
    for words, scales in zip(q.words, q.scales, strict=True):
        signs = np.where(unpack_words(words, q.spec.K), 1.0, -1.0)
        out = out + signs * scales.astype(np.float64)[:, group]
    return out


SHAPES = st.tuples(st.integers(1, 6), st.integers(1, 140))
KINDS = st.sampled_from(["normal", "heavy", "shifted", "grid"])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), SHAPES, KINDS, st.integers(1, 8), st.sampled_from([0, 32, 64]), st.booleans())
def test_equals_plain_rtn(
    seed: int, shape: tuple[int, int], kind: str, bits: int, group_size: int, asymmetric: bool
) -> None:
    w = weights(seed, *shape, kind)
    q = quantize(w, QuantizeSettings(bits, group_size, asymmetric, scale_dtype="float32"), "rtn")
    got, g = exact(q), q.spec.group_size
    true = 0.0
    for n in range(shape[0]):
        for i, start in enumerate(range(0, shape[1], g)):
            part = w[n, start : start + g].astype(np.float64)
            step, middle, expected = plain_rtn(part, bits, asymmetric)
            # Each is rounded once to float32; the float64 before it may differ in its last places.
            scales = [step * 2.0 ** (b - 1) for b in reversed(range(bits))]
            np.testing.assert_allclose(q.scales[:, n, i], scales, rtol=UNIT * 1.001)
            if q.offset is not None:
                assert q.offset[n, i] == pytest.approx(middle, rel=UNIT * 1.001, abs=0.0)
            # Hence every level is off by at most this.
            slack = UNIT * 1.001 * (sum(scales) + (abs(middle) if asymmetric else 0.0)) + 1e-300
            mine, gap = got[n, start : start + g], np.abs(part - expected)
            assert (np.abs(np.abs(mine - part) - gap) <= slack).all()  # as near to the weight ...
            tie = gap >= step / 2 - 2 * slack
            assert (np.abs(mine - expected)[~tie] <= slack).all()  # ... and the same level, unless two are as near
            true += float(((mine - part) ** 2).sum())
    energy = float((w.astype(np.float64) ** 2).sum())
    assert len(q.errors) == 1
    assert q.relative_error == pytest.approx(true / energy if energy else 0.0, rel=1e-9, abs=1e-300)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("kind", ["normal", "shifted"])
def test_scales_are_powers_of_two_of_one_step(bits: int, kind: str) -> None:
    q = quantize(weights(5, 7, 200, kind), QuantizeSettings(bits, 64, scale_dtype="float32"), "rtn")
    for b in range(bits):
        assert np.array_equal(q.scales[b], q.scales[-1] * np.float32(2 ** (bits - 1 - b)))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 8), st.integers(-20, 6), st.integers(-500, 500))
def test_weights_on_a_grid_are_kept_exactly(seed: int, bits: int, exponent: int, first: int) -> None:
    """A group that uses both ends of a uniform grid, as GPTQ and AWQ write them, comes out as it went in."""
    rng = np.random.default_rng(seed)
    codes = np.concatenate([[0, 2**bits - 1], rng.integers(0, 2**bits, 62)])
    w = np.ldexp((rng.permutation(codes) + first).astype(np.float32), exponent)[None, :]
    q = quantize(w, QuantizeSettings(bits, 64, scale_dtype="float32"), "rtn")
    assert q.relative_error == 0.0
    assert np.array_equal(dequantize(q), w)


@pytest.mark.parametrize("bits", [1, 4, 8])
@pytest.mark.parametrize("asymmetric", [True, False])
def test_constant_groups(bits: int, asymmetric: bool) -> None:
    w = np.zeros((4, 96), dtype=np.float32)
    w[1], w[2], w[3, 32:64] = 0.3, -7.0, 1.0
    w[0, ::2] = -0.0
    q = quantize(w, QuantizeSettings(bits, 32, asymmetric, scale_dtype="float32"), "rtn")
    if asymmetric:
        assert np.array_equal(exact(q), w.astype(np.float64))
        assert not q.scales.any() and q.errors == (0.0,)
    else:  # ± the largest magnitude are the outermost levels, sums of `bits` rounded scales
        assert (np.abs(exact(q) - w) <= UNIT * 1.001 * np.abs(w)).all()
        # Zero itself is no level where they lie symmetric to it, but all levels of an all-zero group are zero.
        assert not exact(q)[0].any()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), KINDS, st.integers(1, 6), st.booleans(), st.integers(2, 128))
@example(0, "grid", 3, True, 64)
def test_fast_is_never_worse_in_any_group(seed: int, kind: str, bits: int, asymmetric: bool, K: int) -> None:
    w = weights(seed, 4, K, kind)  # one group a row
    chosen = QuantizeSettings(bits, 0, asymmetric, rounds=3, shakes=1, scale_dtype="float32")
    best, plain = quantize(w, chosen, "fast"), quantize(w, chosen, "rtn")
    for n in range(4):
        squared = [float(((exact(q)[n] - w[n]) ** 2).sum()) for q in (best, plain)]
        # Storing rounds each scale and the offset once, which moves a level by at most this.
        moved = [UNIT * 1.001 * level_bound(q, n) for q in (best, plain)]
        # fast compares errors that are differences of sums over the group: energy - sum of (2 sum - count level) level.
        top = max(level_bound(q, n) for q in (best, plain))
        compared = 64 * 2.0**-53 * 4 * K * top**2
        left = max(0.0, np.sqrt(squared[0]) - np.sqrt(K) * moved[0])
        right = np.sqrt(squared[1]) + np.sqrt(K) * moved[1]
        assert left**2 <= right**2 + compared


def level_bound(q: Quantized, n: int) -> float:
    """The largest magnitude that a level of row n may have."""
    middle = 0.0 if q.offset is None else float(np.abs(q.offset[n]).max())
    return middle + float(q.scales[:, n].astype(np.float64).sum())


def test_offset_is_the_default_at_any_number_of_bases() -> None:
    w = weights(3, 4, 64, "shifted")
    for bits in range(1, 9):
        assert quantize(w, QuantizeSettings(bits), "rtn").offset is not None
        assert quantize(w, QuantizeSettings(bits, offset=False), "rtn").offset is None
        assert (quantize(w, QuantizeSettings(bits, rounds=0, shakes=0)).offset is not None) == (bits <= 3)
        assert quantize(w, QuantizeSettings(bits), "greedy").offset is None


@pytest.mark.parametrize("asymmetric", [True, False])
@pytest.mark.parametrize("scale_dtype", ["float16", "float32"])
@pytest.mark.parametrize(("bits", "group_size"), [(1, 0), (3, 32), (4, 128), (8, 64)])
def test_numpy_and_torch_give_the_same_bytes(bits: int, group_size: int, asymmetric: bool, scale_dtype: str) -> None:
    torch = pytest.importorskip("torch")
    w = weights(7, 8, 200, "heavy")
    w[2] = np.where(np.arange(200) % 3 == 0, 0.0, -0.0)
    w[3] = 0.0
    chosen = QuantizeSettings(bits, group_size, asymmetric, scale_dtype=scale_dtype)
    ours = quantize(w, chosen, "rtn")
    transposed = MatrixRows(np.ascontiguousarray(w.T), transposed=True)
    for other in (torch.from_numpy(w), torch.nn.Parameter(torch.from_numpy(w)), transposed):
        theirs = quantize(other, chosen, "rtn")
        assert ours.errors == theirs.errors
        assert ours.words.tobytes() == theirs.words.tobytes() and ours.scales.tobytes() == theirs.scales.tobytes()
        assert (None if ours.offset is None else ours.offset.tobytes()) == (
            None if theirs.offset is None else theirs.offset.tobytes()
        )


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("group_size", [0, 64])
def test_the_order_of_memory_does_not_matter(recipe: str, group_size: int) -> None:
    """ONNX holds a weight [in_features, out_features], so blocks of rows come transposed."""
    w = weights(11, 6, 96, "normal")
    chosen = QuantizeSettings(2, group_size, False, rounds=2, shakes=1)
    ours = quantize(w, chosen, recipe)
    for other in (np.asfortranarray(w), MatrixRows(np.ascontiguousarray(w.T), transposed=True)):
        theirs = quantize(other, chosen, recipe)
        assert ours.words.tobytes() == theirs.words.tobytes() and ours.scales.tobytes() == theirs.scales.tobytes()
        assert ours.errors == theirs.errors
