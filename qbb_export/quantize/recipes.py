"""What is done to the groups of one block: a recipe is a name in one table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from qbb_export.errors import QbbError
from qbb_export.quantize.alternating import Fit, alternate
from qbb_export.quantize.greedy import greedy
from qbb_export.quantize.levels import level_values, nearest_codes
from qbb_export.quantize.multistart import best_fit
from qbb_export.quantize.refine import refine
from qbb_export.quantize.settings import QuantizeSettings
from qbb_export.quantize.sorted_groups import SortedGroups
from qbb_export.quantize.sums import tree_sum
from qbb_export.quantize.uniform import range_levels

FLOAT16_MAX: Final = 65504.0


@dataclass(frozen=True)
class GroupResult:
    """Groups as they are stored.

    Args:
        codes: uint8 ``[M, g]``, bit i is the sign of basis i.
        scales: float32 ``[M, bases]``, values of the stored type.
        offset: float32 ``[M]`` or None.
        errors: float64 ``[M]`` squared errors as the recipe went on, the last of what is stored.

    The same fields hold rows of groups once the groups of a block are put together (see ``matrix``).
    """

    codes: Any
    scales: Any
    offset: Any | None
    errors: Any


Recipe = Callable[[Any, Any, QuantizeSettings, str], GroupResult]


def as_stored(xp: Any, scales: Any, scale_dtype: str) -> Any:
    """Round float64 scales to the stored type and give them back as float32."""
    # By way of float32 on purpose: numpy rounds float64 to float16 in one step, torch in two.
    scales = xp.astype(scales, xp.float32)
    if scale_dtype == "float16":
        scales = xp.astype(xp.astype(xp.clip(scales, max=FLOAT16_MAX), xp.float16), xp.float32)
    return scales


def stored_error(xp: Any, groups: Any, codes: Any, scales: Any, offset: Any | None) -> Any:
    """Squared error of stored values, float64 ``[M]``."""
    wide = None if offset is None else xp.astype(offset, xp.float64)
    levels = level_values(xp, xp.astype(scales, xp.float64), wide)
    gap = xp.take_along_axis(levels, xp.astype(codes, xp.int64), axis=-1) - groups
    return tree_sum(xp, gap * gap)


def stored_fit(xp: Any, groups: Any, fit: Fit, errors: list[Any], scale_dtype: str) -> GroupResult:
    """Scales (largest first) and offset as they are stored, and the code of the level nearest to each weight."""
    scales = as_stored(xp, xp.sort(fit.scales, axis=-1, descending=True), scale_dtype)
    offset = None if fit.offset is None else xp.astype(fit.offset, xp.float32)
    wide = None if offset is None else xp.astype(offset, xp.float64)
    codes = nearest_codes(xp, groups, xp.astype(scales, xp.float64), wide)
    return GroupResult(codes, scales, offset, [*errors, stored_error(xp, groups, codes, scales, offset)])


def fast(xp: Any, groups: Any, settings: QuantizeSettings, scale_dtype: str) -> GroupResult:
    """Multi-start alternating minimisation; codes are chosen last, for the scales as they are stored."""
    fit, errors = best_fit(xp, groups, settings)
    return stored_fit(xp, groups, fit, errors, scale_dtype)


def rtn(xp: Any, groups: Any, settings: QuantizeSettings, scale_dtype: str) -> GroupResult:
    """Round to nearest on equal steps from the smallest weight to the largest: no search, what most tools call RTN."""
    low, high = (xp.astype(end(groups, axis=-1), xp.float64) for end in (xp.min, xp.max))
    fit = range_levels(xp, low, high, settings.bases, bool(settings.offset))
    return stored_fit(xp, groups, fit, [], scale_dtype)


def analytic(xp: Any, groups: Any, settings: QuantizeSettings, scale_dtype: str) -> GroupResult:
    """The paper's initialisation and nothing else; only the storing rounds the scales."""
    if settings.offset:
        raise QbbError("the recipe greedy knows no offset", where="--offset")
    codes, scales, errors = greedy(xp, groups, settings.bases)
    scales = as_stored(xp, scales, scale_dtype)
    return GroupResult(codes, scales, None, [*errors, stored_error(xp, groups, codes, scales, None)])


def refined(xp: Any, groups: Any, settings: QuantizeSettings, scale_dtype: str) -> GroupResult:
    """The paper's weights-only part: its initialisation and its iterative refinement."""
    if settings.offset:
        raise QbbError("the recipe refine knows no offset", where="--offset")
    result = refine(xp, groups, settings)
    codes, scales = result.codes, as_stored(xp, result.scales, scale_dtype)
    error = stored_error(xp, groups, codes, scales, None)
    # Rounding the scales must not make a group worse than its initialisation, which is rounded, too.
    start_scales = as_stored(xp, result.start_scales, scale_dtype)
    start_error = stored_error(xp, groups, result.start_codes, start_scales, None)
    wins = (error <= start_error)[:, None]
    codes, scales = xp.where(wins, codes, result.start_codes), xp.where(wins, scales, start_scales)
    return GroupResult(codes, scales, None, [*result.errors, xp.where(wins[:, 0], error, start_error)])


def settled(xp: Any, groups: Any, settings: QuantizeSettings, scale_dtype: str) -> GroupResult:
    """The paper's weights-only part, then alternating minimisation from there (Xu et al. 2018).

    The refinement changes one basis at a time and rests where no single sign of a weight helps: on normal weights with
    3 bases at 0.051 of their energy, with least-squares scales or without. Levels that are all in view lead to 0.037.
    """
    before = refined(xp, groups, settings, scale_dtype)
    start = Fit(xp.astype(before.scales, xp.float64), None)
    fit, errors = alternate(xp, SortedGroups.of(xp, groups), start, settings.rounds)
    after = stored_fit(xp, groups, fit, [*before.errors, errors[-1]], scale_dtype)
    wins = after.errors[-1] <= before.errors[-1]  # rounding the scales must not lose what was found
    codes, scales = (
        xp.where(wins[:, None], new, old) for new, old in ((after.codes, before.codes), (after.scales, before.scales))
    )
    return GroupResult(codes, scales, None, [*after.errors[:-1], xp.where(wins, after.errors[-1], before.errors[-1])])


RECIPES: Final[Mapping[str, Recipe]] = MappingProxyType(
    {"fast": fast, "greedy": analytic, "rtn": rtn, "refine": refined, "settled": settled}
)


def recipe_by_name(name: str) -> Recipe:
    """Look a recipe up.

    Raises:
        QbbError: for an unknown name.
    """
    if name not in RECIPES:
        raise QbbError("unknown recipe", where="--recipe", expected=f"one of {', '.join(RECIPES)}", got=name)
    return RECIPES[name]
