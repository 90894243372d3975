"""Sums whose rounding depends on nothing but the row.

Library reductions choose their order of additions by the shape, the device and the number of threads. These use element-wise
additions in a fixed order instead, so a row gives the same bits whatever block it is worked on with, in numpy and in torch, on
a CPU and on a GPU.
"""

from __future__ import annotations

from typing import Any


def tree_sum(xp: Any, values: Any) -> Any:
    """Sum over the last axis by repeated halving: float ``[..., n]`` to ``[...]``, of the same dtype."""
    n = values.shape[-1]
    while n > 1:
        half = n // 2
        folded = values[..., :half] + values[..., half : 2 * half]
        if n % 2:
            folded = xp.concat([folded, values[..., n - 1 : n]], axis=-1)
        values = folded
        n = values.shape[-1]
    return values[..., 0]


def prefix_sums(xp: Any, values: Any) -> Any:
    """Sums of the first 0..n entries of each row: float ``[..., n]`` to ``[..., n + 1]`` (Hillis and Steele, 1986)."""
    zero = xp.zeros_like(values[..., :1])
    sums, step = values, 1
    while step < values.shape[-1]:
        sums = xp.concat([sums[..., :step], sums[..., step:] + sums[..., :-step]], axis=-1)
        step *= 2
    return xp.concat([zero, sums], axis=-1)


def walsh_hadamard(xp: Any, values: Any) -> list[Any]:
    """Signed sums over the last axis: ``[M, 2**n]`` to a list of ``2**n`` arrays ``[M]``.

    Entry ``m`` is ``sum_c s(m, c) * values[:, c]``, where ``s`` is the product over the set bits i of ``m`` of the sign that
    bit i of ``c`` stands for (1: +1, 0: -1).
    """
    columns = [values[:, c] for c in range(values.shape[-1])]
    step = 1
    while step < len(columns):
        for low in range(0, len(columns), 2 * step):
            for c in range(low, low + step):
                columns[c], columns[c + step] = columns[c] + columns[c + step], columns[c + step] - columns[c]
        step *= 2
    return columns
