"""How the next token is chosen from logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qbb_export.errors import QbbError


@dataclass(frozen=True)
class Sampling:
    """Options of a sampler; the defaults take the most likely token.

    Args:
        temperature: logits are divided by it; 0: no chance.
        top_k: only so many most likely tokens; 0: all.
        top_p: only the most likely tokens that make up so much probability.
        penalty: logits of tokens that were there are divided by it (multiplied where negative).
        seed: of the generator; None: another one each time.

    Raises:
        QbbError: a value that means nothing.
    """

    temperature: float = 0.0
    top_k: int = 50
    top_p: float = 1.0
    penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, value, ok, expected in (
            ("--temperature", self.temperature, 0 <= self.temperature < np.inf, ">= 0"),
            ("--top-k", self.top_k, self.top_k >= 0, ">= 0"),
            ("--top-p", self.top_p, 0 < self.top_p <= 1, "above 0, at most 1"),
            ("--repetition-penalty", self.penalty, 0 < self.penalty < np.inf, "above 0"),
        ):
            if not ok:
                raise QbbError("sampling option out of range", where=name, expected=expected, got=value)

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken."""
        return self.temperature == 0


class Sampler:
    """Chooses tokens; the same seed and logits give the same ones."""

    def __init__(self, options: Sampling) -> None:
        self._options, self._random = options, np.random.default_rng(options.seed)

    def choose(self, logits: npt.NDArray[Any], before: list[int]) -> int:
        """A token for logits ``[vocabulary]`` behind the tokens ``before``."""
        options = self._options
        scores = logits.astype(np.float64)
        if options.penalty != 1:
            seen = np.unique(before)
            scores[seen] = np.where(scores[seen] > 0, scores[seen] / options.penalty, scores[seen] * options.penalty)
        if options.greedy:
            return int(scores.argmax())
        order = np.argsort(-scores, kind="stable")[: options.top_k or None]
        p = np.exp((scores[order] - scores[order[0]]) / options.temperature)
        p /= p.sum()
        kept = max(1, int(np.searchsorted(np.cumsum(p), options.top_p)) + 1)
        return int(self._random.choice(order[:kept], p=p[:kept] / p[:kept].sum()))
