"""The page: one HTML file with everything in it, and no script."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from string import Template
from typing import Final

from qbb_export.report.charts import printable, svg
from qbb_export.report.collect import ReportData, layer_bits, training_studies
from qbb_export.studies import Study

# Whatever a file of the record says: a browser loads nothing and runs nothing.
POLICY: Final = "default-src 'none'; style-src 'unsafe-inline'"

PAGE: Final = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="$policy">
<title>$title</title>
<style>
:root { color-scheme: light dark; --ink: #1c2024; --paper: #fff; --line: #d5d9de; --soft: #f3f5f7; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7ea; --paper: #15181b; --line: #3a4047; --soft: #1f2429; } }
body { margin: 2rem auto; max-width: 68rem; padding: 0 1rem; color: var(--ink); background: var(--paper);
  font: 15px/1.5 system-ui, sans-serif; }
h1, h2, h3 { line-height: 1.2; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); padding-bottom: .3rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; text-align: left; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { background: var(--soft); position: sticky; top: 0; }
td.number, th.number { text-align: right; }
.scroll { max-height: 32rem; overflow: auto; border: 1px solid var(--line); }
figure { margin: 1.5rem 0; }
figure svg { width: 100%; height: auto; color: var(--ink); }
figcaption, .note { opacity: .8; font-size: .9rem; max-width: 60rem; }
dl { display: flex; flex-wrap: wrap; gap: 1rem; }
dl div { background: var(--soft); padding: .6rem 1rem; border-radius: .4rem; }
dt { font-size: .85rem; opacity: .8; } dd { margin: 0; font-size: 1.2rem; font-weight: 600; }
</style>
</head>
<body>
<h1>$title</h1>
$body
</body>
</html>
""")


def render(data: ReportData) -> str:
    """The whole page; everything that comes from a file is escaped."""
    parts = [_summary(data)]
    if data.missing:
        parts.append("<h2>Missing</h2>\n<ul>" + "".join(f"<li>{_text(line)}</li>" for line in data.missing) + "</ul>")
    parts.append("<h2>Record</h2>\n" + _table(("setting", "value"), [(k, _plain(v)) for k, v in data.manifest.items()]))
    if data.layers:
        parts.append("<h2>Layers</h2>\n" + "\n".join(_figure(study) for study in data.charts))
        parts.append(_layers(data))
        parts.append("<h2>Cost</h2>\n" + _figure(data.cost))
    if data.training:
        parts.append("<h2>Training</h2>\n" + "\n".join(map(_figure, training_studies(data.training))))
    if data.studies:
        parts.append("<h2>Studies</h2>\n" + "\n".join(map(_figure, data.studies)))
    return PAGE.substitute(policy=escape(POLICY), title=_text(f"QBB report: {data.record}"), body="\n".join(parts))


def _text(value: str) -> str:
    return escape(printable(value))


def _plain(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    return "–" if value is None else str(value)


def readable_number(value: float) -> str:
    """An int with thin spaces, a float with four digits."""
    if isinstance(value, int) or (value.is_integer() and abs(value) >= 1e4):
        return f"{int(value):,}".replace(",", "\N{NARROW NO-BREAK SPACE}")
    return f"{value:.4g}"


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def _summary(data: ReportData) -> str:
    """The figures that most readers come for."""
    total = dict(zip(data.cost.columns, data.cost.rows[-1], strict=True))
    weights, stored = total["float multiply-adds"], total["bytes"]
    errors = [layer.errors[-1] for layer in data.layers]
    facts = [("recipe", _plain(data.manifest.get("recipe"))), ("layers", readable_number(len(data.layers)))]
    if errors and isinstance(weights, int) and isinstance(stored, int):
        additions, products = total["additions"], total["multiplications"]
        assert isinstance(additions, int) and isinstance(products, int)
        facts += [
            ("weights", readable_number(weights)),
            ("bits per weight", readable_number(8 * stored / weights)),
            ("size", f"{size(stored)} (float16: {size(2 * weights)})"),
            ("mean error", f"{readable_number(sum(errors) / len(errors))} (worst: {readable_number(max(errors))})"),
            ("additions per token", f"{additions:.3g} (or {total['look-ups']:.3g} look-ups)"),
            ("multiplications per token", f"{products:.3g} (float: {weights:.3g})"),
        ]
    return "<dl>" + "".join(f"<div><dt>{_text(k)}</dt><dd>{_text(v)}</dd></div>" for k, v in facts) + "</dl>"


def _layers(data: ReportData) -> str:
    columns = ("layer", "out × in", "bases", "group size", "offset", "bits per weight", "bytes", "error", "by stage")
    rows = []
    for layer in data.layers:
        spec, bits = layer.spec, layer_bits(layer)
        stages = [readable_number(error) for error in layer.errors]
        rows.append(
            (
                layer.name,
                f"{spec.N} × {spec.K}",
                spec.bases,
                spec.group_size,
                _plain(layer.offset),
                bits,
                round(bits * spec.N * spec.K / 8),
                layer.errors[-1],
                " → ".join(stages if len(stages) <= 9 else [*stages[:4], "…", *stages[-3:]]),
            )
        )
    note = (
        "Error: squared error over the squared norm of the weights, of what is stored; by stage: as the recipe went on."
    )
    return f'<p class="note">{note}</p>\n' + _table(columns, rows)


def _table(columns: Sequence[str], rows: Iterable[Sequence[str | float | None]]) -> str:
    """A table that scrolls within the page; columns of numbers are set to the right."""
    rows = [list(row) for row in rows]
    numeric = [all(not isinstance(row[i], str) for row in rows) for i in range(len(columns))]
    mark = [' class="number"' if yes else "" for yes in numeric]
    head = "".join(f"<th{m}>{_text(c)}</th>" for m, c in zip(mark, columns, strict=True))
    lines = []
    for row in rows:
        cells = ("–" if v is None else _text(v) if isinstance(v, str) else readable_number(v) for v in row)
        lines.append("<tr>" + "".join(f"<td{m}>{c}</td>" for m, c in zip(mark, cells, strict=True)) + "</tr>")
    body = "\n".join(lines)
    return f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'


def _figure(study: Study) -> str:
    """A chart or a table with its title and note."""
    if study.kind == "table":
        inner = _table(study.columns, study.rows)
    elif any(y is not None for series in study.series for y in series.y):
        inner = svg(study)
    else:
        inner = "<p>no data</p>"
    note = f"<figcaption>{_text(study.note)}</figcaption>" if study.note else ""
    return f"<figure>\n<h3>{_text(study.title)}</h3>\n{inner}\n{note}\n</figure>"
