"""Quantization in the metric of a layer's inputs: ``||(W - Q) X||^2`` instead of ``||W - Q||^2``.

With ``H = X Xᵀ`` over sample inputs the error of a row is ``r H rᵀ``, ``r = w - q``. Three steps lower it, all on the
``2**bases`` levels of binary codes instead of a uniform grid:

* the *sweep* of GPTQ (Frantar et al. 2022, arXiv 2210.17323): columns one after the other, those with the largest
  ``H[j, j]`` first, each error passed on to the columns that are still open;
* *least squares* for the scales and offset of one group after the other, codes fixed;
* *coordinate descent* on the codes: each weight to the level that is best given all others.

The last two are exact minimisations over some of the unknowns, so neither can increase the error.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Final

from array_api_compat import array_namespace

from qbb_export.quantize.alternating import solve_positive
from qbb_export.quantize.levels import level_values

# Columns whose updates are gathered before they reach the others (as in GPTQ; it changes the speed only).
COLUMN_BLOCK: Final = 128
# Of the trace of H; well above what float32 products leave uncertain.
RIDGE: Final = 1e-6


@dataclass(frozen=True)
class Codes:
    """A matrix ``[N, K]`` as codes and levels, all on one device.

    Args:
        codes: uint8 ``[N, K]``, bit i is the sign of basis i.
        scales: float32 ``[N, G, bases]``, none negative.
        offset: float32 ``[N, G]`` or None.
        group_size: inputs that share a scale.
    """

    codes: Any
    scales: Any
    offset: Any | None
    group_size: int

    def levels(self, xp: Any) -> Any:
        """float32 ``[N, G, 2**bases]``, ordered by code."""
        N, G, bases = self.scales.shape
        offset = None if self.offset is None else xp.reshape(self.offset, (N * G,))
        return xp.reshape(level_values(xp, xp.reshape(self.scales, (N * G, bases)), offset), (N, G, 2**bases))

    def dense(self, xp: Any) -> Any:
        """float32 ``[N, K]``."""
        levels, parts = self.levels(xp), []
        for g, columns in enumerate(group_slices(self.codes.shape[1], self.group_size)):
            index = xp.astype(self.codes[:, columns], xp.int64)
            parts.append(xp.take_along_axis(levels[:, g, :], index, axis=-1))
        return xp.concat(parts, axis=1)


def group_slices(K: int, group_size: int) -> list[slice]:
    """The columns of each group; the last may have fewer."""
    return [slice(start, min(K, start + group_size)) for start in range(0, K, group_size)]


def error(xp: Any, weights: Any, approximation: Any, hessian: Any) -> Any:
    """``r H rᵀ`` of each row, float ``[N]``."""
    gap = weights - approximation
    return xp.sum((gap @ hessian) * gap, axis=-1)


def damped(xp: Any, hessian: Any, damping: float) -> Any:
    """``H`` with a part of its mean diagonal added, so that it is positive definite whatever the samples were."""
    K = hessian.shape[0]
    diagonal = xp.linalg.diagonal(hessian)
    mean = xp.mean(diagonal)
    mean = xp.where(mean > 0, mean, xp.ones_like(mean))
    return hessian + xp.eye(K, dtype=hessian.dtype, device=hessian.device) * (damping * mean)


def inverse_factor(xp: Any, hessian: Any) -> Any:
    """Upper triangular ``U`` with ``inv(H) = Uᵀ U``, float64 ``[K, K]``.

    Of the reversed matrix ``J H J = L Lᵀ`` follows ``H = (J L J)(J L J)ᵀ`` with an upper triangular factor.
    """
    reverse = xp.flip(xp.astype(hessian, xp.float64), axis=(0, 1))
    upper = xp.flip(xp.linalg.cholesky(reverse), axis=(0, 1))
    return xp.linalg.inv(upper)


class _Nearest:
    """The nearest level for one input of all rows, by tables ``[G, levels, N]``.

    Inputs come first here and below, so that the values of one input lie side by side.
    """

    def __init__(self, xp: Any, levels: Any) -> None:
        self._xp = xp
        order = xp.argsort(levels, axis=-1, stable=True)
        values = xp.take_along_axis(levels, order, axis=-1)
        self._codes = _inputs_first(xp, xp.astype(order, xp.uint8))
        self._values = _inputs_first(xp, values)
        self._middles = _inputs_first(xp, (values[..., 1:] + values[..., :-1]) * 0.5)

    def __call__(self, group: int, wanted: Any) -> tuple[Any, Any]:
        """Codes uint8 ``[N]`` and values ``[N]`` for the values wanted ``[N]`` in a group."""
        xp = self._xp
        above = wanted[None, :] > self._middles[group]
        index = xp.sum(above, axis=0, dtype=xp.int64)[None, :]
        codes = xp.take_along_axis(self._codes[group], index, axis=0)[0]
        return codes, xp.take_along_axis(self._values[group], index, axis=0)[0]


def _inputs_first(xp: Any, table: Any) -> Any:
    """``[N, G, levels]`` to ``[G, levels, N]``, in that order in memory."""
    return xp.permute_dims(table, (1, 2, 0)) + xp.zeros_like(table[0, 0, 0])


def sweep(weights: Any, hessian: Any, start: Codes, *, act_order: bool = True) -> Codes:
    """GPTQ's pass over the columns on fixed levels.

    Args:
        weights: float32 ``[N, K]``.
        hessian: float ``[K, K]``, positive definite (see :func:`damped`).
        start: whose scales and offset give the levels; its codes are not used.
        act_order: columns with the largest diagonal first, else from left to right.

    Returns:
        ``start`` with new codes.
    """
    xp = array_namespace(weights)
    K = weights.shape[1]
    diagonal = xp.linalg.diagonal(hessian)
    order = xp.argsort(-diagonal, stable=True) if act_order else xp.arange(K, device=weights.device)
    columns = [int(c) for c in order]
    factor = xp.astype(inverse_factor(xp, hessian[order, :][:, order]), weights.dtype)
    factor = factor / xp.linalg.diagonal(factor)[:, None]  # each error is passed on in units of itself
    left = xp.take(weights.T, order, axis=0)  # [K, N], a copy
    codes = xp.zeros_like(start.codes.T)
    nearest = _Nearest(xp, start.levels(xp))
    for begin in range(0, K, COLUMN_BLOCK):
        end = min(K, begin + COLUMN_BLOCK)
        block, part = left[begin:end], factor[begin:end, begin:end]
        gaps = xp.zeros_like(block)
        for j in range(end - begin):
            column = columns[begin + j]
            codes[column], value = nearest(column // start.group_size, block[j])
            gaps[j] = block[j] - value
            block[j + 1 :] -= part[j, j + 1 :][:, None] * gaps[j][None, :]
        left[end:] -= factor[begin:end, end:].T @ gaps
    return replace(start, codes=codes.T + 0)


def refit_levels(weights: Any, hessian: Any, state: Codes) -> Codes:
    """Least squares for scales and offset in the metric of H, one group after the other, codes fixed."""
    xp = array_namespace(weights)
    bases = state.scales.shape[-1]
    gap = weights - state.dense(xp)
    scales, codes = state.scales + 0.0, state.codes + 0
    offset = None if state.offset is None else state.offset + 0.0
    for g, columns in enumerate(group_slices(weights.shape[1], state.group_size)):
        signs = [xp.astype(codes[:, columns] >> b & 1, weights.dtype) * 2 - 1 for b in range(bases)]
        if offset is not None:
            signs.append(xp.ones_like(signs[0]))
        inner = hessian[columns, columns]
        push = gap @ hessian[:, columns]  # [N, g]
        seen = [s @ inner for s in signs]
        # Codes may leave bases dependent; a step along what they cannot tell apart is kept small.
        ridge = xp.linalg.trace(inner) * RIDGE
        matrix = [
            [_wide_sum(xp, a * s) + (ridge if i == j else 0.0) for j, s in enumerate(signs)] for i, a in enumerate(seen)
        ]
        steps = [
            xp.astype(step, weights.dtype) for step in solve_positive(matrix, [_wide_sum(xp, push * s) for s in signs])
        ]
        gap[:, columns] = gap[:, columns] - sum(step[:, None] * s for step, s in zip(steps, signs, strict=True))
        for b in range(bases):
            scale = scales[:, g, b] + steps[b]
            # A negative scale names the same levels with the signs turned around.
            turned = xp.astype(scale < 0, xp.uint8) << b
            codes[:, columns] = codes[:, columns] ^ turned[:, None]
            scales[:, g, b] = xp.abs(scale)
        if offset is not None:
            offset[:, g] = offset[:, g] + steps[bases]
    return Codes(codes, scales, offset, state.group_size)


def _wide_sum(xp: Any, values: Any) -> Any:
    """Over the last axis, in float64: small systems are solved from these."""
    return xp.sum(xp.astype(values, xp.float64), axis=-1)


def descend(weights: Any, hessian: Any, state: Codes) -> Codes:
    """Coordinate descent: each column in turn to the levels that are best given all other columns."""
    xp = array_namespace(weights)
    K = weights.shape[1]
    dense = state.dense(xp).T + 0.0  # [K, N]
    gap = weights.T - dense
    diagonal = xp.linalg.diagonal(hessian)
    codes = state.codes.T + 0
    nearest = _Nearest(xp, state.levels(xp))
    for begin in range(0, K, COLUMN_BLOCK):
        end = min(K, begin + COLUMN_BLOCK)
        inner = hessian[begin:end, begin:end]
        push = hessian[begin:end, :] @ gap
        for j in range(end - begin):
            column = begin + j
            wanted = dense[column] + push[j] / diagonal[column]
            codes[column], value = nearest(column // state.group_size, wanted)
            step = value - dense[column]
            gap[column] -= step
            push[j + 1 :] -= inner[j + 1 :, j][:, None] * step[None, :]
    return replace(state, codes=codes.T + 0)


def keep_better(weights: Any, hessian: Any, old: Codes, new: Codes) -> Codes:
    """Row by row the one with the smaller error (rounding may make an exact step a hair worse)."""
    xp = array_namespace(weights)
    wins = error(xp, weights, new.dense(xp), hessian) < error(xp, weights, old.dense(xp), hessian)
    return Codes(
        xp.where(wins[:, None], new.codes, old.codes),
        xp.where(wins[:, None, None], new.scales, old.scales),
        None if old.offset is None else xp.where(wins[:, None], new.offset, old.offset),
        old.group_size,
    )
