"""Studies that look at weights alone: initialisations, numbers of bases, orders of refinement."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import array_api_compat.numpy as xp
import numpy as np
import numpy.typing as npt
from array_api_compat import array_namespace

from qbb_export.errors import QbbError
from qbb_export.format import effective_group_size
from qbb_export.quantize.greedy import greedy
from qbb_export.quantize.multistart import best_fit
from qbb_export.quantize.refine import Refined, flipped_shares, refine
from qbb_export.quantize.rows import as_rows, to_host
from qbb_export.quantize.settings import INITS, QuantizeSettings
from qbb_export.quantize.sorted_groups import SortedGroups, partition
from qbb_export.quantize.starts import CLIPS
from qbb_export.quantize.uniform import uniform_levels
from qbb_export.studies.study import Series, Study

# What a study looks at of each layer, and how many layers the studies see that cost minutes a layer.
SAMPLE_ROWS: Final = 256
SAMPLE_WEIGHTS: Final = 1 << 16
FEW_LAYERS: Final = 12
MOST_BASES: Final = 6

# Initialisations that only the table shows: they are far from the others.
UNREFINED: Final = ("independent", "random")

# Called with what is going on, steps done and steps in all.
Progress = Callable[[str, int, int], None]


def weight_studies(
    layers: Mapping[str, Any], settings: QuantizeSettings, progress: Progress | None = None
) -> list[Study]:
    """How initialisations, numbers of bases and orders of refinement compare on the weights of a model.

    All errors are squared errors relative to the squared norm, without an offset and before scales are rounded. Each
    layer is looked up once and only a sample of its rows is read, so a mapping that loads on demand will do.

    Args:
        layers: float ``[N, K]`` of numpy or torch, or :class:`~qbb_export.quantize.WeightRows`, by layer name.
        settings: bases, group size and so on; one study varies the number of bases, others ``init`` and ``order``.
        progress: told what is going on.

    Raises:
        QbbError: no layers, or weights that are not finite.
    """
    if not layers:
        raise QbbError("no layers to study")
    settings = replace(settings, offset=False)
    few = _evenly(len(layers), FEW_LAYERS)
    methods, by_bases, by_steps, flips = _Curves(), _Curves(), _Curves(), _Curves()
    for number, name in enumerate(layers):
        sample = _Sample.of(layers[name], settings.group_size, name)
        refined = {init: _refine(sample, settings, init=init) for init in INITS}
        methods.add({label: [error] for label, error in _by_method(sample, settings, refined).items()})
        flips.add(_flips(refined["cascaded"], settings.bases))
        if number in few:
            by_bases.add(_by_bases(sample, settings))
            by_steps.add(_by_steps(sample, settings, refined["cascaded"]))
        if progress is not None:
            progress("studying weights", number + 1, len(layers))
    steps = settings.refine.steps
    groups = f"Groups of {settings.group_size} weights." if settings.group_size else "One group a row."
    sampled = (
        f"{groups} Of each layer at most {SAMPLE_ROWS} evenly spaced rows and {SAMPLE_WEIGHTS} weights (at least one "
        "row). Squared error over the squared norm of the weights, without an offset, scales not rounded."
    )
    about = f"Bases: {settings.bases}. {sampled}"
    mean = f"Mean over {len(few)} of {len(layers)} layers, evenly spaced. "
    drawn = {label: values for label, values in methods.flat().items() if label not in UNREFINED}
    return [
        _lines(
            "weights-layers",
            "Error of each layer by method",
            ("layer", "relative squared error"),
            {label: (layers, values) for label, values in drawn.items()},
            f"{about} Refined: the paper's iterative refinement, {steps} steps a stage, one basis after the other.",
        ),
        Study(
            "weights-methods",
            "Methods that look at weights alone",
            "table",
            columns=("method", "mean relative squared error", "of the worst layer"),
            rows=tuple((label, sum(v) / len(v), max(v)) for label, v in methods.flat().items()),
            note=f"Over all {len(layers)} layers. {about}",
        ),
        _lines(
            "weights-bases",
            "Error by number of bases",
            ("bases", "relative squared error"),
            {label: (range(1, MOST_BASES + 1), curve) for label, curve in by_bases.mean().items()},
            mean + sampled,
        ),
        _lines(
            "weights-order",
            "One basis after the other, or all at once",
            ("steps in all", "relative squared error"),
            {
                "sequential": ([steps * i for i in range(settings.bases + 1)], by_steps.mean()["sequential"]),
                "simultaneous": (_budgets(settings), by_steps.mean()["simultaneous"]),
            },
            f"{mean}Sequential: after each stage of one run. Simultaneous: one run for each number of steps. Both from "
            f"the cascaded initialisation, before the least-squares fit of the scales that ends a run. {about}",
        ),
        _lines(
            "weights-flips",
            "Signs that the refinement changed",
            ("layer", "share of signs"),
            {label: (layers, values) for label, values in flips.flat().items()},
            f"From the cascaded initialisation to the best that the sequential refinement found. {about}",
        ),
    ]


def _lines(
    name: str,
    title: str,
    axes: tuple[str, str],
    curves: Mapping[str, tuple[Iterable[float | str], Iterable[float]]],
    note: str,
) -> Study:
    series = tuple(Series(label, tuple(x), tuple(y)) for label, (x, y) in curves.items())
    return Study(name, title, "lines", *axes, series, note=note)


class _Curves:
    """Curves by label, one of each for every layer."""

    def __init__(self) -> None:
        self._all: dict[str, list[list[float]]] = {}

    def add(self, curves: Mapping[str, list[float]]) -> None:
        for label, curve in curves.items():
            self._all.setdefault(label, []).append(curve)

    def mean(self) -> dict[str, list[float]]:
        """Over the layers, point by point."""
        return {
            label: [sum(column) / len(column) for column in zip(*curves, strict=True)]
            for label, curves in self._all.items()
        }

    def flat(self) -> dict[str, list[float]]:
        """One value for each layer, where curves have one point."""
        return {label: [value for curve in curves for value in curve] for label, curves in self._all.items()}


@dataclass(frozen=True)
class _Sample:
    """Groups float32 ``[M, g]`` of some rows (and those of a shorter last column), and their squared norm."""

    parts: list[npt.NDArray[np.float32]]
    energy: float

    @classmethod
    def of(cls, weights: Any, group_size: int, name: str) -> _Sample:
        """Evenly spaced rows of a layer."""
        source = as_rows(weights)
        N, K = source.shape
        chosen = _evenly(N, max(1, min(SAMPLE_ROWS, SAMPLE_WEIGHTS // K)))
        with np.errstate(over="ignore"):  # refused below
            rows = np.concatenate([_float32(source.rows(i, i + 1)) for i in chosen])
        if not np.isfinite(rows).all():
            raise QbbError("weights hold NaN, Inf or values beyond float32", where=name)
        size = effective_group_size(K, group_size)
        whole = K // size * size
        parts = [rows[:, :whole].reshape(-1, size)] + ([rows[:, whole:]] if whole < K else [])
        return cls(parts, float((rows.astype(np.float64) ** 2).sum()))

    def relative(self, errors: Iterable[Any]) -> float:
        """Squared errors of the groups of each part, added up, over the norm."""
        return max(0.0, math.fsum(float(np.sum(error)) for error in errors)) / self.energy if self.energy else 0.0


def _float32(rows: Any) -> npt.NDArray[np.float32]:
    space = array_namespace(rows)  # numpy does not know bfloat16: the cast comes first
    return to_host(space.astype(rows, space.float32))


def _evenly(count: int, most: int) -> list[int]:
    """At most so many of the numbers 0..count-1, evenly spaced."""
    if count <= most:
        return list(range(count))
    return [0] if most == 1 else [round(i * (count - 1) / (most - 1)) for i in range(most)]


def _refine(sample: _Sample, settings: QuantizeSettings, **changes: Any) -> list[Refined]:
    """Refine one basis after the other, unless ``changes`` to ``settings.refine`` say otherwise."""
    chosen = replace(settings.refine, **{"order": "sequential", **changes})
    return [refine(xp, part, replace(settings, refine=chosen)) for part in sample.parts]


def _simple_methods(sample: _Sample, settings: QuantizeSettings) -> dict[str, float]:
    bases, parts = settings.bases, sample.parts
    ladders = []
    for groups in (SortedGroups.of(xp, part) for part in parts):
        ladders.append(partition(xp, groups, uniform_levels(xp, groups, bases, False, CLIPS).scales, None).error)
    return {
        "cascaded": sample.relative(greedy(xp, part, bases)[2][-1] for part in parts),
        "clipped uniform ladder": sample.relative(ladders),
        "alternating, several starts": sample.relative(best_fit(xp, part, settings)[1][-1] for part in parts),
    }


def _by_method(sample: _Sample, settings: QuantizeSettings, refined: Mapping[str, list[Refined]]) -> dict[str, float]:
    before = {init: sample.relative(r.errors[1] for r in results) for init, results in refined.items()}
    after = {f"{init}, refined": sample.relative(r.errors[-1] for r in results) for init, results in refined.items()}
    return {**before, **after, **_simple_methods(sample, settings)}


def _by_bases(sample: _Sample, settings: QuantizeSettings) -> dict[str, list[float]]:
    curves: dict[str, list[float]] = {}
    for bases in range(1, MOST_BASES + 1):
        chosen = replace(settings, bases=bases)
        refined = sample.relative(r.errors[-1] for r in _refine(sample, chosen, init="cascaded"))
        for label, error in {**_simple_methods(sample, chosen), "cascaded, refined": refined}.items():
            curves.setdefault(label, []).append(error)
    return curves


def _budgets(settings: QuantizeSettings) -> list[int]:
    """Steps in all of the simultaneous runs; each is a multiple of the number of bases."""
    bases = settings.bases
    return [round(settings.refine.steps * i / bases) * bases for i in range(bases + 1)]


def _by_steps(sample: _Sample, settings: QuantizeSettings, sequential: list[Refined]) -> dict[str, list[float]]:
    """Errors after each stage of the sequential refinement, and of simultaneous ones with as many steps."""
    stages = [sample.relative(r.errors[1 + i] for r in sequential) for i in range(settings.bases + 1)]
    runs = [sequential] + [
        _refine(sample, settings, init="cascaded", order="simultaneous", steps=total // settings.bases)
        for total in _budgets(settings)[1:]
    ]
    together = [sample.relative(r.errors[2 if i else 1] for r in run) for i, run in enumerate(runs)]
    return {"sequential": stages, "simultaneous": together}


def _flips(refined: list[Refined], bases: int) -> dict[str, list[float]]:
    sizes = [result.codes.size for result in refined]
    shares = [flipped_shares(xp, result.start_codes, result.codes, bases) for result in refined]
    return {
        f"basis {i + 1}": [sum(s[i] * size for s, size in zip(shares, sizes, strict=True)) / sum(sizes)]
        for i in range(bases)
    }
