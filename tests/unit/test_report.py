"""``qbb report``: one page that needs nothing else, escapes what files say, and tells damage in one line."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.dom import minidom

import numpy as np
import onnx_ir as ir
import pytest

from qbb_export.cli import main
from qbb_export.errors import QbbError
from qbb_export.pipeline import ExportOptions, export
from qbb_export.quantize import QuantizeSettings, quantize
from qbb_export.quantize.settings import RefineSettings
from qbb_export.record import Record
from qbb_export.report.collect import collect, stage_names, training_studies
from qbb_export.studies import Series, Study
from tests.passes.graphs import graph

pytest.importorskip("matplotlib")
from qbb_export.report import charts, render, write_report
from qbb_export.report.page import readable_number

SETTINGS = QuantizeSettings(2, 32, refine=RefineSettings(steps=5))
HOSTILE = "layers.7.</td><script>alert(1)</script>&$x_{1}$'\"\x00\ud800"
CHART = Study(
    "ppl",
    "Perplexity <b>&",
    "lines",
    "samples <i>",
    "ratio $\\frac",
    (Series("_a<script>", (1, 10, 100), (3.0, None, 1.0)), Series("$", (1, 10), (2.0, 1.5))),
    note="<img src=http://example.org/x>",
)
BARS = Study("loss", "Loss", "bars", "loss", "ppl", (Series("a", ("CE", "KD</svg>"), (2.0, 1.0)),))
TABLE = Study("tab", "Table", "table", columns=("<th>", "n"), rows=(("<td>", 12345678), ("b", None)))


def record_of(folder: Path, *names: str, recipe: str = "refine") -> Path:
    with Record.open(folder / "m.qbb", recipe=recipe, settings=SETTINGS) as record:
        for number, name in enumerate(names):
            w = np.random.default_rng(number).standard_normal((8, 70)).astype(np.float32)
            record.quantized(name, w, SETTINGS, recipe)
    return folder / "m.qbb"


def add_studies(record: Path, *studies: Study) -> None:
    (record / "studies").mkdir()
    for study in studies:
        (record / "studies" / f"{study.name}.json").write_text(study.as_json())


def add_log(record: Path, text: str) -> None:
    (record / "distill").mkdir()
    (record / "distill" / "log.jsonl").write_text(text)


def log_of(steps: int, phase: int | None = None) -> str:
    lines = []
    for step in range(1, steps + 1):
        entry = {"step": step, "loss": 1 / step, "validation": 2 / step if step % 10 == 0 else None, "rate": 1e-3}
        lines.append(json.dumps(entry if phase is None else {**entry, "phase": phase}) + "\n")
    return "".join(lines)


class Elements(HTMLParser):
    """Tags and attributes as a browser would see them, and the text between."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_record_of_the_pipeline(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weights = {name: rng.standard_normal((64, 64)).astype(np.float32) for name in ("a", "b")}
    model = graph("agraph (float[n, 64] x) => (float[n, 64] y) { h = MatMul(x, a) \n y = MatMul(h, b) }", weights)
    ir.save(model, tmp_path / "in.onnx")
    made = export(str(tmp_path / "in.onnx"), tmp_path / "m.onnx", ExportOptions("refine", SETTINGS, verify=False))
    paths = write_report(tmp_path / "m.qbb", tmp_path / "r.html")
    assert paths == (tmp_path / "r.html", tmp_path / "r.json")
    text, numbers = paths[0].read_text("utf-8"), json.loads(paths[1].read_text())
    assert {layer["name"]: layer["errors"][-1] for layer in numbers["layers"]} == {
        layer.name: layer.relative_error for layer in made.layers
    }
    assert numbers["cost"]["rows"][-1][3] == pytest.approx(made.packed_bytes, abs=1)
    assert numbers["manifest"]["settings.refine.steps"] == 5 and numbers["manifest"]["recipe"] == "refine"
    shown = Elements(text).text
    for layer in made.layers:
        assert layer.name in shown and f"{layer.relative_error:.4g}" in shown
    assert "qbb study MODEL --record" in shown and "No training curve" in shown


