"""The figures of an evaluation: pure functions on numpy arrays."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from qbb_export.errors import QbbError

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
Interval = tuple[float, float]

# Logits brought to float64 at once: 8 MB, however large the vocabulary is.
_BLOCK = 1 << 20


class TokenFigures(NamedTuple):
    """One entry for each predicted token.

    Attributes:
        kl: float64, KL(reference || model) in nats.
        nll: float64, the model's -log p(token) in nats.
        agrees: bool, both have the same most likely token.
    """

    kl: Floats
    nll: Floats
    agrees: npt.NDArray[np.bool_]


def token_nll(logits: Array, ids: npt.NDArray[np.int64]) -> Floats:
    """-log softmax(logits[t])[ids[t+1]] for every token but the first, which is context only.

    The mean over a text is the cross-entropy, its exponential the perplexity (Jelinek et al. 1977).

    Args:
        logits: float ``[T, V]``, any float type; computed in float64.
        ids: int64 ``[T]``, each below V.

    Returns:
        ``[T - 1]``, nats.

    Raises:
        QbbError: the shapes do not fit, or a token has no logit.
    """
    _check(logits, ids)
    result = np.empty(len(ids) - 1)
    for rows in _blocks(logits):
        result[rows] = -_at(_log_softmax(logits[rows]), ids[1:][rows])
    return result


def kl_and_nll(reference_logits: Array, logits: Array, ids: npt.NDArray[np.int64]) -> TokenFigures:
    """How far a model's next-token distributions are from the reference's, and what they give the text itself.

    ``KL(p || q) = Σ_v p(v) (log p(v) - log q(v))`` with p the reference's softmax and q the model's (Kullback and
    Leibler 1951). A token that p rules out (logit -inf) adds nothing. KL and agreement see changes that cancel out in
    the perplexity (Dutta et al. 2024, "Accuracy is not all you need").

    Args:
        reference_logits: float ``[T, V]``.
        logits: float ``[T, V]``, of the model on the same tokens.
        ids: int64 ``[T]``, the tokens, each below V.

    Returns:
        Figures of shape ``[T - 1]``: the last position predicts nothing that is in ``ids``, so it is left out.

    Raises:
        QbbError: the vocabularies differ in size, the shapes do not fit, or a token has no logit.
    """
    if reference_logits.shape[-1] != logits.shape[-1]:
        expected = f"{reference_logits.shape[-1]} tokens as the reference"
        raise QbbError("vocabularies differ in size", expected=expected, got=logits.shape[-1])
    _check(reference_logits, ids)
    _check(logits, ids)
    figures = TokenFigures(np.empty(len(ids) - 1), np.empty(len(ids) - 1), np.empty(len(ids) - 1, dtype=np.bool_))
    for rows in _blocks(logits):
        p, q = _log_softmax(reference_logits[rows]), _log_softmax(logits[rows])
        weight = np.exp(p)
        with np.errstate(invalid="ignore"):  # -inf - -inf, where the weight is 0
            terms = weight * (p - q)
        terms[weight == 0] = 0
        figures.kl[rows] = terms.sum(axis=-1)
        figures.nll[rows] = -_at(q, ids[1:][rows])
        figures.agrees[rows] = p.argmax(axis=-1) == q.argmax(axis=-1)
    return figures


def _check(logits: Array, ids: npt.NDArray[np.int64]) -> None:
    if logits.ndim != 2 or ids.ndim != 1 or len(logits) != len(ids):
        raise QbbError("wrong shape of logits", expected=f"[{ids.size}, vocabulary]", got=list(logits.shape))
    if ids.size and not 0 <= ids.min() <= ids.max() < logits.shape[1]:
        raise QbbError(
            "tokenizer and model do not fit", expected=f"tokens below {logits.shape[1]}", got=f"token {ids.max()}"
        )


def _blocks(logits: Array) -> Iterator[slice]:
    """Rows ``[T, V]`` but the last, a few at a time."""
    step = max(1, _BLOCK // logits.shape[1])
    for start in range(0, len(logits) - 1, step):
        yield slice(start, min(start + step, len(logits) - 1))


def _log_softmax(rows: Array) -> Floats:
    shifted = rows.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


def _at(rows: Floats, ids: npt.NDArray[np.int64]) -> Floats:
    return np.take_along_axis(rows, ids[:, None], axis=-1)[:, 0]


def mean_interval(values: npt.ArrayLike, level: float = 0.95) -> Interval | None:
    """Confidence interval of a mean: Student's t over independent units.

    ``mean ± t(level, n-1) · s / √n``. The units are windows (or sentences), not tokens: tokens of a window share its
    topic and their contexts overlap, so an interval over tokens would be too narrow (clustered standard errors, see
    Miller 2024, "Adding error bars to evals"). Student's t, because a quick look has only a few windows. For two models
    on the same text, hand in the differences: what the windows have in common cancels.

    Args:
        values: ``[n]``, one mean for each unit, all units of the same size.
        level: chance that an interval made this way covers the mean.

    Returns:
        (low, high), or None for fewer than two units.
    """
    units = np.asarray(values, dtype=np.float64)
    if len(units) < 2:
        return None
    half = student_t(len(units) - 1, level) * float(units.std(ddof=1)) / math.sqrt(len(units))
    mean = float(units.mean())
    return mean - half, mean + half


def student_t(freedom: int, level: float = 0.95) -> float:
    """The t with P(|T| <= t) = level, for a whole number of degrees of freedom.

    By bisection of the closed form in the angle arctan(t / √freedom) (Abramowitz and Stegun 1964, 26.7.3 and 26.7.4).
    """
    odd = freedom % 2
    k = np.arange(2 + odd, freedom - 1, 2)

    def probability(angle: float) -> float:
        cosine, sine = math.cos(angle), math.sin(angle)
        series = 1.0 + float(np.cumprod((k - 1) / k * cosine**2).sum())
        if not odd:
            return sine * series
        return 2 / math.pi * (angle + (sine * cosine * series if freedom > 1 else 0.0))

    low, high = 0.0, math.pi / 2
    for _ in range(60):  # halves the angle down to a float64 step
        middle = (low + high) / 2
        low, high = (middle, high) if probability(middle) < level else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def cosine(a: Array, b: Array) -> float:
    """Cosine of the angle between two vectors ``[d]``, in float64.

    Raises:
        QbbError: they differ in length, or one is zero or not finite.
    """
    if a.shape != b.shape:
        raise QbbError("embeddings differ in size", expected=f"{len(a)} numbers as the reference", got=len(b))
    x, y = a.astype(np.float64), b.astype(np.float64)
    norms = float(np.linalg.norm(x) * np.linalg.norm(y))
    if not (math.isfinite(norms) and norms > 0):
        raise QbbError("embedding has no direction", expected="finite numbers, not all zero", got=f"a norm of {norms}")
    return float(x @ y) / norms
