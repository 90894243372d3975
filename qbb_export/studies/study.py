"""One chart or table as plain data, and its JSON."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import Any, Final

from qbb_export.errors import QbbError

KINDS: Final = ("lines", "bars", "table")
DAMAGE: Final = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError)


@dataclass(frozen=True)
class Series:
    """One line or one colour of bars.

    Args:
        label: what it is.
        x: numbers, or names (of layers, methods, …).
        y: as many numbers; None where there is none.
    """

    label: str
    x: tuple[float | str, ...]
    y: tuple[float | None, ...]


@dataclass(frozen=True)
class Study:
    """A chart or a table.

    Args:
        name: of its file: letters, digits, ``-``, ``_`` and ``.``.
        title: one line.
        kind: ``"lines"``, ``"bars"`` or ``"table"``.
        x_label: of a chart, with the unit.
        y_label: of a chart, with the unit.
        series: of a chart.
        columns: of a table.
        rows: of a table, each as long as ``columns``: texts, finite numbers or None.
        note: what it was measured on, and what is to be seen.

    Raises:
        QbbError: fields that do not fit together, or a number that is not finite.
    """

    name: str
    title: str
    kind: str
    x_label: str = ""
    y_label: str = ""
    series: tuple[Series, ...] = ()
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[str | float | None, ...], ...] = ()
    note: str = ""

    def __post_init__(self) -> None:
        where = f"study {self.name}"
        if not self.name or not all(c.isascii() and (c.isalnum() or c in "-_.") for c in self.name):
            raise QbbError("bad name", where=where, expected="letters, digits, '-', '_' and '.'", got=self.name)
        if self.kind not in KINDS:
            raise QbbError("unknown kind", where=where, expected=f"one of {', '.join(KINDS)}", got=self.kind)
        for series in self.series:
            if len(series.x) != len(series.y):
                raise QbbError("x and y differ in length", where=f"{where}, {series.label}")
        if any(len(row) != len(self.columns) for row in self.rows):
            raise QbbError("a row is not as long as columns", where=where)
        cells = [value for s in self.series for value in (*s.x, *s.y)] + [cell for row in self.rows for cell in row]
        if any(isinstance(cell, float) and not math.isfinite(cell) for cell in cells):
            raise QbbError("a number is not finite", where=where)

    def as_json(self) -> str:
        """JSON that depends on the values only; :meth:`from_json` gives an equal study back."""
        return json.dumps(asdict(self), sort_keys=True, indent=1, allow_nan=False, ensure_ascii=True) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, where: object = "study") -> Study:
        """Read what :meth:`as_json` wrote.

        Args:
            text: JSON.
            where: a file name, for error messages.

        Raises:
            QbbError: it is no JSON, or not a study.
        """
        try:
            fields = json.loads(text)
            series = tuple(
                Series(_text(s["label"]), tuple(map(_cell, s["x"])), tuple(map(_number, s["y"])))
                for s in fields["series"]
            )
            rows = tuple(tuple(None if cell is None else _cell(cell) for cell in row) for row in fields["rows"])
            texts = {key: _text(fields[key]) for key in ("name", "title", "kind", "x_label", "y_label", "note")}
            return cls(**texts, series=series, columns=tuple(map(_text, fields["columns"])), rows=rows)
        except (*DAMAGE, QbbError) as error:
            raise QbbError("not a study", where=where, got=f"{type(error).__name__}: {error}") from error


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected a text, got {value!r}")
    return value


def _cell(value: Any) -> str | float:
    return value if isinstance(value, str) else _finite(value)


def _number(value: Any) -> float | None:
    return None if value is None else _finite(value)


def _finite(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise TypeError(f"expected a finite number, got {value!r}")
    return value
