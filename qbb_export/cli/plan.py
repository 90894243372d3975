"""The table of ``qbb-export … --plan``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from qbb_export.plan import Plan, Stage


def print_plan(plan: Plan, *, as_json: bool) -> None:
    """To stdout: a table, or JSON with bytes and seconds."""
    if as_json:
        print(plan.as_json())
        return
    on_gpu = plan.total.device > 0
    title = f"{plan.output}: recipe {plan.recipe} on {plan.device}, {plan.layers} layers, {plan.weights:,} weights"
    table = Table(
        title=title,
        title_style="bold",
        caption="memory: at the peak, program and model included; about, nothing was written",
    )
    table.add_column("stage", no_wrap=True)
    for column in ("memory", *(["GPU memory"] if on_gpu else []), "disk", "gone at the end", "time"):
        table.add_column(column, justify="right", no_wrap=True)
    for stage in (*plan.stages, plan.total):
        last = stage is plan.stages[-1]
        table.add_row(*_cells(stage, on_gpu), end_section=last)
    Console().print(table)


def _cells(stage: Stage, on_gpu: bool) -> list[str]:
    device = [_size(stage.device)] if on_gpu else []
    return [stage.name, _size(stage.host), *device, _size(stage.disk), _size(stage.removed), _time(stage.seconds)]


def _size(count: int) -> str:
    if count == 0:
        return "–"
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{max(1, round(count / 1e6))} MB"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
