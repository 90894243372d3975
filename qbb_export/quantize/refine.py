"""Stage 2 of QBB (Bulat et al. 2024, "QBB: Quantization with Binary Bases for LLMs"): iterative refinement.

``||W - sum_i scale_i B_i||^2`` is minimised by straight-through estimation: ``B_i = sign(L_i)`` with ``sign(0) = +1``,
where ``L_i`` is a latent weight that takes the gradient of ``B_i`` as its own. There is one stage for each basis; in
it only that basis trains, the others stay, and all scales train. ``order="simultaneous"`` trains all bases in one
stage of as many steps (the paper's Figure 7: worse).

The paper gives neither optimizer nor rates. Ours: Adamax (Kingma and Ba 2015) with analytic gradients and a rate that
falls linearly to zero, on weights divided by their group's mean magnitude. A latent weight starts as the residual
that its basis has to explain, ``W - sum_{j != i} scale_j B_j``, divided by its group's mean magnitude: small residuals
then flip within a few steps (latents of ±1 would not in thousands). A straight-through estimator does not settle but
dithers, so each group keeps the best iterate that it saw, starts the next stage from it, and ends with least-squares
scales for its codes.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from qbb_export.quantize.alternating import RIDGE, solve_positive
from qbb_export.quantize.greedy import greedy
from qbb_export.quantize.rows import device_blocks
from qbb_export.quantize.settings import QuantizeSettings, RefineSettings
from qbb_export.quantize.sums import tree_sum

# Weights trained at once: all arrays of a step stay in a CPU's cache. It changes no result.
PIECE: Final = 1 << 15
# Gradients below it count as none: the last scale of the cascade begins with a gradient that is but a rounding error.
EPSILON: Final = 1e-6


@dataclass(frozen=True)
class Refined:
    """Groups of weights before and after the refinement.

    Args:
        start_codes: uint8 ``[M, g]``, codes of the initialisation (bit i is 1 where ``B_i`` is +1).
        start_scales: float64 ``[M, bases]``, its scales.
        codes: uint8 ``[M, g]``, codes at the end.
        scales: float64 ``[M, bases]``, at the end, none negative.
        errors: float64 ``[M]`` squared errors: of no basis at all, of the initialisation, after each stage (one for
            each basis, or one in all if simultaneous), and with least-squares scales. For one group none of them is
            above the one before, except that of the initialisation where that is not cascaded.
    """

    start_codes: Any
    start_scales: Any
    codes: Any
    scales: Any
    errors: list[Any]


@dataclass
class _State:
    """The best that each group has seen: signs float32 ``[M, g]`` (±1), scales float64 ``[M, N]``, error ``[M]``."""

    signs: list[Any]
    scales: Any
    error: Any

    def offer(self, xp: Any, wide: Any, signs: list[Any], scales: Any) -> None:
        """Take signs and scales over for the groups in which they are better."""
        error = _squared_error(xp, wide, signs, scales)
        wins = error < self.error
        for i, (new, old) in enumerate(zip(signs, self.signs, strict=True)):
            if new is not old:
                self.signs[i] = xp.where(wins[:, None], new, old)
        self.scales = xp.where(wins[:, None], scales, self.scales)
        self.error = xp.where(wins, error, self.error)


class _Adamax:
    """Adamax for one array (Kingma and Ba 2015, algorithm 2); the caller gives the rate of each step.

    Adam itself needs square roots, which PyTorch rounds differently from numpy.
    """

    def __init__(self, xp: Any, like: Any, betas: tuple[float, float]) -> None:
        self._xp, self._betas, self._time = xp, betas, 0
        self._mean, self._peak = xp.zeros_like(like), xp.zeros_like(like)

    def step(self, values: Any, gradient: Any, rate: float) -> Any:
        """The values after one step."""
        b1, b2 = self._betas
        self._time += 1
        self._mean = self._mean * b1 + gradient * (1.0 - b1)
        self._peak = self._xp.maximum(self._peak * b2, self._xp.abs(gradient) + EPSILON)
        return values - self._mean * (rate / (1.0 - b1**self._time)) / self._peak


def refine(xp: Any, groups: Any, settings: QuantizeSettings) -> Refined:
    """Initialise and refine groups of weights; no group depends on another.

    Args:
        xp: array namespace.
        groups: float32 ``[M, g]``.
        settings: ``bases`` and ``refine`` are used.

    Returns:
        Codes and scales at the start and at the end. They are never worse than the initialisation.
    """
    height = max(1, PIECE * device_blocks(groups) // groups.shape[1])
    pieces = [_refine(xp, groups[i : i + height], settings) for i in range(0, groups.shape[0], height)]
    return Refined(
        start_codes=xp.concat([p.start_codes for p in pieces], axis=0),
        start_scales=xp.concat([p.start_scales for p in pieces], axis=0),
        codes=xp.concat([p.codes for p in pieces], axis=0),
        scales=xp.concat([p.scales for p in pieces], axis=0),
        errors=[xp.concat(list(same), axis=0) for same in zip(*(p.errors for p in pieces), strict=True)],
    )


def initial(xp: Any, groups: Any, bases: int, init: str) -> tuple[Any, Any]:
    """Codes uint8 ``[M, g]`` and scales float64 ``[M, bases]`` of an initialisation.

    1. ``cascaded``: the paper's; each basis takes the sign of what those before it leave (``greedy``)
    2. ``independent``: every basis from W itself, ``B_i = sign(W - t_i)``, ``scale_i = mean|W| / bases``. Equal bases
       would have equal gradients and stay equal, so their thresholds differ: ``t_i / mean|W|`` takes equal steps,
       -1/2 and 1/2 for two bases, -3/4, -1/4, 1/4, 3/4 for four
    3. ``random``: fixed random signs, the same for every group, so that a group does not depend on its place;
       ``scale_i = mean|W| / bases``
    """
    if init == "cascaded":
        codes, scales, _ = greedy(xp, groups, bases)
        return codes, scales
    wide = xp.astype(groups, xp.float64)
    mean = tree_sum(xp, xp.abs(wide)) * (1.0 / groups.shape[1])
    codes = xp.zeros_like(groups, dtype=xp.uint8)
    for i in range(bases):
        if init == "independent":
            positive = wide >= mean[:, None] * ((2 * i + 1 - bases) / bases)
        else:
            positive = xp.asarray(random_signs(groups.shape[1], i), device=groups.device)[None, :]
        codes = codes + xp.astype(positive, xp.uint8) * (1 << i)
    return codes, xp.stack([mean * (1.0 / bases)] * bases, axis=-1)


def random_signs(count: int, basis: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """bool ``[count]``: bits of SHAKE-128 of the number of the basis, the same for ever and on every machine."""
    octets = hashlib.shake_128(f"qbb random basis {basis}".encode("ascii")).digest(-(-count // 8))
    return np.unpackbits(np.frombuffer(octets, dtype=np.uint8), count=count).astype(np.bool_)


def flipped_shares(xp: Any, before: Any, after: Any, bases: int) -> list[float]:
    """Share of signs that differ between two arrays of codes, uint8 of one shape, for each basis; 0..1."""
    changed, count = before ^ after, math.prod(before.shape)
    return [float(xp.sum(xp.astype(changed >> i & 1, xp.int64))) / count for i in range(bases)]


def _refine(xp: Any, groups: Any, settings: QuantizeSettings) -> Refined:
    chosen, bases = settings.refine, settings.bases
    start_codes, start_scales = initial(xp, groups, bases, chosen.init)
    wide = xp.astype(groups, xp.float64)
    mean = tree_sum(xp, xp.abs(wide)) * (1.0 / groups.shape[1])
    unit = xp.where(mean > 0.0, mean, xp.ones_like(mean))[:, None]
    # Gradients are noise enough for float32; what is kept is decided in float64.
    narrow = xp.astype(wide / unit, xp.float32)
    signs = _signs(xp, start_codes, bases)
    state = _State(signs, start_scales, _squared_error(xp, wide, signs, start_scales))
    errors = [tree_sum(xp, wide * wide), state.error]
    stages = [[i] for i in range(bases)] if chosen.order == "sequential" else [list(range(bases))]
    for trained in stages:
        steps = chosen.steps * bases // len(stages)
        scales = xp.astype(state.scales / unit, xp.float32)
        found, scales = _train(xp, narrow, state.signs, scales, trained, steps, chosen)
        state.offer(xp, wide, found, xp.astype(scales, xp.float64) * unit)
        errors.append(state.error)
    state.offer(xp, wide, state.signs, _least_squares(xp, wide, state.signs))
    errors.append(state.error)
    codes = xp.zeros_like(start_codes)
    for i, sign in enumerate(state.signs):  # a negative scale is a positive one with the other signs
        positive = (sign > 0) == (state.scales[:, i : i + 1] >= 0.0)
        codes = codes + xp.astype(positive, xp.uint8) * (1 << i)
    return Refined(start_codes, start_scales, codes, xp.abs(state.scales), errors)


def _train(
    xp: Any, target: Any, signs: list[Any], scales: Any, trained: list[int], steps: int, chosen: RefineSettings
) -> tuple[list[Any], Any]:
    """One stage on float32 ``[M, g]``: the best signs and scales of each group; others than ``trained`` stay."""
    best_signs, best_scales = list(signs), scales
    residual = _residual(target, signs, scales)
    best = tree_sum(xp, residual * residual)
    latent = {i: _unit(xp, residual + signs[i] * scales[:, i : i + 1]) for i in trained}
    latent_rule = {i: _Adamax(xp, target, chosen.betas) for i in trained}
    scale_rule = _Adamax(xp, scales, chosen.betas)
    plus = xp.ones_like(target[:1, :1])
    signs = list(signs)
    for step in range(steps + 1):
        for i in trained:
            signs[i] = xp.where(latent[i] >= 0.0, plus, -plus)
        residual = _residual(target, signs, scales)
        error = tree_sum(xp, residual * residual)
        wins = error < best
        if bool(xp.any(wins)):
            best = xp.where(wins, error, best)
            best_scales = xp.where(wins[:, None], scales, best_scales)
            for i in trained:
                best_signs[i] = xp.where(wins[:, None], signs[i], best_signs[i])
        if step == steps:
            break
        # Gradients of half the squared error; Adamax does not mind a factor.
        falling = 1.0 - step / steps
        pull = xp.stack([tree_sum(xp, sign * residual) for sign in signs], axis=-1) * (-1.0 / target.shape[1])
        for i in trained:
            gradient = residual * -scales[:, i : i + 1]
            latent[i] = latent_rule[i].step(latent[i], gradient, chosen.latent_rate * falling)
        scales = scale_rule.step(scales, pull, chosen.scale_rate * falling)
    return best_signs, best_scales


def _least_squares(xp: Any, wide: Any, signs: list[Any]) -> Any:
    """Scales float64 ``[M, N]`` that minimise the squared error for given signs; they may be negative."""
    size = wide.shape[1]
    bases = [xp.astype(sign, xp.float64) for sign in signs]
    matrix = [[tree_sum(xp, a * b) + (RIDGE * size if a is b else 0.0) for b in bases] for a in bases]
    return xp.stack(solve_positive(matrix, [tree_sum(xp, a * wide) for a in bases]), axis=-1)


def _signs(xp: Any, codes: Any, bases: int) -> list[Any]:
    """float32 ``[M, g]`` of ±1 for each bit of codes."""
    return [xp.astype(codes >> i & 1, xp.float32) * 2.0 - 1.0 for i in range(bases)]


def _residual(target: Any, signs: list[Any], scales: Any) -> Any:
    """``target - sum_i scale_i B_i``, of the dtype of target and scales."""
    for i, sign in enumerate(signs):
        target = target - sign * scales[:, i : i + 1]
    return target


def _squared_error(xp: Any, wide: Any, signs: list[Any], scales: Any) -> Any:
    """float64 ``[M]``."""
    residual = _residual(wide, signs, scales)
    return tree_sum(xp, residual * residual)


def _unit(xp: Any, values: Any) -> Any:
    """Values over their group's mean magnitude; zeros stay."""
    mean = tree_sum(xp, xp.abs(values))[:, None] * (1.0 / values.shape[1])
    return values / xp.where(mean > 0.0, mean, xp.ones_like(mean))