def test_everything_there_is_shown_and_nothing_is_fetched(tmp_path: Path) -> None:
    record = record_of(tmp_path, "layers.10.fc", "layers.9.fc", HOSTILE)
    add_studies(record, CHART, BARS, TABLE, Study("weights-x", "Weights", "table"), Study("none", "Empty", "lines"))
    add_log(record, log_of(25))
    before = sorted((path, path.read_bytes()) for path in record.rglob("*") if path.is_file())
    text = render(collect(record))
    assert before == sorted((path, path.read_bytes()) for path in record.rglob("*") if path.is_file())
    found = Elements(text)
    assert not {"script", "img", "link", "iframe", "object", "base", "form", "image"} & set(found.tags)
    for name, value in found.attributes:
        assert not name.startswith("on")
        if name in ("src", "href", "xlink:href"):
            assert value is not None and value.startswith("#")
        assert "url(" not in (value or "") or "url(#" in (value or "")
    assert "@import" not in text and "<script" not in text
    assert found.tags.count("svg") == 2 + 2 + 2  # layers, stages; loss, rate; the two studies
    for piece in ("Perplexity <b>&", "<img src=http://example.org/x>", "12\u202f345\u202f678", "no data", "Loss"):
        assert piece in found.text
    assert "Missing" not in found.text
    assert found.text.index("layers.9.fc") < found.text.index("layers.10.fc")
    assert "</td><script>alert(1)</script>&$x_{1}$'\"\ufffd\ufffd" in found.text
    for piece in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        minidom.parseString(piece)
        assert charts.INK not in piece and "currentColor" in piece
    text.encode("utf-8")


def test_the_same_record_gives_the_same_bytes(tmp_path: Path) -> None:
    record = record_of(tmp_path, "a", "b")
    add_studies(record, CHART)
    texts = [render(collect(record)), render(collect(record))]
    assert texts[0] == texts[1]


def test_json_holds_the_studies_and_the_whole_log(tmp_path: Path) -> None:
    record = record_of(tmp_path, "a", HOSTILE)
    add_studies(record, CHART, TABLE)
    add_log(record, log_of(1500, 1) + log_of(40, 2) + '{"step": 41, "lo')  # killed while writing
    _, numbers = write_report(record, tmp_path / "r.html")
    value = json.loads(numbers.read_text("ascii"))
    assert [Study.from_json(json.dumps(study)) for study in value["studies"]] == [CHART, TABLE]
    assert len(value["training"]) == 1540 and value["training"][-1]["step"] == 1540
    assert {layer["name"] for layer in value["layers"]} == {"a", HOSTILE}
    data = collect(record)
    loss, rate = training_studies(data.training)
    assert [series.label for series in loss.series] == [
        "training, phase 1",
        "validation, phase 1",
        "training, phase 2",
        "validation, phase 2",
    ]
    assert len(loss.series[0].x) <= 600 and len(loss.series[1].x) == 150 and loss.series[2].x[0] == 1501
    assert len(rate.series) == 2


