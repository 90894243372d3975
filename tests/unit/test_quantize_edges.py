"""Matrices at the edge: degenerate, huge, tiny, refused; and the memory that a large one takes."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from typing import Any

import numpy as np
import pytest

from qbb_export.errors import QbbError
from qbb_export.format import pack_words, unpack_words
from qbb_export.quantize import Quantized, QuantizeSettings, dequantize, quantize


def relative_gap(q: Quantized, w: np.ndarray[Any, Any]) -> float:
    return float(((dequantize(q).astype(np.float64) - w) ** 2).sum() / (w.astype(np.float64) ** 2).sum())


def finite(q: Quantized) -> bool:
    arrays = [q.scales, q.offset] if q.offset is not None else [q.scales]
    return all(bool(np.isfinite(a).all()) for a in arrays) and bool(np.isfinite(q.errors).all())


@pytest.mark.parametrize("bases", [1, 2, 4, 8])
@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (5, 1), (3, 33), (2, 64), (17, 70)])
def test_small_shapes_and_tails(shape: tuple[int, int], offset: bool, bases: int) -> None:
    w = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    q = quantize(w, QuantizeSettings(bases, 32, offset, rounds=3, shakes=1))
    N, K = shape
    assert q.words.shape == (bases, N, -(-K // 32)) and q.words.dtype == np.uint32
    assert q.scales.shape == (bases, N, -(-K // 32)) and q.scales.dtype == np.float16
    assert (q.offset is not None) == offset
    assert q.offset is None or (q.offset.shape == (N, -(-K // 32)) and q.offset.dtype == np.float32)
    assert finite(q)
    assert relative_gap(q, w) == pytest.approx(q.relative_error, rel=1e-3, abs=1e-9)
    for plane in q.words:  # padding bits are 0
        assert np.array_equal(pack_words(unpack_words(plane, K)), plane)


@pytest.mark.parametrize("bases", [1, 3, 4, 6])
@pytest.mark.parametrize("offset", [False, True])
def test_zero_and_constant_rows(bases: int, offset: bool) -> None:
    w = np.zeros((6, 96), dtype=np.float32)
    w[1] = 0.25
    w[2] = -3.0
    w[3, ::2] = 1.0
    w[4, 5] = 7.0
    w[5] = np.where(np.arange(96) % 3 == 0, 0.5, -0.5)
    q = quantize(w, QuantizeSettings(bases, 32, offset, rounds=8, shakes=2))
    assert finite(q)
    got = dequantize(q)
    for row in (0, 1, 2, 5):  # one level, or two opposite ones, are within reach of any number of bases
        np.testing.assert_allclose(got[row], w[row], atol=2e-3 * np.abs(w[row]).max())
    if bases > 1 or offset:
        np.testing.assert_allclose(got[3], w[3], atol=2e-3)


def test_zero_matrix() -> None:
    q = quantize(np.zeros((3, 40), dtype=np.float32), QuantizeSettings())
    assert not dequantize(q).any() and set(q.errors) == {0.0} and q.scales.dtype == np.float16


@pytest.mark.parametrize("scale", [1e-45, 1e-40, 1e-30, 1e-6, 1e5, 1e20, 1e38])
def test_extreme_weights_get_float32_scales(scale: float) -> None:
    w = (np.random.default_rng(2).uniform(-1, 1, (4, 64)) * 3 * scale).astype(np.float32)
    q = quantize(w, QuantizeSettings(4, 32, rounds=5, shakes=1))
    assert q.scales.dtype == np.float32 and finite(q)
    assert q.relative_error < (0.02 if scale > 1e-44 else 1.0)


def test_float16_scales_can_be_forced_or_refused() -> None:
    w = np.random.default_rng(3).standard_normal((4, 64)).astype(np.float32)
    assert quantize(w * 1e-4, QuantizeSettings(scale_dtype="float16", shakes=0)).scales.dtype == np.float16
    assert quantize(w, QuantizeSettings(scale_dtype="float32", shakes=0)).scales.dtype == np.float32
    with pytest.raises(QbbError, match=r"^fc1: weights too large for float16 scales.*max\|W\| <= 32768; got"):
        quantize(w * 1e6, QuantizeSettings(scale_dtype="float16"), name="fc1")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("recipe", ["fast", "greedy"])
def test_non_finite_weights_are_refused_by_name(bad: float, recipe: str) -> None:
    w = np.ones((4, 64), dtype=np.float32)
    w[3, 63] = bad
    with pytest.raises(QbbError, match=r"^model\.fc2: weights hold NaN, Inf"):
        quantize(w, QuantizeSettings(), recipe, name="model.fc2")


def test_float64_beyond_float32_is_refused() -> None:
    with pytest.raises(QbbError, match="beyond float32"):
        quantize(np.full((2, 32), 1e300), QuantizeSettings())


@pytest.mark.parametrize("shape", [(4,), (2, 3, 4), (0, 4), (4, 0)])
def test_what_is_no_matrix_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(QbbError, match="not a matrix"):
        quantize(np.ones(shape, dtype=np.float32), QuantizeSettings())


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"bases": 0}, "--bases"),
        ({"bases": 9}, "--bases"),
        ({"group_size": 31}, "--group-size"),
        ({"group_size": -32}, "--group-size"),
        ({"rounds": -1}, "QuantizeSettings.rounds"),
        ({"shakes": 1001}, "QuantizeSettings.shakes"),
        ({"scale_dtype": "bfloat16"}, "QuantizeSettings.scale_dtype"),
    ],
)
def test_settings_are_checked(fields: dict[str, Any], where: str) -> None:
    with pytest.raises(QbbError, match=f"^{where}: "):
        QuantizeSettings(**fields)


def test_recipes_are_checked() -> None:
    w = np.ones((2, 32), dtype=np.float32)
    with pytest.raises(QbbError, match="unknown recipe; expected one of fast, greedy"):
        quantize(w, QuantizeSettings(), "slow")
    with pytest.raises(QbbError, match="greedy knows no offset"):
        quantize(w, QuantizeSettings(offset=True), "greedy")


def test_progress_counts_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qbb_export.quantize.rows.BLOCK", 3 * 32)
    seen: list[tuple[int, int]] = []
    w = np.ones((8, 32), dtype=np.float32)
    quantize(w, QuantizeSettings(shakes=0), on_rows=lambda done, total: seen.append((done, total)))
    assert seen == [(3, 8), (6, 8), (8, 8)]


def test_dequantize_gives_any_range_of_rows() -> None:
    w = np.random.default_rng(5).standard_normal((9, 70)).astype(np.float32)
    q = quantize(w, QuantizeSettings(3, 32, offset=True, shakes=0))
    assert np.array_equal(dequantize(q)[4:7], dequantize(q, 4, 7))
    assert np.array_equal(dequantize(q)[7:], dequantize(q, 7))


@pytest.mark.parametrize(("bases", "group", "offset"), [(4, 128, False), (2, 32, True), (8, 32, False), (3, 0, True)])
def test_memory_stays_bounded(monkeypatch: pytest.MonkeyPatch, bases: int, group: int, offset: bool) -> None:
    """16 blocks of float32 and the packed result, whatever the size of the layer (small blocks, to be quick)."""
    block = 1 << 15
    monkeypatch.setattr("qbb_export.quantize.rows.BLOCK", block)
    monkeypatch.setattr("qbb_export.quantize.matrix.GROUP_BLOCK", block // 2)
    w = np.random.default_rng(6).standard_normal((256 if bases < 8 else 64, 1024)).astype(np.float32)
    tracemalloc.start()
    q = quantize(w, QuantizeSettings(bases, group, offset, rounds=1, shakes=0))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    packed = q.words.nbytes + q.scales.nbytes + (0 if q.offset is None else q.offset.nbytes)
    assert peak - packed < 16 * 4 * block


def test_torch_is_never_imported() -> None:
    code = (
        "import sys, numpy as np; from qbb_export.quantize import *; import qbb_export.record;"
        "quantize(np.ones((2, 32), np.float32), QuantizeSettings()); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
