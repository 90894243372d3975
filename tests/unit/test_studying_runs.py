"""The runs of ``qbb study`` and the tables made of them; nothing is run here."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qbb_export.errors import QbbError
from qbb_export.studies import Study
from qbb_export.studying import STUDIES, StudyOptions
from qbb_export.studying.runs import PLANS, Measured, Run, Scale

DECODER = Scale(steps=20, learn=256, validation=16, held_out=32, reduced=True, decoder=True, bases=3)
SCALES = [DECODER, replace(DECODER, decoder=False), replace(DECODER, learn=4096, reduced=False)]


def chain(run: Run) -> list[Run]:
    return [run, *(r for other in (run.after, run.instead) if other is not None for r in chain(other))]


@pytest.mark.parametrize("scale", SCALES)
def test_a_name_is_one_run_and_a_run_one_name(scale: Scale) -> None:
    """The record and the bench know runs by their names; two names for one run would do it twice."""
    runs = [run for plan in PLANS.values() for last in plan(scale).runs() for run in chain(last)]
    by_name = {run.name: run for run in runs}
    assert all(by_name[run.name] == run for run in runs)
    nameless = [replace(run, name="") for run in by_name.values()]
    assert all(nameless.count(run) == 1 for run in nameless)


@pytest.mark.parametrize("scale", SCALES)
def test_every_distillation_has_as_many_steps(scale: Scale) -> None:
    for plan in PLANS.values():
        for run in plan(scale).runs():
            assert sum(phase.steps for phase in run.recipe.distill) in (0, scale.steps)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("with_text", [False, True])
def test_figures_end_up_in_their_rows(scale: Scale, with_text: bool) -> None:
    for name, make in PLANS.items():
        plan = make(scale)
        found = {
            run.name: Measured(float(i), 100.0 + i if with_text else None, 3.5) for i, run in enumerate(plan.runs(), 1)
        }
        studies = plan.studies(found, scale, Measured(0.0, 99.0 if with_text else None, None))
        assert studies[0].name == name
        assert all(Study.from_json(study.as_json()) == study for study in studies)
        figures = {cell for study in studies for row in study.rows for cell in row}
        figures |= {y for study in studies for series in study.series for y in series.y}
        assert {m.distance for m in found.values()} <= figures
        assert ({m.perplexity for m in found.values()} <= figures) or not with_text


def test_a_perplexity_beyond_numbers_is_left_out() -> None:
    plan = PLANS["losses"](DECODER)
    found = {run.name: Measured(1.0, float("inf"), 3.5) for run in plan.runs()}
    (table,) = plan.studies(found, DECODER, Measured(0.0, 9.0, None))
    assert all(row[-1] is None for row in table.rows)


def test_samples_go_as_far_as_the_text() -> None:
    counts = [[label for label, _ in PLANS["samples"](scale).rows] for scale in SCALES]
    assert counts == [["32", "128"], ["32", "128"], ["32", "128", "512", "2048"]]


def test_options_are_checked() -> None:
    assert StudyOptions().steps_here == 20
    assert StudyOptions(device="cuda").steps_here == 200
    assert StudyOptions(only=STUDIES, steps=7).steps_here == 7
    for wrong in ({"only": ("cots",)}, {"steps": 0}, {"windows": 0}):
        with pytest.raises(QbbError):
            StudyOptions(**wrong)  # type: ignore[arg-type]
