"""``qbb study`` on small models: every study is there, is a study, is not made twice, and is shown."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")

from qbb_export import cli
from qbb_export.record import Record
from qbb_export.studies import Study
from qbb_export.studying import STUDIES
from tests.unit.models import tiny, tiny_llama

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "max_position_embeddings": 32}
QUICK = ("--steps", "2", "--bases", "2", "--group-size", "32", "--device", "cpu")
FILES = {
    "weights": ("weights-bases", "weights-flips", "weights-layers", "weights-methods", "weights-order"),
    "cost": ("cost",),
    "components": ("components", "components-distance", "components-perplexity"),
    "losses": ("losses",),
    "samples": ("samples", "samples-perplexity"),
    "starts": ("starts",),
}


def study(folder: Path, record: Path, *arguments: object) -> int:
    return cli.main(["study", str(folder), "--record", str(record), *QUICK, *map(str, arguments)])


def read(record: Path) -> dict[str, Study]:
    return {path.stem: Study.from_json(path.read_bytes(), path) for path in record.glob("studies/*.json")}


def llama_with_tokenizer(folder: Path) -> Path:
    """Its tokens are the words ``w0`` to ``w96``."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tiny_llama(folder, **SMALL)
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(97)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def numbers(table: Study, column: str) -> dict[str, float]:
    place = next(i for i, name in enumerate(table.columns) if name.startswith(column))
    return {str(row[0]): float(row[place]) for row in table.rows if row[place] is not None}


def test_all_studies_of_a_language_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, record = llama_with_tokenizer(tmp_path / "hf"), tmp_path / "m.qbb"
    text = tmp_path / "text"
    text.write_text(" ".join(f"w{i * i % 97}" for i in range(100)))
    assert study(folder, record, "--text", text) == 0
    named = [Path(line).stem for line in capsys.readouterr().out.splitlines()]
    made = read(record)
    assert sorted(named) == sorted(made) == sorted(name for names in FILES.values() for name in names)
    assert all(Study.from_json(one.as_json()) == one for one in made.values())

    kl, bits = numbers(made["components"], "KL"), numbers(made["components"], "bits")
    assert list(kl) == [
        "float model", "greedy", "+ refinement", "+ alternating", "+ scales distilled (qbb)",
        "fast", "sweep", "sweep + scales", "sweep + scales + codes (best)",
    ]  # fmt: skip
    assert kl["float model"] == 0 < min(kl[name] for name in kl if name != "float model")
    assert bits["greedy"] == pytest.approx(2 + 2 * 16 / 32 + numbers_of_empty_offsets(made["cost"]))
    assert len(numbers(made["components"], "perplexity")) == 9
    losses = numbers(made["losses"], "KL")
    assert list(losses) == ["CE of the tokens", "KL", "MSE of the logits", "… + features", "… + features + swap"]
    assert [(s.label, s.x) for s in made["samples"].series] == [("random", (32, 128)), ("filtered", (32, 128))]
    # The same run in two tables: 256 sequences of which the filter keeps half.
    assert made["samples"].series[1].y[1] == kl["+ scales distilled (qbb)"]
    assert numbers(made["starts"], "KL")["the model's weights"] == kl["+ alternating"]

    times = {path: path.stat().st_mtime_ns for path in record.rglob("*") if path.suffix in (".json", ".safetensors")}
    assert study(folder, record, "--text", text) == 0
    assert {path: path.stat().st_mtime_ns for path in times if path.name != "manifest.json"} == {
        path: time for path, time in times.items() if path.name != "manifest.json"
    }
    (record / "studies" / "losses.json").unlink()
    assert study(folder, record, "--text", text, "--only", "losses") == 0
    assert read(record) == made  # from the runs in the record

    pytest.importorskip("matplotlib")
    assert cli.main(["report", str(record), "-o", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert all(one.title in page for one in made.values())


def numbers_of_empty_offsets(cost: Study) -> float:
    """Bits per weight that layers without an offset spend on saying so: 32 a layer."""
    total = next(row for row in cost.rows if row[0] == "all")
    return 32 * (len(cost.rows) - 1) / float(total[-1] or 1)


def test_an_export_stays_what_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A study beside an export changes neither its layers nor what its manifest says."""
    folder = tiny_llama(tmp_path / "hf", **SMALL)
    quick = ("--bases", "2", "--group-size", "32", "--recipe", "greedy", "--no-verify", "--device", "cpu")
    assert cli.export_main([str(folder), "-o", str(tmp_path / "m.onnx"), *quick]) == 0
    record = tmp_path / "m.qbb"
    before = {path: path.read_bytes() for path in record.rglob("*") if path.is_file()}
    assert study(folder, record, "--only", "cost") == 0
    assert {path: path.read_bytes() for path in before} == before
    first = read(record)
    assert list(first) == ["cost"]
    assert study(folder, record, "--only", "cost", "--bases", "3") == 0
    assert read(record)["cost"] != first["cost"]  # other settings, so it was made anew
    with Record.open(record, recipe="greedy"):
        assert study(folder, record, "--only", "cost") == 2
    assert "in use" in capsys.readouterr().err


def test_an_encoder_has_fewer_losses(tmp_path: Path) -> None:
    folder, _ = tiny("bert", tmp_path / "hf")
    assert study(folder, tmp_path / "m.qbb", "--only", "losses") == 0
    made = read(tmp_path / "m.qbb")
    assert [row[0] for row in made["losses"].rows] == ["embeddings", "… + features", "… + features + swap"]
    assert made["losses"].columns == ("method", "bits per weight", "1 − cosine to the float model")


def test_bad_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, text = tiny_llama(tmp_path / "hf", **SMALL), tmp_path / "text"
    text.write_text("w1 w2")
    for arguments, message in (
        (("--only", "nonsense"), f"expected of {', '.join(STUDIES)}"),
        (("--steps", "0"), "--steps"),
        (("--only", "losses", "--text", text), "no tokenizer.json"),
    ):
        assert study(folder, tmp_path / "m.qbb", *arguments) == 2
        assert message in capsys.readouterr().err
    vit, _ = tiny("vit", tmp_path / "vit")
    assert study(vit, tmp_path / "vit.qbb", "--only", "weights,losses") == 2
    assert "token ids" in capsys.readouterr().err
    assert not (tmp_path / "vit.qbb").exists()
