"""One weight matrix, a block of rows at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from qbb_export.errors import QbbError
from qbb_export.format import MAX_BASES, effective_group_size, pack_words
from qbb_export.quantize.quantized import Quantized, rows_spec
from qbb_export.quantize.recipes import GroupResult, Recipe, recipe_by_name
from qbb_export.quantize.rows import WeightRows, as_rows, device_blocks, row_blocks, to_host
from qbb_export.quantize.settings import OFFSET_UP_TO, QuantizeSettings
from qbb_export.quantize.sums import tree_sum

# Weights of whole groups fitted at once; like ``rows.BLOCK`` it bounds the memory and changes no result.
GROUP_BLOCK: Final = 1 << 19

# Up to how many bases a recipe adds an offset where the settings leave it open; a recipe that is not here adds none.
# Plain round-to-nearest is asymmetric at any number.
OFFSET_DEFAULTS: Final[Mapping[str, int]] = MappingProxyType({"fast": OFFSET_UP_TO, "rtn": MAX_BASES})

# Largest weights for which "auto" stores float16 scales: above, scales could overflow (65504); below, small scales
# would fall among the subnormals of float16 (under 6.1e-5) and lose their precision.
FLOAT16_PEAKS: Final = (2.0**-10, 2.0**15)


def quantize(
    weights: Any,
    settings: QuantizeSettings,
    recipe: str = "fast",
    *,
    name: str = "weights",
    on_rows: Callable[[int, int], None] | None = None,
) -> Quantized:
    """Approximate a matrix by a sum of scaled binary matrices.

    Every row is worked on by itself, in an order of additions that depends on nothing else: the result is the same to
    the byte whatever the size of the blocks, in numpy and torch, on a CPU and on a GPU. Only the type of the scales,
    where ``settings.scale_dtype`` is ``"auto"``, looks at the whole matrix.

    Args:
        weights: float ``[N, K]`` (out_features, in_features) of numpy or torch, or :class:`WeightRows`; read twice.
        settings: bases, group size and so on.
        recipe: a name in :data:`qbb_export.quantize.recipes.RECIPES`.
        name: the layer, for error messages.
        on_rows: called with (rows done, rows in all) after each block.

    Returns:
        The packed layer, on the host.

    Raises:
        QbbError: for weights that are no matrix, empty, NaN, infinite or beyond float32, for scales that
            ``scale_dtype="float16"`` cannot hold, and for an unknown recipe.
    """
    source, work = as_rows(weights), recipe_by_name(recipe)
    if settings.offset is None:
        settings = replace(settings, offset=settings.bases <= OFFSET_DEFAULTS.get(recipe, 0))
    shape: tuple[int, ...] = source.shape
    if len(shape) != 2 or 0 in shape:
        raise QbbError("not a matrix", where=name, expected="[out_features, in_features]", got=list(shape))
    N, K = shape
    spec = rows_spec(N, K, settings.bases, effective_group_size(K, settings.group_size))
    scale_dtype = _scale_dtype(_peak(source, name), settings, name)
    words = np.empty(spec.planes_shape, dtype=np.uint32)
    scales = np.empty(spec.scales_shape, dtype=scale_dtype)
    offset = np.empty(spec.offset_shape, dtype=np.float32) if settings.offset else None
    steps: list[npt.NDArray[np.float64]] = []
    energy: list[npt.NDArray[np.float64]] = []
    for start, stop, xp, block in row_blocks(source):
        result = _quantize_rows(xp, block, spec.group_size, work, settings, scale_dtype)
        codes = np.ascontiguousarray(to_host(result.codes))  # a transposed block leaves them transposed
        for b in range(spec.bases):
            words[b, start:stop] = pack_words((codes >> b & 1).astype(np.bool_))
        scales[:, start:stop] = np.moveaxis(to_host(result.scales), -1, 0)
        if offset is not None:
            offset[start:stop] = to_host(result.offset)
        steps.append(to_host(result.errors))
        energy.append(to_host(_energy(xp, block)))
        if on_rows is not None:
            on_rows(stop, N)
    return Quantized(spec, words, scales, offset, _relative(np.concatenate(steps), np.concatenate(energy)))


def _peak(source: WeightRows, name: str) -> float:
    """The largest magnitude in the matrix; refuses what is not finite."""
    peak = 0.0
    for _, _, xp, block in row_blocks(source):
        if not bool(xp.all(xp.isfinite(block))):
            raise QbbError("weights hold NaN, Inf or values beyond float32", where=name)
        peak = max(peak, float(xp.max(xp.abs(block))))
    return peak


def _scale_dtype(peak: float, settings: QuantizeSettings, name: str) -> str:
    """The type that scales are stored in, float16 or float32."""
    low, high = FLOAT16_PEAKS
    if settings.scale_dtype == "auto":
        return "float16" if peak == 0.0 or low <= peak <= high else "float32"
    if settings.scale_dtype == "float16" and peak > high:
        raise QbbError(
            "weights too large for float16 scales (use scale_dtype float32)",
            where=name,
            expected=f"max|W| <= {high:g}",
            got=f"{peak:g}",
        )
    return settings.scale_dtype


def _quantize_rows(
    xp: Any, block: Any, group_size: int, work: Recipe, settings: QuantizeSettings, scale_dtype: str
) -> GroupResult:
    """A block ``[R, K]`` to codes ``[R, K]``, scales ``[R, G, bases]``, offset ``[R, G]`` and errors ``[R, steps]``."""
    K = block.shape[1]
    whole = K // group_size * group_size
    parts = [_quantize_columns(xp, block[:, :whole], group_size, work, settings, scale_dtype)]
    if whole < K:  # the last group is shorter than the others
        parts.append(_quantize_columns(xp, block[:, whole:], K - whole, work, settings, scale_dtype))
    return GroupResult(
        codes=xp.concat([p.codes for p in parts], axis=1),
        scales=xp.concat([p.scales for p in parts], axis=1),
        offset=xp.concat([p.offset for p in parts], axis=1) if settings.offset else None,
        errors=sum(p.errors for p in parts),
    )


def _quantize_columns(
    xp: Any, block: Any, group_size: int, work: Recipe, settings: QuantizeSettings, scale_dtype: str
) -> GroupResult:
    """The same for ``[R, G * group_size]``, where all groups are alike: lay them out one below the other, and back."""
    height = block.shape[0]
    groups = xp.reshape(block, (-1, group_size))
    room = max(group_size, 4 << settings.bases)  # a group needs room for its levels, too
    at_once = max(1, GROUP_BLOCK * device_blocks(block) // room)
    pieces = [work(xp, groups[i : i + at_once], settings, scale_dtype) for i in range(0, groups.shape[0], at_once)]

    def rows(arrays: list[Any], *inner: int) -> Any:
        return xp.reshape(xp.concat(arrays, axis=0), (height, -1, *inner))

    errors = [xp.stack(p.errors, axis=-1) for p in pieces]
    per_row = xp.permute_dims(rows(errors, errors[0].shape[-1]), (0, 2, 1))
    return GroupResult(
        codes=rows([p.codes for p in pieces]),
        scales=rows([p.scales for p in pieces], settings.bases),
        offset=rows([p.offset for p in pieces]) if settings.offset else None,
        errors=tree_sum(xp, per_row),
    )


def _energy(xp: Any, block: Any) -> Any:
    """Squared norm of each row, float64 ``[R]``."""
    wide = xp.astype(block, xp.float64)
    return tree_sum(xp, wide * wide)


def _relative(errors: npt.NDArray[np.float64], energy: npt.NDArray[np.float64]) -> tuple[float, ...]:
    """Errors ``[N, steps]`` of rows over the energy ``[N]`` of all rows; exact sums, whatever the order of rows."""
    norm = math.fsum(energy)
    return tuple(max(0.0, math.fsum(column)) / norm if norm else 0.0 for column in errors.T)
