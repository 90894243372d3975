"""Real pretrained models, from the command line to figures. Bounds are the ones promised in docs/results.md."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from examples.minilm_demo import SENTENCES, Encoder  # noqa: E402
from qbb_export import artifact, cli  # noqa: E402
from qbb_export.runtimes.ort import session  # noqa: E402


def export(source: Path, output: Path, *arguments: str) -> None:
    recipe = () if "--recipe" in arguments else ("--recipe", "fast")
    assert cli.export_main([str(source), "-o", str(output), *arguments, *recipe]) == 0


@pytest.fixture(scope="module")
def sentences() -> list[str]:
    return SENTENCES.read_text(encoding="utf-8").splitlines()


@pytest.fixture(scope="module")
def minilm_float(minilm_dir: Path, tmp_path_factory: pytest.TempPathFactory, sentences: list[str]) -> np.ndarray:
    path = tmp_path_factory.mktemp("float") / "m.onnx"
    export(minilm_dir, path, "--recipe", "float")
    return Encoder(path, minilm_dir / "tokenizer.json")(sentences)


@pytest.mark.parametrize(("bases", "least", "bits"), [(4, 0.972, 5.0), (3, 0.90, 4.25)])
def test_sentence_embeddings(
    minilm_dir: Path,
    minilm_float: np.ndarray,
    sentences: list[str],
    tmp_path: Path,
    bases: int,
    least: float,
    bits: float,
) -> None:
    assert len(sentences) >= 100
    path = tmp_path / "m.onnx"
    export(minilm_dir, path, "--bases", str(bases), "--group-size", "64")
    embeddings = Encoder(path, minilm_dir / "tokenizer.json")(sentences)
    assert float((embeddings * minilm_float).sum(axis=1).mean()) >= least
    # What the table calls bits per weight is what lies on the disk: other weights, packed weights, page alignment.
    initializers = artifact.read_graph(path).graph.initializers.values()
    packed = sum(v.const_value.nbytes for v in initializers if "qbb_" in v.name and not v.name.endswith("qbb_bias"))
    weights = 36 * 384 * 384 - 12 * 384 * 384 + 12 * 384 * 1536
    assert 8 * packed / weights == pytest.approx(bits, abs=0.001)
    on_disk = sum(p.stat().st_size for p in tmp_path.glob("m.*data")) + path.stat().st_size
    everything = sum(v.const_value.nbytes for v in initializers)
    assert everything <= on_disk <= everything + 4096 * len(initializers) + 200_000


def perplexity(path: Path, text: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> float:
    capsys.readouterr()
    assert cli.main(["eval", str(path), "--text", str(text), "--json", *arguments]) == 0
    (result,) = json.loads(capsys.readouterr().out)["models"]
    assert math.exp(result["nll"]) == pytest.approx(result["perplexity"])
    return float(result["perplexity"])


def test_language_model(shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A few windows of the figure below, and the same logits from the function body."""
    source, text = shared / "models" / "gutenberg-llama-28m", shared / "data" / "gutenberg_heldout.txt"
    export(source, tmp_path / "float.onnx", "--recipe", "float")
    export(source, tmp_path / "m.onnx", "--bases", "3")
    some = ("--windows", "8")
    float_model = perplexity(tmp_path / "float.onnx", text, capsys, *some)
    ours = perplexity(tmp_path / "m.onnx", text, capsys, *some)
    assert float_model < ours <= 31.5 / 25.81 * float_model
    ids = np.arange(3, 203, dtype=np.int64)[None] * 7
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    (library,) = session(tmp_path / "m.onnx").run(["logits"], feeds)
    (body,) = session(tmp_path / "m.onnx", library=False).run(["logits"], feeds)
    assert np.abs(library - body).max() <= 1e-4 * np.abs(library).max()


@pytest.mark.slow
@pytest.mark.parametrize(("bases", "most"), [(4, 27.2), (3, 31.5)])
def test_perplexity_on_held_out_books(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], bases: int, most: float
) -> None:
    text = shared / "data" / "gutenberg_heldout.txt"
    export(shared / "models" / "gutenberg-llama-28m", tmp_path / "m.onnx", "--bases", str(bases))
    assert perplexity(tmp_path / "m.onnx", text, capsys) <= most
