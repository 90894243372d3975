"""What ``qbb study`` runs: recipes that go on from each other, and the tables and charts they end in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final

from qbb_export.distill.settings import MODEL_RECIPES, DistillSettings, ModelRecipe
from qbb_export.studies import Series, Study

# The stage whose steps are the estimated seconds of all runs.
ALL: Final = "all runs"

# Sequences to learn from that a study of their number tries, as far as there are twice as many.
COUNTS: Final = (32, 128, 512, 2048)


@dataclass(frozen=True)
class Scale:
    """How much is written and learnt.

    Args:
        steps: of each distillation.
        learn: sequences to learn from.
        validation: those on which the best state is chosen.
        held_out: those that everything is measured on.
        reduced: recipes as they are for CPUs.
        decoder: the model writes text; else inputs are made up, and there is one loss.
        bases: binary matrices of a layer.
    """

    steps: int
    learn: int
    validation: int
    held_out: int
    reduced: bool
    decoder: bool
    bases: int

    def recipe(self, name: str) -> ModelRecipe:
        """A recipe in this size."""
        recipe = MODEL_RECIPES[name].reduced() if self.reduced else MODEL_RECIPES[name]
        recipe = recipe.with_steps(self.steps) if recipe.distill else recipe
        text = replace(recipe.text, sequences=self.learn + self.validation, validation=self.validation)
        return replace(recipe, text=text)

    @property
    def measure(self) -> str:
        """What :attr:`Measured.distance` is."""
        return "KL to the float model (nats per token)" if self.decoder else "1 − cosine to the float model"


@dataclass(frozen=True)
class Run:
    """One recipe.

    Args:
        name: of its branch in the record.
        recipe: its stages.
        after: the run whose layers it goes on from; None: it quantises the weights.
        instead: the run whose result it approximates; None: the model's weights.
        sequences: it learns from the first so many; None: from all.
    """

    name: str
    recipe: ModelRecipe
    after: Run | None = None
    instead: Run | None = None
    sequences: int | None = None


@dataclass(frozen=True)
class Measured:
    """How far a run's result is from the float model.

    Args:
        distance: on held-out text; see :attr:`Scale.measure`.
        perplexity: on a text file, or None.
        bits: per weight, scales and offsets counted; None for the float model.
    """

    distance: float
    perplexity: float | None
    bits: float | None


@dataclass(frozen=True)
class StudyPlan:
    """The runs of one study by label, and what is made of them.

    Args:
        rows: label and runs of each row of a table (or point of a chart).
        draw: makes studies of the rows' figures.
    """

    rows: tuple[tuple[str, tuple[Run, ...]], ...]
    draw: Callable[[list[tuple[str, list[Measured]]], Scale, Measured], list[Study]]

    def runs(self) -> list[Run]:
        """All runs, once each."""
        return list({run.name: run for _, runs in self.rows for run in runs}.values())

    def studies(self, found: Mapping[str, Measured], scale: Scale, float_model: Measured) -> list[Study]:
        """Tables and charts, from the figures by run."""
        return self.draw([(label, [found[run.name] for run in runs]) for label, runs in self.rows], scale, float_model)


def _start(scale: Scale) -> Run:
    """What is made of the weights alone; everything of the paper's goes on from it."""
    return Run("settled", replace(scale.recipe("qbb"), distill=()))


def _qbb(
    scale: Scale,
    name: str,
    phase: DistillSettings | None = None,
    *,
    keep: float = 1.0,
    sequences: int | None = None,
) -> Run:
    """The paper's distillation, or another phase in its place, on all of the text or the part that it filters."""
    recipe = scale.recipe("qbb")
    phases = recipe.distill if phase is None else (phase,)
    recipe = replace(recipe, distill=phases, text=replace(recipe.text, keep=keep))
    return Run(name, recipe, after=_start(scale), sequences=sequences)


def _paper(scale: Scale) -> Run:
    """The paper's recipe as it is, with its filter."""
    return _qbb(scale, "qbb", keep=scale.recipe("qbb").text.keep)


def _components(scale: Scale) -> StudyPlan:
    best, alone = scale.recipe("best"), replace(scale.recipe("best"), sweep=None, distill=())
    fast = Run("fast", alone)
    sweep = Run("sweep", replace(best, distill=()), after=fast)
    scales: DistillSettings = replace(best.distill[0], steps=scale.steps)
    rows = {
        "greedy": Run("greedy", ModelRecipe("greedy", offset_up_to=0)),
        "+ refinement": Run("refine", ModelRecipe("refine", offset_up_to=0)),
        "+ alternating": _start(scale),
        "+ scales distilled (qbb)": _paper(scale),
        "fast": fast,
        "sweep": sweep,
        "sweep + scales": Run("sweep-scales", replace(best, sweep=None, distill=(scales,)), after=sweep),
        "sweep + scales + codes (best)": Run("best", replace(best, sweep=None), after=sweep),
    }
    return StudyPlan(tuple((label, (run,)) for label, run in rows.items()), _draw_components)


def _draw_components(rows: list[tuple[str, list[Measured]]], scale: Scale, float_model: Measured) -> list[Study]:
    note = f"{_about(scale)} The first four build the paper's recipe, one on top of the other; the others are ours."
    columns, table = _table([("float model", [float_model]), *rows], scale)
    labels = tuple(label for label, _ in rows)
    distances: tuple[float | None, ...] = tuple(found[0].distance for _, found in rows)
    bars = [("components-distance", scale.measure, distances)]
    if float_model.perplexity is not None:
        bars.append(("components-perplexity", "perplexity", tuple(_perplexity(found[0]) for _, found in rows)))
    return [
        Study("components", "What each part of a recipe adds", "table", columns=columns, rows=table, note=note),
        *(
            Study(name, "What each part adds", "bars", "method", y_label, (Series(y_label, labels, y),), note=note)
            for name, y_label, y in bars
        ),
    ]


