"""Alternating minimisation of ``||W - sum_i scale_i B_i - offset||^2``.

The method is that of Xu et al. 2018, "Alternating Multi-bit Quantization for Recurrent Neural Networks".

Two exact steps take turns: least-squares scales for the given codes, and the nearest level for each weight given the
scales. Neither can increase the error, so the process settles in a local minimum; several starts guard against poor
ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from qbb_export.quantize.sorted_groups import Partition, SortedGroups, partition
from qbb_export.quantize.sums import walsh_hadamard

# Relative to the weights in a group. Codes that leave two bases dependent make the normal matrix singular; this much
# on its diagonal keeps the solution finite, and is far below what a float32 weight can tell.
RIDGE: Final = 1e-10


@dataclass(frozen=True)
class Fit:
    """Scales of each group, float64 ``[M, N]``, and offset, float64 ``[M]`` or None."""

    scales: Any
    offset: Any | None


def least_squares(xp: Any, parts: Partition, bases: int, with_offset: bool) -> Fit:
    """Scales (and offset) that minimise the squared error for the codes of a partition.

    The normal matrix holds the dot products of the bases, and its right side those of the bases with the weights.
    Both are signed sums over the codes, hence entries of a Walsh-Hadamard transform of the counts and sums.
    """
    counts = walsh_hadamard(xp, parts.counts)
    sums = walsh_hadamard(xp, parts.sums)
    masks = [1 << i for i in range(bases)] + ([0] if with_offset else [])
    ridge = RIDGE * counts[:, 0]
    matrix = [[counts[:, a ^ b] + ridge if a == b else counts[:, a ^ b] for b in masks] for a in masks]
    solution = solve_positive(matrix, [sums[:, a] for a in masks])
    # A negative scale names the same levels as a positive one.
    scales = xp.stack([xp.abs(s) for s in solution[:bases]], axis=-1)
    return Fit(scales, solution[bases] if with_offset else None)


def solve_positive(matrix: list[list[Any]], right: list[Any]) -> list[Any]:
    """Solve many small positive definite systems at once, by elimination (entries are arrays ``[M]``).

    Only the upper triangle is read; a positive definite matrix needs no pivoting.
    """
    n = len(right)
    rows = [list(row) for row in matrix]
    right = list(right)
    for i in range(n):
        for j in range(i + 1, n):
            factor = rows[i][j] / rows[i][i]
            for k in range(j, n):
                rows[j][k] = rows[j][k] - factor * rows[i][k]
            right[j] = right[j] - factor * right[i]
    for i in reversed(range(n)):
        for j in range(i + 1, n):
            right[i] = right[i] - rows[i][j] * right[j]
        right[i] = right[i] / rows[i][i]
    return right


def better(xp: Any, wins: Any, new: Fit, old: Fit) -> Fit:
    """Per group: ``new`` where bool ``wins`` ``[M]``, else ``old``."""
    scales = xp.where(wins[:, None], new.scales, old.scales)
    if new.offset is None or old.offset is None:
        return Fit(scales, None)
    return Fit(scales, xp.where(wins, new.offset, old.offset))


def alternate(xp: Any, groups: SortedGroups, start: Fit, rounds: int) -> tuple[Fit, list[Any]]:
    """Alternate from one start until nothing improves or ``rounds`` are done.

    Returns:
        The fit, and float64 ``[M]`` squared errors: of the start, then after each round (``rounds + 1`` entries, none
        of them above the one before).
    """
    bases, with_offset = start.scales.shape[1], start.offset is not None
    best, parts = start, partition(xp, groups, start.scales, start.offset)
    errors = [parts.error]
    moving = xp.ones_like(parts.error, dtype=xp.bool)
    for _ in range(rounds):
        fit = least_squares(xp, parts, bases, with_offset)
        parts = partition(xp, groups, fit.scales, fit.offset)
        # A group that came to rest stays there: how long the others go on must not matter to it.
        moving = moving & (parts.error < errors[-1])
        if not bool(xp.any(moving)):
            break
        best = better(xp, moving, fit, best)
        errors.append(xp.where(moving, parts.error, errors[-1]))
    return best, errors + errors[-1:] * (rounds + 1 - len(errors))
