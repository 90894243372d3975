"""The levels that a group of weights may take, and which weight takes which.

With N bases a weight takes one of ``2**N`` levels ``offset + sum_i ±scale_i``. A *code* names a level: bit i of the
code is the sign of basis i (1: +1, 0: -1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


def level_values(xp: Any, scales: Any, offset: Any | None) -> Any:
    """Levels ordered by their codes: float64 scales ``[M, N]``, offset ``[M]`` or None to float64 ``[M, 2**N]``."""
    base = xp.zeros_like(scales[:, :1]) if offset is None else offset[:, None]
    for i in range(scales.shape[1]):
        scale = scales[:, i : i + 1]
        base = xp.concat([base - scale, base + scale], axis=1)
    return base


def count_below(xp: Any, rows: Any, queries: Any, *, or_equal: bool) -> Any:
    """How many entries of an ascending row are below each query, by binary search.

    The array API's own ``searchsorted`` takes one row only.

    Args:
        xp: array namespace.
        rows: float ``[M, n]``, ascending along the last axis.
        queries: float ``[M, q]``.
        or_equal: count entries equal to the query too.

    Returns:
        int64 ``[M, q]``, values 0..n.
    """
    n = rows.shape[-1]
    found = xp.zeros(queries.shape, dtype=xp.int64, device=rows.device)
    step = 1 << (n.bit_length() - 1)
    exact = n + 1 == 2 * step  # then no probe can pass the end
    while step:
        probe = found + (step - 1)
        value = xp.take_along_axis(rows, probe if exact else xp.clip(probe, max=n - 1), axis=-1)
        below = value <= queries if or_equal else value < queries
        if not exact:
            below = below & (probe < n)
        found = found + step * xp.astype(below, xp.int64)
        step //= 2
    return found


@dataclass(frozen=True)
class Ladder:
    """Levels in ascending order.

    Args:
        codes: int64 ``[M, 2**N]``, the code of each level.
        values: float64 ``[M, 2**N]``, ascending.
    """

    codes: Any
    values: Any

    def thresholds(self) -> Any:
        """Midpoints between neighbours, float64 ``[M, 2**N - 1]``; a weight on one belongs to the lower level."""
        return (self.values[:, 1:] + self.values[:, :-1]) * 0.5


def ladder(xp: Any, scales: Any, offset: Any | None) -> Ladder:
    """Sort the levels of each group; equal levels stay in the order of their codes."""
    values = level_values(xp, scales, offset)
    codes = xp.argsort(values, axis=-1, stable=True)
    return Ladder(codes, xp.take_along_axis(values, codes, axis=-1))


def nearest_codes(xp: Any, groups: Any, scales: Any, offset: Any | None) -> Any:
    """The code of the level nearest to each weight: float ``[M, g]`` to uint8 ``[M, g]``."""
    steps = ladder(xp, scales, offset)
    index = count_below(xp, steps.thresholds(), groups, or_equal=False)
    return xp.take_along_axis(xp.astype(steps.codes, xp.uint8), index, axis=-1)