def _losses(scale: Scale) -> StudyPlan:
    """The paper's order, worst to best: CE, KL, MSE of the logits, features and swapped blocks on top of that."""
    full = scale.recipe("qbb").distill[0]
    alone = replace(full, features=0.0, swap=0.0)
    phases = {"MSE of the logits" if scale.decoder else "embeddings": alone}
    if scale.decoder:
        phases = {"CE of the tokens": replace(alone, loss="ce"), "KL": replace(alone, loss="kl"), **phases}
    phases |= {"… + features": replace(full, swap=0.0), "… + features + swap": full}
    runs = [(label, _qbb(scale, f"loss-{number}", phase)) for number, (label, phase) in enumerate(phases.items())]
    return StudyPlan(tuple((label, (run,)) for label, run in runs), _draw_losses)


def _draw_losses(rows: list[tuple[str, list[Measured]]], scale: Scale, float_model: Measured) -> list[Study]:
    columns, table = _table(rows, scale)
    note = f"{_about(scale)} The paper's distillation of scales from its refined start, with another loss each."
    return [Study("losses", "Losses of the distillation", "table", columns=columns, rows=table, note=note)]


def _samples(scale: Scale) -> StudyPlan:
    rows = []
    for count in (n for n in COUNTS if 2 * n <= scale.learn):
        runs = [_qbb(scale, f"samples-{count}", sequences=count)]
        if scale.decoder:
            filtered = _qbb(scale, f"samples-{count}-filtered", keep=0.5, sequences=2 * count)
            same = replace(filtered, name="qbb", sequences=None)  # of all the text
            runs.append(same if 2 * count == scale.learn and same == _paper(scale) else filtered)
        rows.append((str(count), tuple(runs)))
    return StudyPlan(tuple(rows), _draw_samples)


def _draw_samples(rows: list[tuple[str, list[Measured]]], scale: Scale, float_model: Measured) -> list[Study]:
    note = (
        f"{_about(scale)} The paper's distillation with as many steps for every number. Filtered: of twice as many "
        "sequences the half on which float model and copy differ most."
    )
    counts = tuple(float(label) for label, _ in rows)
    labels = ("random", "filtered")[: len(rows[0][1]) if rows else 0]
    charts: dict[str, tuple[str, Callable[[Measured], float | None]]] = {"samples": (scale.measure, _distance)}
    if float_model.perplexity is not None:
        charts["samples-perplexity"] = ("perplexity", _perplexity)
    return [
        Study(
            name,
            "Number of sequences learnt from",
            "lines",
            "sequences",
            y_label,
            tuple(Series(text, counts, tuple(of(found[i]) for _, found in rows)) for i, text in enumerate(labels)),
            note=note,
        )
        for name, (y_label, of) in charts.items()
    ]


def _starts(scale: Scale) -> StudyPlan:
    recipe = scale.recipe("gptq")
    gptq = Run("gptq", recipe)
    start = replace(_start(scale), name="refine-gptq", instead=gptq)
    distilled = _paper(scale)
    rows = (
        ("the model's weights", (_start(scale), distilled)),
        ("GPTQ's weights", (start, replace(distilled, name="qbb-gptq", after=start))),
        ("GPTQ itself", (gptq,)),
    )
    return StudyPlan(rows, _draw_starts)


def _draw_starts(rows: list[tuple[str, list[Measured]]], scale: Scale, float_model: Measured) -> list[Study]:
    stages = ("before", "after distillation")
    with_text = float_model.perplexity is not None
    columns = ["approximated", "bits per weight", *(f"{scale.measure} {stage}" for stage in stages)]
    columns += [f"perplexity {stage}" for stage in stages] if with_text else []
    table = []
    for label, found in rows:
        some = [*found, None][:2]
        cells: list[str | float | None] = [label, found[-1].bits]
        cells += [None if m is None else m.distance for m in some]
        cells += [None if m is None else _perplexity(m) for m in some] if with_text else []
        table.append(tuple(cells))
    note = f"{_about(scale)} The paper's refinement and distillation of matrices that approximate other weights."
    return [
        Study("starts", "What is approximated", "table", columns=tuple(columns), rows=tuple(table), note=note),
    ]


def _table(
    rows: list[tuple[str, list[Measured]]], scale: Scale
) -> tuple[tuple[str, ...], tuple[tuple[str | float | None, ...], ...]]:
    """Columns and rows of one figure each."""
    with_text = any(found[0].perplexity is not None for _, found in rows)
    columns = ("method", "bits per weight", scale.measure, *(("perplexity",) if with_text else ()))
    return columns, tuple(
        (label, found[0].bits, found[0].distance, *((_perplexity(found[0]),) if with_text else ()))
        for label, found in rows
    )


def _distance(found: Measured) -> float:
    return found.distance


def _perplexity(found: Measured) -> float | None:
    """None where it is too large for a number."""
    return found.perplexity if found.perplexity is not None and found.perplexity < 1e300 else None


def _about(scale: Scale) -> str:
    text = "sequences written by the model" if scale.decoder else "sequences' worth of made-up inputs"
    return (
        f"{scale.bases} bases, {scale.steps} steps of each distillation, one text for all: {scale.learn} {text}, "
        f"measured on {scale.held_out} others."
    )


PLANS: Final[Mapping[str, Callable[[Scale], StudyPlan]]] = MappingProxyType(
    {"components": _components, "losses": _losses, "samples": _samples, "starts": _starts}
)
