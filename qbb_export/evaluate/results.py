"""What an evaluation found for one model, and how it follows from figures by window or sentence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qbb_export.evaluate.metrics import Interval, mean_interval


@dataclass(frozen=True)
class ModelSize:
    """What a model takes.

    Attributes:
        model: as the user called it.
        file_mb: files of the model in 10⁶ bytes, data included; None for a hub id.
        bits_per_weight: of its quantised matrices, scales counted; None where none are known.
    """

    model: str
    file_mb: float | None
    bits_per_weight: float | None


@dataclass(frozen=True)
class LanguageResult(ModelSize):
    """A language model on a text. All intervals are 95 % intervals of ``mean_interval`` over windows; None for one
    window. Figures against the reference are None without one.

    Attributes:
        perplexity: exp of ``nll``.
        perplexity_ci: exp of the interval of ``nll``.
        nll: mean negative log-likelihood per token, in nats.
        tokens: predicted tokens, all but the first of each window.
        windows: how many.
        kl: mean KL(reference || model) per token, in nats.
        kl_ci: its interval.
        agreement: share of tokens for which both have the same most likely one.
        perplexity_ratio: perplexity over the reference's.
        perplexity_ratio_ci: exp of the interval of the windows' differences in nll (paired).
    """

    perplexity: float
    perplexity_ci: Interval | None
    nll: float
    tokens: int
    windows: int
    kl: float | None = None
    kl_ci: Interval | None = None
    agreement: float | None = None
    perplexity_ratio: float | None = None
    perplexity_ratio_ci: Interval | None = None


@dataclass(frozen=True)
class EncoderResult(ModelSize):
    """An encoder's embeddings against the reference's.

    Attributes:
        cosine: mean cosine similarity over sentences.
        cosine_ci: 95 % interval of ``mean_interval`` over sentences; None for one sentence.
        worst_cosine: the smallest.
        worst_sentence: the sentence it belongs to.
        sentences: how many.
    """

    cosine: float
    cosine_ci: Interval | None
    worst_cosine: float
    worst_sentence: str
    sentences: int


@dataclass(frozen=True)
class WindowFigures:
    """Means over the tokens of each window, ``[windows]``; ``kl`` and ``agreement`` against the reference."""

    nll: list[float]
    kl: list[float]
    agreement: list[float]


def language_result(
    size: ModelSize, figures: WindowFigures, reference: WindowFigures | None, predicted: int
) -> LanguageResult:
    """Put the windows of a model together.

    Args:
        size: of the model.
        figures: of the model; all windows have the same number of tokens.
        reference: of the reference on the same windows; None without one.
        predicted: tokens predicted in a window.
    """
    nll = float(np.mean(figures.nll))
    result = LanguageResult(
        **vars(size),
        perplexity=_exp(nll),
        perplexity_ci=_exp_interval(mean_interval(figures.nll)),
        nll=nll,
        tokens=predicted * len(figures.nll),
        windows=len(figures.nll),
    )
    if reference is None:
        return result
    difference = np.subtract(figures.nll, reference.nll)
    against = {
        "kl": float(np.mean(figures.kl)),
        "kl_ci": _clip(mean_interval(figures.kl), 0, math.inf),
        "agreement": float(np.mean(figures.agreement)),
        "perplexity_ratio": _exp(float(difference.mean())),
        "perplexity_ratio_ci": _exp_interval(mean_interval(difference)),
    }
    return LanguageResult(**{**vars(result), **against})


def encoder_result(size: ModelSize, cosines: Sequence[float], sentences: Sequence[str]) -> EncoderResult:
    """Put the sentences of a model together; one cosine for each sentence."""
    worst = int(np.argmin(cosines))
    return EncoderResult(
        **vars(size),
        cosine=float(np.mean(cosines)),
        cosine_ci=_clip(mean_interval(cosines), -1, 1),
        worst_cosine=cosines[worst],
        worst_sentence=sentences[worst],
        sentences=len(sentences),
    )


def _exp(nats: float) -> float:
    """Exp, which for a model that is worse than guessing by far is too large for a float: inf."""
    return math.exp(nats) if nats < 709 else math.inf


def _exp_interval(interval: Interval | None) -> Interval | None:
    return None if interval is None else (_exp(interval[0]), _exp(interval[1]))


def _clip(interval: Interval | None, low: float, high: float) -> Interval | None:
    """The part of an interval that the figure can have."""
    return None if interval is None else (max(interval[0], low), min(interval[1], high))
