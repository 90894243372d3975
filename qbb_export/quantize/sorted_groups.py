"""What the fit needs to know of a group: its weights in ascending order and their sums from the left.

The weights nearest to one level are neighbours in that order. Two positions then tell how many they are and what they
add up to, so that a round of the fit costs the number of levels times log2(group size), not the number of weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qbb_export.quantize.levels import count_below, ladder
from qbb_export.quantize.sums import prefix_sums, tree_sum


@dataclass(frozen=True)
class SortedGroups:
    """Groups of weights prepared for the fit.

    Args:
        values: float32 ``[M, g]``, ascending along the last axis.
        sums: float64 ``[M, g + 1]``, sums of the first 0..g of them.
        energy: float64 ``[M]``, sum of their squares.
    """

    values: Any
    sums: Any
    energy: Any

    @staticmethod
    def of(xp: Any, groups: Any) -> SortedGroups:
        """Prepare float32 ``[M, g]``."""
        values = xp.sort(groups, axis=-1)
        wide = xp.astype(values, xp.float64)
        return SortedGroups(values, prefix_sums(xp, wide), tree_sum(xp, wide * wide))

    def lowest(self, xp: Any) -> Any:
        """float64 ``[M]``."""
        return xp.astype(self.values[:, 0], xp.float64)

    def highest(self, xp: Any) -> Any:
        """float64 ``[M]``."""
        return xp.astype(self.values[:, -1], xp.float64)


@dataclass(frozen=True)
class Partition:
    """The weights of each group, each at its nearest level.

    Args:
        error: float64 ``[M]``, squared error of the group.
        counts: float64 ``[M, 2**N]``, how many weights have each code.
        sums: float64 ``[M, 2**N]``, what they add up to.
    """

    error: Any
    counts: Any
    sums: Any


def partition(xp: Any, groups: SortedGroups, scales: Any, offset: Any | None) -> Partition:
    """Send every weight to its nearest level: float64 scales ``[M, N]``, offset ``[M]`` or None."""
    steps = ladder(xp, scales, offset)
    ends = count_below(xp, groups.values, steps.thresholds(), or_equal=True)
    left = xp.zeros_like(ends[:, :1])
    right = xp.full_like(left, groups.values.shape[-1])
    bounds = xp.concat([left, ends, right], axis=-1)
    upto = xp.take_along_axis(groups.sums, bounds, axis=-1)
    counts = xp.astype(bounds[:, 1:] - bounds[:, :-1], xp.float64)
    sums = upto[:, 1:] - upto[:, :-1]
    # sum of (w - level)^2 = energy + sum over levels of (count * level - 2 * sum) * level
    gain = tree_sum(xp, (counts * steps.values - 2.0 * sums) * steps.values)
    back = xp.argsort(steps.codes, axis=-1)
    return Partition(
        groups.energy + gain,
        xp.take_along_axis(counts, back, axis=-1),
        xp.take_along_axis(sums, back, axis=-1),
    )