def test_a_loss_that_is_no_number_leaves_a_gap(tmp_path: Path) -> None:
    record = record_of(tmp_path, "a")
    add_log(record, log_of(3) + '{"step": 4, "loss": NaN, "validation": null, "rate": 0.1}\n')
    assert [line.loss for line in collect(record).training] == [1.0, 0.5, 1 / 3, None]
    assert "NaN" not in collect(record).as_json()


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        ("manifest", "manifest.json is damaged"),
        ("manifest list", "manifest.json is damaged"),
        ("manifest nan", "manifest.json is damaged"),
        ("format", "record of another format; expected 1; got 99"),
        ("layer", "layer is damaged"),
        ("study", "not a study"),
        ("study nested", "not a study"),
        ("log", "line 2: damaged line"),
        ("log key", "line 1: damaged line"),
        ("gone", "not a record"),
    ],
)
def test_damage_is_one_line_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], harm: str, message: str
) -> None:
    record = record_of(tmp_path, "a")
    manifest = record / "manifest.json"
    if harm == "manifest":
        manifest.write_text("{")
    elif harm == "manifest list":
        manifest.write_text("[1]")
    elif harm == "manifest nan":
        manifest.write_text('{"format": 1, "x": [NaN]}')
    elif harm == "format":
        manifest.write_text('{"format": 99}')
    elif harm == "gone":
        manifest.unlink()
    elif harm == "layer":
        (path,) = (record / "layers").iterdir()
        path.write_bytes(path.read_bytes()[:-7])
    elif harm.startswith("study"):
        (record / "studies").mkdir()
        (record / "studies" / "x.json").write_text("[" * 100_000 if harm == "study nested" else '{"name": "x"}')
    else:
        add_log(record, log_of(1) + "{]\n" if harm == "log" else '{"step": 1}\n')
    assert main(["report", str(record), "-o", str(tmp_path / "r.html")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not list(tmp_path.glob("r.*"))


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = record_of(tmp_path, "a", recipe="greedy")
    assert main(["report", str(record)]) == 0
    assert capsys.readouterr().out.splitlines() == [str(record / "report.html"), str(record / "report.json")]
    old = (record / "report.html").read_bytes()
    assert main(["report", str(record)]) == 2
    assert "--force" in capsys.readouterr().err
    assert main(["report", str(record), "--force"]) == 0 and (record / "report.html").read_bytes() == old
    assert main(["report", str(record), "-o", str(tmp_path / "r.json")]) == 2
    assert main(["report", str(record), "-o", str(tmp_path / "no" / "r.html")]) == 2
    assert "cannot write the report" in capsys.readouterr().err


def test_an_empty_record_says_what_is_missing(tmp_path: Path) -> None:
    data = collect(record_of(tmp_path))
    assert len(data.missing) == 3 and not data.charts
    assert "No layer is finished yet" in Elements(render(data)).text


def test_two_hundred_layers_stay_readable() -> None:
    names = tuple(f"model.layers.{i}.self_attn.a_very_long_projection_name" for i in range(200))
    study = Study("many", "", "lines", "layer", "error", (Series("a", names, tuple(map(float, range(200)))),))
    labels = re.findall(r"<text[^>]*>([^<]*)</text>", charts.svg(study))
    layers = [label for label in labels if "self_attn" in label or "…" in label]
    assert 10 <= len(layers) <= charts.LABELLED + 1  # and the axis with what all have in common
    assert "layer (model.layers.…)" in labels and max(map(len, layers)) <= charts.NAME_LENGTH
    assert charts.png(study).startswith(b"\x89PNG")


def test_charts_have_labels_and_a_legend() -> None:
    labels = re.findall(r"<text[^>]*>([^<]*)</text>", charts.svg(CHART))
    assert {"samples &lt;i&gt;", "ratio $\\frac", " _a&lt;script&gt;", " $", "1", "10", "100"} <= set(labels)
    alone = Study("x", "", "bars", "x", "y", (Series("only", ("p", "q"), (1.0, 2.0)),))
    assert " only" not in re.findall(r"<text[^>]*>([^<]*)</text>", charts.svg(alone))


def test_names_of_stages() -> None:
    layer = quantize(np.ones((2, 64), np.float32), SETTINGS, "refine")
    names = stage_names("refine", len(layer.errors))
    assert names == ("no basis", "initialisation", "stage 1", "stage 2", "least squares", "stored")
    assert stage_names("greedy", 4) == ("no basis", "basis 1", "basis 2", "stored")
    assert stage_names("fast", 5) == ("round 0", "round 1", "round 2", "shakes", "stored")
    settled = quantize(np.ones((2, 64), np.float32), SETTINGS, "settled")
    assert stage_names("settled", len(settled.errors)) == (*names[:-1], "rounded", "alternating", "stored")
    assert stage_names("qbb", 9, start=8) == (*names[:-1], "rounded", "alternating", "stored", "learnt 1")
    assert stage_names("best", 7, start=4, sweep=5)[4:] == ("sweep", "learnt 1", "learnt 2")
    assert stage_names("rtn", 1) == ("stored",) and len(stage_names("other", 4, start=9, sweep=9)) == 4


def test_without_matplotlib_it_says_what_to_install(tmp_path: Path) -> None:
    record = record_of(tmp_path, "a")
    code = (
        "import sys; sys.modules['matplotlib'] = None; from qbb_export.cli import main;"
        f"sys.exit(main(['report', {str(record)!r}, '-o', {str(tmp_path / 'r.html')!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "pip install 'qbb-export[report]'" in done.stderr and not list(tmp_path.glob("r.*"))


def test_a_bad_name_is_refused_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(QbbError, match=r"ends in \.html"):
        write_report(tmp_path / "nothing", tmp_path / "r.txt")


def test_numbers_are_readable() -> None:
    for value, text in ((12, "12"), (1234567, "1\u202f234\u202f567"), (1.23456, "1.235"), (2e5, "200\u202f000")):
        assert readable_number(value) == text
