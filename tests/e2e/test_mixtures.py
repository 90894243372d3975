"""Mixtures of experts: every expert's matrices become nodes of ours, in a file and in a folder with a KV cache."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest

torch = pytest.importorskip("torch")
genai = pytest.importorskip("onnxruntime_genai")

from torch import nn  # noqa: E402

from qbb_export import cli  # noqa: E402
from qbb_export.distill import settings  # noqa: E402
from qbb_export.experts import Experts, split_experts  # noqa: E402
from qbb_export.load import load_torch  # noqa: E402
from qbb_export.record import Record  # noqa: E402
from qbb_export.runtimes.decoder import Decoder  # noqa: E402
from qbb_export.runtimes.ort import session  # noqa: E402
from qbb_export.source import LoadOptions  # noqa: E402
from tests.e2e.test_generation import (  # noqa: E402
    PROMPT,
    error_of,
    export,
    genai_greedy,
    greedy,
    is_greedy,
    layers_of,
    quantised,
    student,
)
from tests.unit import models  # noqa: E402

THREE = ("--recipe", "fast", "--bases", "3", "--group-size", "32")
IDS = np.random.default_rng(4).integers(2, 280, (2, 30))


def of_transformers(source: Path) -> nn.Module:
    """The model as transformers has it, experts in one parameter."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(source).eval()


def logits_of(module: nn.Module, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return module(input_ids=torch.from_numpy(ids)).logits.numpy()


def steps_of(folder: Path, ids: np.ndarray, *, library: bool = True) -> np.ndarray:
    """Logits of a folder: nine tokens, then one after the other, for which most experts have nothing to do."""
    decoder = Decoder(session(folder / "model.onnx", library=library), ids.shape[1])
    ends = [0, *range(9, ids.shape[1] + 1)]
    return np.concatenate([decoder.step(ids[:, a:b]) for a, b in pairwise(ends)], axis=1)


def experts_in(names: list[str]) -> set[str]:
    return {name.removesuffix(".qbb_planes") for name in names if ".experts." in name}


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_folder(tmp_path, family):
    """Library, function body, PyTorch and onnxruntime-genai agree; the export itself compares whole sequences."""
    source, count = models.tiny_decoder(family, tmp_path / "hf")
    out = tmp_path / "out"
    assert export(source, "-o", out, *THREE) == 0
    module = student(source, tmp_path / "out.qbb")
    wanted = {name for name, part in module.named_modules() if isinstance(part, nn.Linear) and ".experts." in name}
    assert wanted
    assert experts_in(quantised(tmp_path / "out.qbb")) == wanted
    assert len(quantised(tmp_path / "out.qbb")) == count
    assert sum("gate_proj" in name or "up_proj" in name or "down_proj" in name for name in layers_of(out)) >= len(
        wanted
    )
    expected = logits_of(module, IDS[:1])
    peak = np.abs(expected).max()
    steps = steps_of(out, IDS[:1])
    assert np.abs(steps - expected).max() <= 1e-3 * peak
    assert np.abs(steps_of(out, IDS[:1], library=False) - steps).max() <= 1e-4 * peak
    tokens = genai_greedy(out, PROMPT, 40)
    assert tokens == greedy(out, PROMPT, 40)
    assert is_greedy(module, PROMPT, tokens)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe"])
def test_file(tmp_path, family):
    """The verification compares library, body and PyTorch; here also for a single token."""
    source, count = models.tiny_decoder(family, tmp_path / "hf")
    assert export(source, "-o", tmp_path / "m.onnx", *THREE) == 0
    assert len(quantised(tmp_path / "m.qbb")) == count
    expected = logits_of(student(source, tmp_path / "m.qbb"), IDS[:1, :1])
    for library in (True, False):
        opened = session(tmp_path / "m.onnx", library=library)
        feeds = {"input_ids": IDS[:1, :1], "attention_mask": np.ones((1, 1), np.int64)}
        (got,) = opened.run(["logits"], feeds)
        assert np.abs(got - expected).max() <= 1e-3 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mixtral", {}),
        ("qwen2_moe", {"norm_topk_prob": True}),
        ("qwen3_moe", {"norm_topk_prob": False, "mlp_only_layers": [0]}),
    ],
)
def test_float_is_what_transformers_computes(tmp_path, family, changes):
    source, _ = models.tiny_decoder(family, tmp_path / "hf", **changes)
    expected = logits_of(of_transformers(source), IDS)
    peak = np.abs(expected).max()
    assert export(source, "-o", tmp_path / "out", "--recipe", "float") == 0
    assert np.abs(steps_of(tmp_path / "out", IDS[:1]) - expected[:1]).max() <= 1e-4 * peak
    if family == "mixtral":
        assert export(source, "-o", tmp_path / "m.onnx", "--recipe", "float") == 0
        feeds = {"input_ids": IDS, "attention_mask": np.ones_like(IDS)}
        (got,) = session(tmp_path / "m.onnx").run(["logits"], feeds)
        assert np.abs(got - expected).max() <= 1e-4 * peak


def test_float16(tmp_path):
    """Of a checkpoint in bfloat16, where many of a router's products are equal. Patterns name single experts."""
    source, count = models.tiny_decoder("qwen3_moe", tmp_path / "hf")
    of_transformers(source).bfloat16().save_pretrained(source)
    options = ("--dtype", "float16", "--exclude", "*.1.mlp.experts.3.*")
    assert export(source, "-o", tmp_path / "out", *THREE, *options) == 0
    names = quantised(tmp_path / "out.qbb")
    assert len(names) == count - 3
    assert not [name for name in names if ".1.mlp.experts.3." in name]


