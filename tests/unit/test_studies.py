"""Studies: what they measure agrees with the quantizer, costs with hand counts, JSON with itself."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qbb_export.errors import QbbError
from qbb_export.format import LAYOUT_ROWS, LAYOUT_TILED, Spec
from qbb_export.quantize import QuantizeSettings, quantize
from qbb_export.quantize.settings import RefineSettings
from qbb_export.record import LayerHead, Record, layer_key, read_layers
from qbb_export.studies import Series, Study, cost_study, weight_studies

Array = np.ndarray[Any, Any]
SETTINGS = QuantizeSettings(3, 64, rounds=6, shakes=1, scale_dtype="float32", refine=RefineSettings(steps=24))


def weights(seed: int, N: int = 24, K: int = 150) -> Array:
    return (0.02 * np.random.default_rng(seed).laplace(size=(N, K))).astype(np.float32)


@pytest.fixture(scope="module")
def studies() -> dict[str, Study]:
    layers = {"layers.0.fc": weights(0), "layers.1.fc": weights(1)}
    return {study.name: study for study in weight_studies(layers, SETTINGS)}


def curves(study: Study) -> dict[str, Series]:
    return {series.label: series for series in study.series}


def test_errors_by_layer_are_those_of_the_recipes(studies: dict[str, Study]) -> None:
    """Small layers are not sampled, so the whole-matrix recipes say the same, up to the rounding of scales."""
    by_label = curves(studies["weights-layers"])
    settings = replace(SETTINGS, offset=False)
    for number, name in enumerate(("layers.0.fc", "layers.1.fc")):
        w = weights(number)
        for label, expected in {
            "cascaded": quantize(w, settings, "greedy").errors[-2],
            "cascaded, refined": quantize(w, settings, "refine").errors[-2],
            "alternating, several starts": quantize(w, settings, "fast").errors[-2],
        }.items():
            assert by_label[label].x[number] == name
            assert by_label[label].y[number] == pytest.approx(expected, rel=1e-12)


def test_methods_are_ordered_as_they_must_be(studies: dict[str, Study]) -> None:
    rows = {str(row[0]): float(row[1] or 0.0) for row in studies["weights-methods"].rows}
    for init in ("cascaded", "independent", "random"):
        assert rows[f"{init}, refined"] < rows[init]
    assert rows["alternating, several starts"] <= min(rows["clipped uniform ladder"], rows["cascaded"])


def test_error_by_bases_falls(studies: dict[str, Study]) -> None:
    for series in studies["weights-bases"].series:
        assert series.x == (1, 2, 3, 4, 5, 6)
        values = [value for value in series.y if value is not None]
        assert len(values) == 6 and values == sorted(values, reverse=True)


def test_orders_start_alike_and_sequential_ends_lower(studies: dict[str, Study]) -> None:
    by_label = curves(studies["weights-order"])
    sequential, simultaneous = by_label["sequential"], by_label["simultaneous"]
    assert sequential.x == simultaneous.x == (0, 24, 48, 72)
    assert sequential.y[0] == simultaneous.y[0]
    assert (sequential.y[-1] or 0.0) < (simultaneous.y[-1] or 0.0)


def test_shares_of_flipped_signs(studies: dict[str, Study]) -> None:
    series = studies["weights-flips"].series
    assert [s.label for s in series] == ["basis 1", "basis 2", "basis 3"]
    shares = [value for s in series for value in s.y if value is not None]
    assert all(0.0 <= share <= 1.0 for share in shares) and max(shares) > 0.01


class Lazy(Mapping[str, Any]):
    """Makes layers when asked, and counts."""

    def __init__(self, count: int, N: int, K: int) -> None:
        self.asked: list[str] = []
        self._count, self._shape = count, (N, K)

    def __getitem__(self, name: str) -> Array:
        self.asked.append(name)
        return weights(int(name), *self._shape)

    def __iter__(self) -> Iterator[str]:
        return map(str, range(self._count))

    def __len__(self) -> int:
        return self._count


def test_layers_are_loaded_once_and_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qbb_export.studies.weights.SAMPLE_ROWS", 5)
    monkeypatch.setattr("qbb_export.studies.weights.FEW_LAYERS", 2)
    monkeypatch.setattr("qbb_export.studies.weights.MOST_BASES", 2)
    layers, seen = Lazy(4, 40, 64), []
    made = weight_studies(layers, SETTINGS, lambda stage, done, total: seen.append((done, total)))
    assert layers.asked == ["0", "1", "2", "3"] and seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    chart = curves(next(study for study in made if study.name == "weights-layers"))
    rows = weights(2, 40, 64)[[0, 10, 20, 29, 39]]
    expected = quantize(rows, replace(SETTINGS, offset=False), "greedy").errors[-2]
    assert chart["cascaded"].y[2] == pytest.approx(expected, rel=1e-12)
    assert any("2 of 4 layers" in study.note for study in made)


def test_torch_weights_of_any_float_type() -> None:
    torch = pytest.importorskip("torch")
    half = torch.from_numpy(weights(3)).to(torch.bfloat16)
    settings = QuantizeSettings(1, 0, refine=RefineSettings(steps=2), rounds=1, shakes=0)
    assert weight_studies({"a": half}, settings) == weight_studies({"a": half.float().numpy()}, settings)


def test_a_zero_layer_has_no_error() -> None:
    settings = QuantizeSettings(2, 0, refine=RefineSettings(steps=2), rounds=1, shakes=0)
    for study in weight_studies({"zero": np.zeros((3, 40), np.float32)}, settings):
        assert all(value == 0.0 for s in study.series if study.name != "weights-flips" for value in s.y)


def test_bad_weights_are_refused() -> None:
    with pytest.raises(QbbError, match=r"^fc: weights hold NaN, Inf"):
        weight_studies({"fc": np.full((2, 32), np.nan, np.float32)}, SETTINGS)
    with pytest.raises(QbbError, match="no layers to study"):
        weight_studies({}, SETTINGS)


def test_costs_are_counted_by_hand() -> None:
    plain = LayerHead("a", Spec(130, 48, 3, 64, LAYOUT_TILED), 16, False, (0.1,))
    shifted = LayerHead("b", Spec(64, 16, 2, 64, LAYOUT_ROWS), 32, True, (0.1,))
    study = cost_study([plain, shifted])
    a, b, total = (dict(zip(study.columns, row, strict=True)) for row in study.rows)
    # 3 planes of 48 rows of 5 words, 3 × 48 × 3 scales, and the four bytes that stand for no offset
    assert a["bytes"] == 3 * 48 * 5 * 4 + 3 * 48 * 3 * 2 + 4
    assert a["additions"] == 3 * 48 * 130 and a["look-ups"] == 3 * 48 * 33 and a["multiplications"] == 3 * 48 * 3
    assert b["bytes"] == 2 * 16 * 2 * 4 + 2 * 16 * 4 + 16 * 4
    assert b["multiplications"] == (2 + 1) * 16 and b["float multiply-adds"] == 1024 and b["float16 bytes"] == 2048
    assert total["layer"] == "all" and total["additions"] == 3 * 48 * 130 + 2 * 1024
    assert total["bits per weight"] == pytest.approx(8 * (a["bytes"] + b["bytes"]) / (48 * 130 + 1024))
    assert len(cost_study([]).rows) == 1


STUDY = Study(
    "x-1.y",
    "Größe <b>",
    "lines",
    "samples",
    "perplexity",
    (Series("a", (1, 2.5), (0.5, None)), Series("b", ("p", "q"), (1, 2))),
    ("k", "v"),
    (("one", 1), (2.0, None)),
    "note",
)


def test_json_round_trip() -> None:
    assert Study.from_json(STUDY.as_json()) == STUDY
    assert STUDY.as_json().isascii() and Study.from_json(STUDY.as_json().encode()).as_json() == STUDY.as_json()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"name": "../x"}, "bad name"),
        ({"name": ""}, "bad name"),
        ({"kind": "pie"}, "unknown kind"),
        ({"title": 7}, "expected a text"),
        ({"rows": [["one"]]}, "not as long"),
        ({"rows": [[[], 1]]}, "finite number"),
        ({"series": [{"label": "a", "x": [1], "y": []}]}, "differ in length"),
        ({"series": [{"label": "a", "x": [True], "y": [1]}]}, "finite number"),
        ({"series": [{"label": "a", "x": [1], "y": [float("nan")]}]}, "finite number"),
        ({"series": [{"x": [1], "y": [1]}]}, "KeyError"),
        ({"columns": None}, "TypeError"),
    ],
)
def test_what_is_no_study_is_refused_in_one_line(change: dict[str, Any], why: str) -> None:
    text = json.dumps({**json.loads(STUDY.as_json()), **change})
    with pytest.raises(QbbError, match=r"^f\.json: not a study") as caught:
        Study.from_json(text, "f.json")
    assert why in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[1]", "{", "null", b"\xff\xfe"])
def test_what_is_no_json_is_refused(text: str | bytes) -> None:
    with pytest.raises(QbbError, match=r"^f\.json: not a study"):
        Study.from_json(text, "f.json")


def test_numbers_that_are_not_finite_are_refused() -> None:
    with pytest.raises(QbbError, match="not finite"):
        Study("x", "t", "lines", series=(Series("a", (1.0,), (float("inf"),)),))


def test_heads_of_a_record(tmp_path: Path) -> None:
    made = {}
    with Record.open(tmp_path / "m.qbb", recipe="fast") as record:
        for name, settings in {
            "layers.10.fc": QuantizeSettings(2, 32, True, shakes=0),
            "layers.2.fc": QuantizeSettings(1, 0, scale_dtype="float32", shakes=0),
        }.items():
            w = weights(4)
            made[name] = quantize(w, settings)
            record.put(name, layer_key(w, settings, "fast"), made[name])
        heads = read_layers(tmp_path / "m.qbb")  # while the record is held
    assert [head.name for head in heads] == ["layers.2.fc", "layers.10.fc"]
    for head in heads:
        layer = made[head.name]
        assert head.spec == layer.spec and head.errors == layer.errors and head.offset == (layer.offset is not None)
        assert head.scale_bits == layer.scales.dtype.itemsize * 8


@pytest.mark.parametrize("harm", ["short", "empty", "renamed", "head"])
def test_damaged_heads_are_one_line(tmp_path: Path, harm: str) -> None:
    with Record.open(tmp_path / "m.qbb", recipe="fast") as record:
        record.put("fc", "key", quantize(weights(5), QuantizeSettings(1, 0, shakes=0)))
    (path,) = (tmp_path / "m.qbb" / "layers").iterdir()
    data = path.read_bytes()
    if harm == "short":
        path.write_bytes(data[:-1])
    elif harm == "empty":
        path.write_bytes(b"")
    elif harm == "renamed":
        path.rename(path.with_name("other.safetensors"))
    else:
        path.write_bytes(data.replace(b'\\"N\\":24', b'\\"N\\":25'))
    with pytest.raises(QbbError, match="layer is damaged") as caught:
        read_layers(tmp_path / "m.qbb")
    assert "\n" not in str(caught.value)
