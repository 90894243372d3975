"""Sums whose rounding depends on nothing but the row.

Library reductions choose their order of additions by the shape, the device and the number of threads. These use
element-wise additions in a fixed order instead, so a row gives the same bits whatever block it is worked on with, in
numpy and in torch, on a CPU and on a GPU.
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


def walsh_hadamard(xp: Any, values: Any) -> Any:
    """Signed sums over the last axis: float ``[M, 2**n]`` to ``[M, 2**n]``.

    Column ``m`` is ``sum_c s(m, c) * values[:, c]``, where ``s`` is the product over the set bits i of ``m`` of the
    sign that bit i of ``c`` stands for (1: +1, 0: -1).
    """
    shape, step = values.shape, 1
    while step < shape[-1]:
        pairs = xp.reshape(values, (shape[0], -1, 2, step))
        low, high = pairs[:, :, 0, :], pairs[:, :, 1, :]
        values = xp.reshape(xp.stack([low + high, high - low], axis=2), shape)
        step *= 2
    return values
