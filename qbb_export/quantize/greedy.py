"""The cascaded analytic initialisation of QBB (Bulat et al. 2024, "QBB: Quantization with Binary Bases for LLMs")."""

from __future__ import annotations

from typing import Any

from qbb_export.quantize.sums import tree_sum


def greedy(xp: Any, groups: Any, bases: int) -> tuple[Any, Any, list[Any]]:
    """Peel one basis after the other off the residual, starting from ``D_1 = W``.

    ``B_i = sign(D_i)`` with ``sign(0) = +1``, ``scale_i = mean |D_i|`` over the group, ``D_{i+1} = D_i - scale_i *
    B_i``.

    Args:
        xp: array namespace.
        groups: float ``[M, g]``.
        bases: number of binary matrices.

    Returns:
        uint8 codes ``[M, g]`` (bit i is 1 where ``B_i`` is +1), float64 scales ``[M, bases]`` and float64 ``[M]``
        squared errors: of no basis at all, then after each one.
    """
    residual = xp.astype(groups, xp.float64)
    codes = xp.zeros_like(groups, dtype=xp.uint8)
    scales = []
    errors = [tree_sum(xp, residual * residual)]
    for i in range(bases):
        positive = residual >= 0.0
        scale = tree_sum(xp, xp.abs(residual)) / groups.shape[-1]
        residual = residual - xp.where(positive, scale[:, None], -scale[:, None])
        codes = codes + xp.astype(positive, xp.uint8) * (1 << i)
        scales.append(scale)
        errors.append(tree_sum(xp, residual * residual))
    return codes, xp.stack(scales, axis=-1), errors
