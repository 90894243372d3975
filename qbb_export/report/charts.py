"""Draw a study as SVG that takes the page's own text colour, so that it reads on light and on dark."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from qbb_export.errors import QbbError
from qbb_export.studies import Series, Study

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Stands for the text's colour while matplotlib draws; "currentColor" in the SVG.
INK: Final = "#0a0b0c"
COLOURS: Final = ("#3b82d6", "#e07b1a", "#2a9d62", "#d9485f", "#8f63c9", "#13a0a8", "#b8860b", "#8a8f98")
MARKERS: Final = "os^Dv<>P"
WIDTH: Final = 8.5  # inches
LABELLED: Final = 32  # names below an axis; of more, evenly spaced ones
NAME_LENGTH: Final = 24
SPAN_FOR_LOG: Final = 10.0  # largest over smallest value from which an axis is logarithmic
MANY: Final = 40  # points from which lines have no markers and bars become points


def require_matplotlib() -> None:
    """Ask before the work whether charts can be drawn.

    Raises:
        QbbError: matplotlib is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise QbbError("charts need matplotlib", expected="pip install 'qbb-export[report]'") from error


def svg(study: Study) -> str:
    """An ``<svg>`` element to put into a page; the same study gives the same text.

    Call :func:`require_matplotlib` first.

    Args:
        study: of kind ``lines`` or ``bars``, with at least one point.
    """
    text = _draw(study, "svg").decode("utf-8")
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    return text.replace(INK, "currentColor").strip()


def png(study: Study) -> bytes:
    """The same chart on white, to look at."""
    return _draw(study, "png")


def _draw(study: Study, form: str) -> bytes:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    options: Any = {
        "font.size": 9,
        "font.family": "sans-serif",
        "text.parse_math": False,  # a name with $ in it is no formula
        "svg.fonttype": "none",
        "svg.hashsalt": study.name,  # otherwise ids differ from run to run
        "axes.spines.top": False,
        "axes.spines.right": False,
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    }
    names = _names(study.series)
    with mpl.rc_context(options), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a letter that matplotlib's font lacks; the browser's has it
        figure = Figure(figsize=(WIDTH, 3.4 if names is None else 4.4), layout="constrained")
        axes = figure.add_subplot()
        axes.set_ylabel(printable(study.y_label))
        if names is None:
            axes.set_xlabel(printable(study.x_label))
        else:
            _name_axis(axes, names, printable(study.x_label))
        handles = [_plot(axes, study, number, names) for number in range(len(study.series))]
        _scale(axes, study, names is None)
        axes.grid(color=INK, alpha=0.15, linewidth=0.6)
        axes.set_axisbelow(True)
        if len(handles) > 1:
            # A label that begins with an underscore would be left out.
            labels = [" " + printable(series.label) for series in study.series]
            figure.legend(handles, labels, loc="outside upper center", ncols=min(4, len(labels)), frameon=False)
        file = io.BytesIO()
        metadata = {"Date": None} if form == "svg" else {}  # otherwise the time would be in it
        figure.savefig(file, format=form, dpi=110, transparent=form == "svg", metadata=metadata)
    return file.getvalue()


def printable(text: str) -> str:
    """Text without control characters and lone surrogates, which no page can hold."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def _names(series: Sequence[Series]) -> list[str] | None:
    """The names along the x axis, in order of appearance; None where all of x are numbers."""
    values = [x for s in series for x in s.x]
    return list(dict.fromkeys(map(str, values))) if any(isinstance(x, str) for x in values) else None


def _name_axis(axes: Axes, names: list[str], label: str) -> None:
    """Names below the axis, without what they have in common in front; of many only some."""
    first, last = min(names), max(names)  # what these two share, all share
    shared = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), 0)
    prefix = first[: max(first.rfind(mark, 0, shared) for mark in "./") + 1]
    every = math.ceil(len(names) / LABELLED)
    places = list(range(0, len(names), every))
    short = [_shorten(printable(names[i][len(prefix) :])) for i in places]
    level = len(names) <= 8 and sum(map(len, short)) <= 60
    axes.set_xticks(places, short, rotation=0 if level else 90, fontsize=8)
    axes.set_xlabel(f"{label} ({printable(prefix)}…)" if prefix else label)
    axes.set_xlim(-0.6, len(names) - 0.4)


def _shorten(name: str) -> str:
    half = NAME_LENGTH // 2
    return name if len(name) <= NAME_LENGTH else f"{name[:half]}…{name[1 - half :]}"


def _plot(axes: Axes, study: Study, number: int, names: list[str] | None) -> Any:
    """Add one series; returns what stands for it in the legend."""
    series, colour = study.series[number], COLOURS[number % len(COLOURS)]
    places = {name: place for place, name in enumerate(names or [])}
    x = [float(v) if names is None else float(places[str(v)]) for v in series.x]
    y = [math.nan if v is None else v for v in series.y]
    many = len(x) > MANY
    if study.kind == "bars" and names is not None and not many:
        width = 0.8 / len(study.series)
        shift = (number - (len(study.series) - 1) / 2) * width
        return axes.bar([v + shift for v in x], y, width, color=colour)
    bars = study.kind == "bars"
    return axes.plot(
        x,
        y,
        color=colour,
        linestyle="none" if bars else "-",
        linewidth=1.4,
        marker=MARKERS[number % len(MARKERS)] if bars or not many or names is not None or _has_gaps(y) else None,
        markersize=2.5 if many else 4.0,
    )[0]


def _has_gaps(y: Sequence[float]) -> bool:
    """Whether a value stands alone between gaps, and would not be seen without a marker."""
    known = [False, *(v == v for v in y), False]
    return any(known[i] and not known[i - 1] and not known[i + 1] for i in range(1, len(known) - 1))


def _scale(axes: Axes, study: Study, numeric: bool) -> None:
    """Logarithmic axes where values span much, and plain numbers on them."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, Locator, LogLocator, MaxNLocator, NullLocator

    plain = FuncFormatter(lambda value, _: f"{value:g}")
    values = sorted(v for series in study.series for v in series.y if v is not None)
    if study.kind == "lines" and _spans(values) and values[len(values) // 2] < values[-1] / 5:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(plain)
    elif study.kind == "bars" and values:
        axes.set_ylim(bottom=min(0.0, values[0]))
    if not numeric:
        return
    points = sorted({v for series in study.series for v in series.x if not isinstance(v, str)})
    locator: Locator | None = None
    if 2 < len(points) <= 12 and _spans(points):  # settings of a knob, such as 256, 1024, 4096 samples
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(plain)
        locator = FixedLocator(points)
    elif all(float(v).is_integer() for v in points):
        locator = MaxNLocator(integer=True)
    if locator is not None:
        axes.xaxis.set_major_locator(locator)


def _spans(values: Sequence[float]) -> bool:
    """Whether ascending values are positive and far apart."""
    return bool(values) and values[0] > 0 and values[-1] >= SPAN_FOR_LOG * values[0]