def test_experts_without_tokens():
    """Ours against transformers' module in float64: the same sums, but for the order within a product."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    torch.manual_seed(0)
    config = MixtralConfig(hidden_size=16, intermediate_size=24, num_local_experts=5, num_experts_per_tok=2)
    holder = nn.Module()
    holder.experts = theirs = MixtralExperts(config).eval()
    theirs.double()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter)
    split_experts(holder)
    ours = holder.experts
    assert isinstance(ours, Experts)
    assert ours[2].up_proj.weight.data_ptr() == theirs.gate_up_proj[2, 24:].data_ptr()
    x, weights = torch.randn(7, 16).double(), torch.rand(7, 2).double()
    index = torch.tensor([[0, 4], [4, 1], [1, 0], [0, 1], [4, 0], [1, 4], [0, 1]])  # neither 2 nor 3
    with torch.no_grad():
        config._experts_implementation = "eager"
        expected = theirs(x, index, weights)
        assert (ours(x, index, weights) - expected).abs().max() <= 1e-14 * 16 * 24 * expected.abs().max()
        assert ours(x[:0], index[:0], weights[:0]).shape == (0, 16)


def test_learning_with_an_expert_that_no_sample_reaches(tmp_path, monkeypatch):
    """Its router row is the mean of the others', hence never the largest: its matrices stay as they start."""

    def small(recipe):
        phases = tuple(replace(d, steps=3, batch=4) for d in recipe.distill)
        text = replace(recipe.text, sequences=16, length=40, validation=4)
        return replace(recipe, text=text, sweep=recipe.sweep and replace(recipe.sweep, sequences=8), distill=phases)

    recipes = {name: small(recipe) for name, recipe in settings.MODEL_RECIPES.items()}
    monkeypatch.setattr(settings, "MODEL_RECIPES", MappingProxyType(recipes))
    source, count = models.tiny_decoder("mixtral", tmp_path / "hf", num_experts_per_tok=1)
    module = of_transformers(source)
    with torch.no_grad():
        for layer in module.model.layers:
            layer.mlp.gate.weight[3] = layer.mlp.gate.weight[:3].mean(dim=0)
    module.save_pretrained(source)
    learnt = {}
    for recipe in ("sweep", "best"):
        options = ("--recipe", recipe, "--bases", "2", "--group-size", "32", "--exclude", "*.gate")
        assert export(source, "-o", tmp_path / recipe, *options) == 0
        names = quantised(tmp_path / f"{recipe}.qbb")
        assert len(names) == count - 2
        record = Record.join(tmp_path / f"{recipe}.qbb")
        learnt[recipe] = {name: record.load(name) for name in names}
        start = record.stage("start")
        for name, layer in learnt[recipe].items():
            if ".experts." in name and recipe == "sweep":
                same = np.array_equal(layer.words, start.load(name).words)
                assert same == (".experts.3." in name), name


def test_experts_stay_in_the_file(tmp_path):
    """What is read is a view of the mapped file."""
    source, _ = models.tiny_decoder("mixtral", tmp_path / "hf")
    module = load_torch(str(source), LoadOptions()).module
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if "model.safetensors" in line]
    mapped = [tuple(int(end, 16) for end in line[0].split("-")) for line in lines]
    experts = {name: p for name, p in module.named_parameters() if ".experts." in name}
    assert len(experts) == 24
    for name, parameter in experts.items():
        assert any(start <= parameter.data_ptr() < end for start, end in mapped), name
    assert type(module).__name__ == "MixtralForCausalLM"
    assert_same_model(module, of_transformers(source))


def assert_same_model(module: nn.Module, other: nn.Module) -> None:
    """But for the order of float32 sums."""
    expected = logits_of(other, IDS)
    assert np.abs(logits_of(module, IDS) - expected).max() <= 1e-5 * np.abs(expected).max()


def test_a_file_with_experts_together(tmp_path):
    source, _ = models.tiny_decoder("qwen3_moe", tmp_path / "hf")
    module = of_transformers(source)
    module.save_pretrained(tmp_path / "hf", save_original_format=False)
    opened = load_torch(str(source), LoadOptions()).module
    assert any(isinstance(part, Experts) for part in opened.modules())
    assert_same_model(opened, module)


def test_what_is_refused(tmp_path, capsys):
    """One line each."""
    from transformers import GptOssConfig, GptOssForCausalLM

    def line(source: Path) -> str:
        return error_of(capsys, [source, "-o", tmp_path / "out", *THREE], cli.export_main)

    olmoe, _ = models.tiny_decoder("olmoe", tmp_path / "olmoe")
    assert "architecture cannot be exported with a KV cache" in line(olmoe)
    gelu, _ = models.tiny_decoder("mixtral", tmp_path / "gelu", hidden_act="gelu")
    assert "model.layers.0.mlp: mixture of experts cannot be exported with a KV cache" in line(gelu)
    config = GptOssConfig(
        vocab_size=288, hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_local_experts=4, num_experts_per_tok=2, pad_token_id=0,
    )  # fmt: skip
    GptOssForCausalLM(config).save_pretrained(tmp_path / "oss")
    models.byte_tokenizer(tmp_path / "oss")
    assert "a mixture whose experts are no plain linear layers, model.layers.0.mlp.experts." in line(tmp_path / "oss")
    assert not (tmp_path / "out").exists()
