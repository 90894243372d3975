"""What a user may ask of the recipes that learn, and the one line for what cannot be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest

from qbb_export.cli import export_main
from qbb_export.distill.settings import MODEL_RECIPES, DistillSettings, LearningOptions, ModelRecipe
from qbb_export.errors import QbbError
from qbb_export.learning import can_learn, learn
from qbb_export.quantize import RECIPES
from qbb_export.source import TorchModel


@pytest.mark.parametrize(
    ("options", "recipe", "line"),
    [
        (LearningOptions(steps=-1), "best", "--steps: out of range; expected >= 0; got -1"),
        (LearningOptions(steps=5), "sweep", "--steps with --recipe sweep: this recipe does not distil"),
        (LearningOptions(steps=5), "gptq", "--steps with --recipe gptq: this recipe does not distil"),
        (LearningOptions(start="gptq"), "gptq", "--start: gptq starts from the model's own weights"),
    ],
)
def test_options_that_do_not_fit(options: LearningOptions, recipe: str, line: str) -> None:
    with pytest.raises(QbbError) as caught:
        options.apply(recipe, "cpu")
    assert str(caught.value) == line


@pytest.mark.parametrize(
    ("option", "value"), [("budget", "full"), ("steps", 0), ("calibration", Path("book.txt")), ("start", "gptq")]
)
def test_options_for_recipes_that_do_not_learn(option: str, value: object) -> None:
    LearningOptions().refuse("fast")
    with pytest.raises(QbbError) as caught:
        LearningOptions(**{option: value}).refuse("fast")  # type: ignore[arg-type]
    expected = f"--{option} with --recipe fast: only for recipes that learn; got {value}"
    assert str(caught.value) == expected


def test_budgets_and_steps() -> None:
    best = MODEL_RECIPES["best"]
    assert LearningOptions().apply("best", "cuda") == best == LearningOptions(budget="full").apply("best", "cpu")
    reduced = LearningOptions().apply("best", "cpu")
    assert reduced == LearningOptions(budget="reduced").apply("best", "cuda") == best.reduced() != best
    assert sum(d.steps for d in reduced.distill) < 0.1 * sum(d.steps for d in best.distill)
    for short, full in zip(reduced.distill, best.distill, strict=True):  # the noise of all steps stays the same
        assert short.code_rate**2 * short.steps == pytest.approx(full.code_rate**2 * full.steps, rel=1 / short.steps)
    assert LearningOptions(steps=0).apply("best", "cuda").distill == ()
    for steps in (len(best.distill), 50, 10_000):
        phases = LearningOptions(steps=steps).apply("best", "cuda").distill
        assert len(phases) == len(best.distill)
        assert abs(sum(d.steps for d in phases) - steps) <= len(phases) / 2 and min(d.steps for d in phases) >= 1
        assert [d.codes for d in phases] == [d.codes for d in best.distill]
    with pytest.raises(QbbError, match="expected >= 1; got 0"):
        DistillSettings(steps=0)


def test_recipes_are_plain_values() -> None:
    assert set(MODEL_RECIPES) == {"best", "sweep", "qbb", "gptq"}
    for recipe in MODEL_RECIPES.values():
        assert isinstance(recipe, ModelRecipe) and hash(recipe) == hash(recipe)
        assert recipe.as_dict()["text"]["seed"] == 0


def test_an_onnx_file_cannot_be_learnt_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = '<ir_version: 8, opset_import: ["": 17]> g (float[m, 64] x) => (float[m, 64] y) { y = MatMul (x, w) }'
    proto = onnx.parser.parse_model(text)
    weights = np.random.default_rng(0).standard_normal((64, 64), dtype=np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weights, "w"))
    onnx.save(proto, tmp_path / "in.onnx")
    source, output = str(tmp_path / "in.onnx"), str(tmp_path / "out.onnx")
    before = sorted(tmp_path.iterdir())
    for recipe in MODEL_RECIPES:
        assert export_main([source, "-o", output, "--recipe", recipe, "--include", "w"]) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
        assert lines == [
            f"error: --recipe {recipe}: this recipe needs a transformers model that takes token ids; "
            f"expected --recipe {' or '.join(RECIPES)} for {source}"
        ]
    assert export_main([source, "-o", output, "--recipe", "fast", "--steps", "3"]) == 2
    assert "--steps with --recipe fast: only for recipes that learn" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_what_can_be_learnt_from(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from qbb_export.load import load_torch
    from qbb_export.source import LoadOptions
    from tests.unit.models import tiny, two_layers

    assert not can_learn(None)
    assert not can_learn(TorchModel(two_layers(), ()))
    assert not can_learn(load_torch(str(tiny("vit", tmp_path / "vit")[0]), LoadOptions()))
    assert can_learn(load_torch(str(tiny("bert", tmp_path / "bert")[0]), LoadOptions()))


@pytest.mark.parametrize("device", ["cuda", "cuda:3", "nowhere"])
def test_a_device_that_is_not_there(device: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from tests.unit.models import two_layers

    if device.startswith("cuda") and torch.cuda.is_available():
        pytest.skip("a GPU is there")
    record = tmp_path / "m.qbb"
    model = TorchModel(two_layers(), ())
    with pytest.raises(QbbError, match=r"^--device: no such device; expected cpu or a PyTorch device; got ") as caught:
        learn(model, [], {}, "best", LearningOptions(), device, record, lambda *_: None)
    assert "\n" not in str(caught.value) and not record.exists()
    with pytest.raises(QbbError, match=r"^--recipe: unknown recipe; expected one of best, .*; got finest$"):
        learn(model, [], {}, "finest", LearningOptions(), "cpu", record, lambda *_: None)


def test_each_process_takes_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    from qbb_export.distill.ranks import Ranks

    assert Ranks.device("cuda:1") == "cuda:1" and Ranks.of_environment() == Ranks()
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert (Ranks.device("cuda"), Ranks.device("cpu")) == ("cuda:1", "cpu")
    with pytest.raises(QbbError) as caught:
        Ranks.device("cuda:0")
    assert str(caught.value) == "--device: each process takes a GPU of its own; expected cuda; got cuda:0"
