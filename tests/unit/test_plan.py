"""``--plan``: formulas on known shapes, and the plan of a small model."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from qbb_export import cli
from qbb_export.distill.cost import Matrix, ModelFacts, Need, Speeds, needs
from qbb_export.distill.settings import MODEL_RECIPES, ModelRecipe
from qbb_export.distill.timing import GROWTH, seconds_at
from qbb_export.format import LAYOUT_ROWS, Spec
from qbb_export.plan import largest_node

SPEEDS = Speeds(start=1e-7, forward=1e-4, write=1e-2, bases=1e-8, column=1e-8, product=1e-11)
FACTS = ModelFacts(
    elements=1_000_000,
    own_bytes=2_000_000,
    vocabulary=5000,
    decoder=True,
    length=128,
    rows_at_once=8,
    written_at_once=100,
    cached=2 * 4 * 64,
    layers=4,
    cuda=False,
)


def matrices(bases: int = 4) -> list[Matrix]:
    return [
        Matrix(Spec(256, 512, bases, 128, LAYOUT_ROWS), False, f"layers.{i}", f"x{i}.{reads}")
        for i in range(4)
        for reads in ("a", "a", "b")
    ]


def by_stage(recipe: ModelRecipe, facts: ModelFacts = FACTS, bases: int = 4) -> dict[str, Need]:
    return {need.stage: need for need in needs(facts, matrices(bases), recipe, SPEEDS)}


def test_stages_are_those_of_the_recipe() -> None:
    stages = {name: list(by_stage(recipe)) for name, recipe in MODEL_RECIPES.items()}
    assert stages["best"] == ["quantise weights", "write text", "sweep layers", "distil (1)", "distil (2)"]
    assert stages["sweep"] == stages["gptq"] == ["quantise weights", "write text", "sweep layers"]
    assert stages["qbb"] == ["quantise weights", "write text", "distil (1)"]
    assert list(by_stage(MODEL_RECIPES["qbb"].with_steps(0))) == ["quantise weights"]


def test_known_quantities() -> None:
    """By hand: 12 matrices of 256 × 512 with 4 bases and groups of 128; 4 + 4 · 16 / 128 bits and one empty offset."""
    recipe = MODEL_RECIPES["best"]
    stages, weights = by_stage(recipe), 12 * 256 * 512
    packed = 12 * (256 * 512 * 4 // 8 + 4 * 512 * 2 * 2 + 4)
    assert stages["quantise weights"].disk == stages["sweep layers"].disk == packed
    assert stages["write text"].disk == 8 * recipe.text.sequences * 128
    # Now, best and two moments of all weights and scales; the old state and the new one; then the finished layers.
    trained = weights + 12 * 512 * 2 * 4
    assert stages["distil (2)"].removed == 2 * 4 * 4 * trained
    assert stages["distil (2)"].disk == 2 * 4 * 4 * trained + packed
    assert stages["distil (1)"].removed == 2 * 4 * 4 * (trained - weights)
    # At least teacher, student, four copies of what is trained and each weight as a float.
    assert stages["distil (2)"].working > 4 * (2 * FACTS.elements + 4 * trained + weights)
    batches = math.ceil(recipe.text.sequences / 100)
    assert stages["write text"].seconds == pytest.approx(128 * batches * SPEEDS.write)


def test_more_work_takes_more() -> None:
    recipe = MODEL_RECIPES["best"]
    few, many = by_stage(recipe.with_steps(100)), by_stage(recipe.with_steps(1000))
    for stage in ("distil (1)", "distil (2)"):
        assert many[stage].seconds > 5 * few[stage].seconds
        assert many[stage].working == few[stage].working
    two, six = by_stage(recipe, bases=2), by_stage(recipe, bases=6)
    for stage in ("quantise weights", "sweep layers", "distil (1)", "distil (2)"):
        assert six[stage].disk > two[stage].disk
        assert six[stage].working >= two[stage].working
    longer = by_stage(recipe, replace(FACTS, length=512))
    for stage in ("write text", "distil (1)", "distil (2)"):
        assert longer[stage].working > by_stage(recipe)[stage].working
    for stage in ("write text", "sweep layers", "distil (1)", "distil (2)"):
        assert longer[stage].seconds > by_stage(recipe)[stage].seconds
    reduced = by_stage(recipe.reduced())
    assert all(
        reduced[stage].seconds < need.seconds for stage, need in by_stage(recipe).items() if "weights" not in stage
    )


def test_on_a_gpu_the_model_keeps_its_types_and_states_pass_through_the_host() -> None:
    recipe = MODEL_RECIPES["best"]
    gpu, cpu = by_stage(recipe, replace(FACTS, cuda=True)), by_stage(recipe)
    assert cpu["write text"].working > gpu["write text"].working - FACTS.own_bytes  # 32 bits instead of 16
    state = gpu["distil (2)"].removed // 2
    assert gpu["distil (2)"].host - cpu["distil (2)"].host == state


def test_encoders_write_nothing() -> None:
    stages = by_stage(MODEL_RECIPES["best"], replace(FACTS, decoder=False, length=66))
    assert "write text" not in stages
    assert stages["make inputs"].disk == 0
    assert all(math.isfinite(need.seconds) for need in stages.values())


def test_unknown_speeds_stay_unknown() -> None:
    found = needs(FACTS, matrices(), MODEL_RECIPES["best"], Speeds(start=1e-7))
    assert math.isfinite(found[0].seconds)
    assert all(math.isnan(need.seconds) for need in found[1:])


def test_the_largest_node_is_that_of_layers_with_one_input() -> None:
    assert largest_node(matrices(), fuse=True) == 2 * 256 * 512
    assert largest_node(matrices(), fuse=False) == 256 * 512
    assert largest_node([], fuse=True) == 0


def test_trials_grow_until_the_size_is_reached() -> None:
    sizes: list[int] = []
    assert seconds_at(sizes.append, 10) >= 0
    assert sizes == [1, 1, GROWTH, 10]


def test_plan_of_an_onnx_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where PyTorch is absent."""
    import numpy as np
    import onnx
    import onnx.parser

    text = '<ir_version: 8, opset_import: ["": 17]> g (float[m, 96] x) => (float[m, 64] y) { y = MatMul (x, w) }'
    model = onnx.parser.parse_model(text)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((96, 64), np.float32), "w"))
    onnx.save(model, tmp_path / "in.onnx")
    arguments = (tmp_path / "in.onnx", "-o", tmp_path / "out.onnx", "--group-size", "32")
    assert cli.export_main([*map(str, arguments), "--plan", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["recipe"], plan["layers"], plan["weights"]) == ("fast", 1, 96 * 64)
    assert [stage["name"] for stage in plan["stages"]] == [
        "read the model", "quantise weights", "write the file", "verify",
    ]  # fmt: skip
    packed = 96 * 64 * 4 // 8 + 64 * 3 * 4 * 2 + 4
    assert plan["stages"][1]["disk"] == packed
    assert plan["stages"][2]["disk"] == packed
    assert [path.name for path in tmp_path.iterdir()] == ["in.onnx"]
