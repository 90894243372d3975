"""The figures against their definitions, written down once more in the plainest way."""

import math

import numpy as np
import pytest

from qbb_export.errors import QbbError
from qbb_export.evaluate import metrics
from qbb_export.evaluate.metrics import cosine, kl_and_nll, mean_interval, student_t, token_nll

RNG = np.random.default_rng(31)


def softmax(logits: np.ndarray) -> np.ndarray:
    exps = np.exp(logits.astype(np.longdouble))
    return exps / exps.sum(-1, keepdims=True)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_against_the_definition(dtype: type) -> None:
    reference, model = (3 * RNG.standard_normal((9, 37)).astype(dtype) for _ in range(2))
    ids = RNG.integers(0, 37, 9)
    p, q = softmax(reference)[:-1], softmax(model)[:-1]
    figures = kl_and_nll(reference, model, ids)
    # Logits are exact in float64; sums of 37 terms below 30 in size, each off by a few float64 steps.
    bound = 37 * 30 * 8 * np.finfo(np.float64).eps
    assert np.abs(figures.kl - (p * np.log(p / q)).sum(-1)).max() <= bound
    assert np.abs(figures.nll + np.log(q[np.arange(8), ids[1:]])).max() <= bound
    assert np.array_equal(figures.agrees, p.argmax(-1) == q.argmax(-1))
    assert np.array_equal(figures.nll, token_nll(model, ids))
    assert figures.kl.shape == (8,)


def test_the_direction_of_kl() -> None:
    p, q = np.log([[0.75, 0.25]] * 2), np.log([[0.5, 0.5]] * 2)
    there, back = (kl_and_nll(a, b, np.zeros(2, np.int64)).kl[0] for a, b in ((p, q), (q, p)))
    assert there == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), abs=1e-15)
    assert back == pytest.approx(0.5 * math.log(2 / 3) + 0.5 * math.log(2), abs=1e-15)


def test_equal_logits_have_no_divergence() -> None:
    logits = RNG.standard_normal((5, 50)).astype(np.float32)
    figures = kl_and_nll(logits, logits.copy(), np.zeros(5, np.int64))
    assert not figures.kl.any()
    assert figures.agrees.all()


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    reference, model = (RNG.standard_normal((23, 64)).astype(np.float32) for _ in range(2))
    ids = RNG.integers(0, 64, 23)
    whole = kl_and_nll(reference, model, ids)
    for size in (1, 5 * 64, 22 * 64):
        monkeypatch.setattr(metrics, "_BLOCK", size)
        for a, b in zip(whole, kl_and_nll(reference, model, ids), strict=True):
            assert np.array_equal(a, b)


def test_large_and_infinite_logits() -> None:
    """exp(±30000) is no float; a token that both rule out counts nothing; one that only the model rules out is inf."""
    reference = np.array([[30000, 29999, -30000, -np.inf]] * 2, np.float32)
    model = np.array([[30000, 30000, -30000, -np.inf]] * 2, np.float32)
    p = 1 / (1 + math.exp(-1))
    expected = p * math.log(p) + (1 - p) * math.log(1 - p) + math.log(2)
    figures = kl_and_nll(reference, model, np.zeros(2, np.int64))
    assert figures.kl[0] == pytest.approx(expected, abs=1e-14)
    assert figures.nll[0] == pytest.approx(math.log(2), abs=1e-14)
    model[:, 0] = -np.inf
    assert kl_and_nll(reference, model, np.zeros(2, np.int64)).kl[0] == math.inf


def test_shapes_that_do_not_fit() -> None:
    a, ids = np.zeros((4, 7), np.float32), np.zeros(4, np.int64)
    with pytest.raises(QbbError, match="vocabularies differ in size; expected 7 tokens as the reference; got 8"):
        kl_and_nll(a, np.zeros((4, 8), np.float32), ids)
    with pytest.raises(QbbError, match=r"wrong shape of logits; expected \[3, vocabulary\]; got \[4, 7\]"):
        token_nll(a, ids[:3])
    with pytest.raises(QbbError, match="tokenizer and model do not fit; expected tokens below 7; got token 7"):
        token_nll(a, ids + 7)


# Abramowitz and Stegun, table 26.10 (P(|T| <= t) = 0.95), to the digits printed there.
@pytest.mark.parametrize(
    ("freedom", "t"),
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (10, 2.228), (29, 2.045), (60, 2.000), (120, 1.980)],
)
def test_student_t(freedom: int, t: float) -> None:
    assert abs(student_t(freedom) - t) <= 0.0005


def test_student_t_becomes_normal() -> None:
    # t = z + (z³ + z) / 4ν + O(1/ν²), with z = 1.959964 and the next term below 3/ν²
    z, freedom = 1.959963985, 1000
    assert abs(student_t(freedom) - z - (z**3 + z) / (4 * freedom)) <= 3 / freedom**2


def test_interval_by_hand() -> None:
    # mean 2, standard deviation 1, three units: 2 ± 4.3027/√3
    assert mean_interval([1.0, 2.0, 3.0]) == pytest.approx((2 - 2.48414, 2 + 2.48414), abs=1e-5)
    assert mean_interval([7.0]) is None


def test_intervals_cover_the_mean_as_often_as_they_say() -> None:
    """4000 samples of 4 units: 95 % within 4 standard deviations. With the normal 1.96 it would be 86 %."""
    samples = 5 + np.random.default_rng(0).standard_normal((4000, 4))
    hits = sum(low <= 5 <= high for low, high in (mean_interval(sample) or (9, 9) for sample in samples))
    assert abs(hits / 4000 - 0.95) <= 4 * math.sqrt(0.95 * 0.05 / 4000)


def test_cosine() -> None:
    assert cosine(np.array([3, 4], np.float32), np.array([4, 3], np.float32)) == pytest.approx(24 / 25, abs=1e-15)
    with pytest.raises(QbbError, match="embeddings differ in size"):
        cosine(np.ones(2), np.ones(3))
    for bad in (np.zeros(2), np.array([np.nan, 1])):
        with pytest.raises(QbbError, match="embedding has no direction"):
            cosine(np.ones(2), bad)
