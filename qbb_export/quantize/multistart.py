"""Alternating minimisation from several starts, the best kept group by group."""

from __future__ import annotations

from typing import Any, Final

from qbb_export.quantize.alternating import Fit, alternate, better
from qbb_export.quantize.settings import QuantizeSettings
from qbb_export.quantize.sorted_groups import SortedGroups
from qbb_export.quantize.starts import all_starts

# Rounds that tell a good start from a poor one; most of the gain lies in the first few.
TRIAL_ROUNDS: Final = 4
SHAKE_ROUNDS: Final = 6
SHAKE_SIZE: Final = 0.25
GOLDEN: Final = 0.6180339887498949


def shaken(xp: Any, fit: Fit, number: int) -> Fit:
    """Change every scale by up to a quarter, along a fixed sequence: multiples of the golden ratio, modulo 1."""
    bases = fit.scales.shape[1]
    turns = [((number * (bases + 1) + i) * GOLDEN) % 1.0 * 2.0 - 1.0 for i in range(bases + 1)]
    scales = xp.stack([fit.scales[:, i] * (1.0 + SHAKE_SIZE * turns[i]) for i in range(bases)], axis=-1)
    if fit.offset is None:
        return Fit(scales, None)
    return Fit(scales, fit.offset + SHAKE_SIZE * turns[bases] * xp.min(fit.scales, axis=-1))


def best_fit(xp: Any, groups: Any, settings: QuantizeSettings) -> tuple[Fit, list[Any]]:
    """Fit float32 ``[M, g]``: try each start briefly, follow the best to its minimum, then try to shake it off that.

    Returns:
        The fit, and float64 ``[M]`` squared errors, none above the one before: of the best trial, after each of
        ``settings.rounds`` rounds from there, and after the shakes.
    """
    prepared = SortedGroups.of(xp, groups)
    best: Fit | None = None
    error: Any = None
    for start in all_starts(xp, prepared, settings.bases, bool(settings.offset)):
        fit, trace = alternate(xp, prepared, start, min(TRIAL_ROUNDS, settings.rounds))
        best, error = _keep(xp, fit, trace[-1], best, error)
    assert best is not None
    best, errors = alternate(xp, prepared, best, settings.rounds)
    error = errors[-1]
    for number in range(1, settings.shakes + 1):
        fit, trace = alternate(xp, prepared, shaken(xp, best, number), SHAKE_ROUNDS)
        best, error = _keep(xp, fit, trace[-1], best, error)
    return best, [*errors, error]


def _keep(xp: Any, fit: Fit, new: Any, best: Fit | None, error: Any) -> tuple[Fit, Any]:
    """Per group, the better of a fit with errors ``new`` and the best so far."""
    if best is None:
        return fit, new
    wins = new < error
    return better(xp, wins, fit, best), xp.where(wins, new, error)
