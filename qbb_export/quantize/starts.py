"""Where alternating minimisation starts from.

The error has many local minima in the scales. Each start here is good for some shape of distribution; the fit keeps,
group by group, whichever leads furthest.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from qbb_export.quantize.alternating import Fit
from qbb_export.quantize.greedy import greedy
from qbb_export.quantize.sorted_groups import SortedGroups
from qbb_export.quantize.sums import tree_sum
from qbb_export.quantize.uniform import uniform_levels

# How much of the range a uniform quantizer keeps; cutting outliers off makes the steps for all others finer.
CLIPS: Final = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5)

# Scales of the best local minima found from 3000 random starts on 2048 quantiles of the normal distribution (the first
# one or two) and of the Laplace distribution (the others), both of unit mean absolute deviation. Note that they are far
# from powers of two: scales closer to each other spread the levels the way the weights are spread.
SHAPES: Final[dict[int, tuple[tuple[float, ...], ...]]] = {
    1: ((1.00,),),
    2: ((1.23, 0.66), (1.59, 1.00)),
    3: ((1.24, 0.94, 0.57), (1.45, 0.76, 0.38), (1.89, 1.43, 0.83)),
    4: ((1.41, 0.89, 0.70, 0.37), (1.18, 1.02, 0.83, 0.52), (1.85, 1.59, 1.30, 0.84), (2.10, 1.84, 0.97, 0.51)),
    5: ((1.31, 1.22, 0.63, 0.48, 0.31), (1.48, 0.83, 0.73, 0.56, 0.37), (1.80, 1.66, 1.52, 1.25, 0.79)),
}


def shapes(bases: int) -> tuple[tuple[float, ...], ...]:
    """Scales for weights of unit mean absolute deviation; more than five bases go on by halving the last."""
    known = min(bases, max(SHAPES))
    return tuple(s + tuple(s[-1] * 0.5**i for i in range(1, bases - known + 1)) for s in SHAPES[known])


def all_starts(xp: Any, groups: SortedGroups, bases: int, with_offset: bool) -> Iterator[Fit]:
    """Yield one start after the other, so that only one is held at a time."""
    zero = xp.zeros_like(groups.energy) if with_offset else None
    yield Fit(greedy(xp, groups.values, bases)[1], zero)
    yield uniform_levels(xp, groups, bases, with_offset, CLIPS)
    # The mean deviation needs no square root, which some libraries round differently from others.
    mean = groups.sums[:, -1] / groups.values.shape[-1] if with_offset else None
    gaps = xp.astype(groups.values, xp.float64) - (0.0 if mean is None else mean[:, None])
    spread = tree_sum(xp, xp.abs(gaps)) / groups.values.shape[-1]
    for shape in shapes(bases):
        yield Fit(xp.stack([spread * s for s in shape], axis=-1), mean)
