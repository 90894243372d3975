"""Equal steps between two ends, said in binary bases: what round-to-nearest quantizers use.

``2**N`` levels a ``step`` apart are ``offset + sum_i ±step * 2**(i-1)`` for i = 0..N-1, with the offset in the middle
of the range: exactly, since a power of two only moves the binary point.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qbb_export.quantize.alternating import Fit, better
from qbb_export.quantize.sorted_groups import SortedGroups, partition


def range_levels(xp: Any, low: Any, high: Any, bases: int, with_offset: bool, clip: float = 1.0) -> Fit:
    """Equal steps over ``clip`` times the range of each group.

    Args:
        xp: array namespace.
        low: float64 ``[M]``, smallest weight of each group.
        high: float64 ``[M]``, largest.
        bases: number of binary matrices; the range has ``2**bases - 1`` steps.
        with_offset: from low to high; else the range is made symmetric to zero, from ``-max(|low|, |high|)``.
        clip: how much of the range is kept.

    Returns:
        float64 scales ``[M, bases]``, ascending, and the offset ``[M]`` or None.
    """
    low, high = low + 0.0, high + 0.0  # makes -0.0 to 0.0: libraries differ in which of them is the smallest
    if not with_offset:
        high = xp.where(-low > high, -low, high)
        low = -high
    step = (high - low) * (clip / (2**bases - 1))
    scales = xp.stack([step * 2.0 ** (i - 1) for i in range(bases)], axis=-1)
    return Fit(scales, (low + high) * (clip / 2.0) if with_offset else None)


def uniform_levels(xp: Any, groups: SortedGroups, bases: int, with_offset: bool, clips: Sequence[float]) -> Fit:
    """Equal steps over the range of each group, with the clip that gives it the smallest squared error.

    Args:
        xp: array namespace.
        groups: the weights.
        bases: number of binary matrices.
        with_offset: asymmetric levels (see :func:`range_levels`).
        clips: shares of the range to try, at least one; of equally good ones the first.
    """
    low, high = groups.lowest(xp), groups.highest(xp)
    best = range_levels(xp, low, high, bases, with_offset, clips[0])
    if len(clips) == 1:
        return best
    error = partition(xp, groups, best.scales, best.offset).error
    for clip in clips[1:]:
        fit = range_levels(xp, low, high, bases, with_offset, clip)
        new = partition(xp, groups, fit.scales, fit.offset).error
        wins = new < error
        best, error = better(xp, wins, fit, best), xp.where(wins, new, error)
    return best
