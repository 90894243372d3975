"""`qbb eval` on the kinds of models that users have: folders, our files, and ONNX Runtime's own 4-bit files."""

import json
import logging
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

torch = pytest.importorskip("torch")

from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer  # noqa: E402

from examples.minilm_demo import Encoder  # noqa: E402
from qbb_export import cli  # noqa: E402
from qbb_export.evaluate import evaluate  # noqa: E402
from qbb_export.evaluate.runners import open_runner  # noqa: E402
from tests.unit import models  # noqa: E402

WORDS, WINDOW, COUNT = 97, 24, 3


def four_bits(source: Path, output: Path) -> Path:
    """The weights in ``MatMulNBits``; ONNX Runtime folds the transposes away first, so that they are initializers."""
    folded = output.with_name("folded.onnx")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(folded)
    onnxruntime.InferenceSession(source, options)
    level = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        quantizer = MatMulNBitsQuantizer(str(folded), block_size=32, is_symmetric=False)
        quantizer.process()
    finally:
        logging.disable(level)
    quantizer.model.save_model_to_file(str(output), False)
    return output


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float model as a folder and as ONNX, ours with 3 bases, ONNX Runtime's with 4 bits, a tokenizer and a text."""
    place = tmp_path_factory.mktemp("models")
    hf = models.tiny_llama(place / "hf", initializer_range=0.1)  # logits that are not all alike
    tokenizer = Tokenizer(WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(hf / "tokenizer.json"))
    tokenizer.save(str(place / "tokenizer.json"))
    recipes = {"float": ("--recipe", "float"), "ours": ("--recipe", "fast", "--bases", "3", "--group-size", "32")}
    for name, arguments in recipes.items():
        assert cli.export_main([str(hf), "-o", str(place / f"{name}.onnx"), "--no-verify", *arguments]) == 0
    four_bits(place / "float.onnx", place / "nbits.onnx")
    ids = np.random.default_rng(12).integers(0, WORDS, WINDOW * COUNT)
    (place / "text.txt").write_text(" ".join(f"w{i}" for i in ids), encoding="utf-8")
    return place


def windows(folder: Path) -> "torch.Tensor":
    words = (folder / "text.txt").read_text(encoding="utf-8").split()
    return torch.tensor([int(word[1:]) for word in words]).reshape(COUNT, WINDOW)


def float64_logits(folder: Path) -> "torch.Tensor":
    from transformers import LlamaForCausalLM

    with torch.no_grad():
        return LlamaForCausalLM.from_pretrained(folder / "hf", dtype=torch.float64)(windows(folder)).logits


def test_a_folder_against_float64(folder: Path) -> None:
    (result,) = evaluate([folder / "hf"], folder / "text.txt", window=WINDOW)
    ids, exact = windows(folder), float64_logits(folder)
    runner = open_runner(folder / "hf")
    ours = torch.from_numpy(np.stack([runner.logits(row.numpy()[None]) for row in ids]))
    distance = (ours - exact).abs().max().item()
    assert distance <= 1e-4 * exact.abs().max().item()  # float32 sums in other orders, as in verification.BODY_BOUND
    nll = torch.nn.functional.cross_entropy(exact[:, :-1].reshape(-1, WORDS), ids[:, 1:].reshape(-1)).item()
    # log_softmax moves by at most twice what the logits move
    assert abs(result.nll - nll) <= 2 * distance + 1e-12


def test_all_kinds_in_one_table(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["ours.onnx", "nbits.onnx", "float.onnx", "hf"]
    command = ["eval", *(str(folder / name) for name in names), "--reference", str(folder / "hf")]
    assert cli.main([*command, "--text", str(folder / "text.txt"), "--window", str(WINDOW), "--json"]) == 0
    hf, ours, nbits, plain, again = json.loads(capsys.readouterr().out)["models"]
    assert (hf["kl"], again["kl"], again["agreement"], again["perplexity_ratio"]) == (0, 0, 1, 1)
    # The same weights in another runtime. |log p - log q| <= 2·distance, and KL is a mean of such terms.
    inputs = [row.numpy()[None] for row in windows(folder)]
    seen = {}  # what the command saw
    for name in ("hf", "nbits.onnx", "ours.onnx"):
        runner = open_runner(folder / name)
        seen[name] = np.stack([runner.logits(ids) for ids in inputs])
    logits = {}
    for name in ("float.onnx", "nbits.onnx", "ours.onnx"):  # ours through the function body: no library anywhere here
        stock = onnxruntime.InferenceSession(folder / name, providers=["CPUExecutionProvider"])
        logits[name] = np.concatenate(
            [stock.run(["logits"], {"input_ids": ids, "attention_mask": np.ones_like(ids)})[0] for ids in inputs]
        )
    assert abs(plain["kl"]) <= 2 * np.abs(logits["float.onnx"] - seen["hf"]).max()
    p = torch.from_numpy(seen["hf"][:, :-1]).double().log_softmax(-1)
    for name, found in (("nbits.onnx", nbits), ("ours.onnx", ours)):
        q = torch.from_numpy(logits[name][:, :-1]).double().log_softmax(-1)
        kl = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean().item()
        distance = np.abs(logits[name] - seen[name]).max()
        assert distance <= 1e-4 * np.abs(logits[name]).max()  # kernels and body, as in verification.BODY_BOUND
        assert abs(found["kl"] - kl) <= 2 * distance + 1e-12
        assert found["kl"] > 1e-3  # quantised models do differ, by more than that
        assert found["kl_ci"][0] < found["kl"] < found["kl_ci"][1]
    assert nbits["bits_per_weight"] == pytest.approx(expected_nbits(folder / "nbits.onnx"), rel=1e-12)
    assert hf["bits_per_weight"] is None
    assert plain["bits_per_weight"] is None
    # 3 planes, and of float16 scales and float32 offsets one each per 32 inputs; rows of 80 have a third group of 16
    weights = {64: 4 * 64 * 64 - 2 * 32 * 64 + 2 * 80 * 64, 80: 64 * 80}
    bits = {64: 3 + (3 * 16 + 32) / 32, 80: (3 * 96 + 3 * (3 * 16 + 32)) / 80}
    expected = sum(weights[k] * bits[k] for k in weights) / sum(weights.values())
    assert ours["bits_per_weight"] == pytest.approx(expected, rel=1e-12)
    assert hf["file_mb"] == (folder / "hf" / "model.safetensors").stat().st_size / 1e6


def expected_nbits(path: Path) -> float:
    """Bytes of the inputs B, scales and zero points of all nodes, from ONNX's own reader."""
    graph = onnx.load(path).graph
    arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    chosen = [node for node in graph.node if node.op_type == "MatMulNBits"]
    assert len(chosen) == 15
    sizes = [{a.name: a.i for a in node.attribute} for node in chosen]
    bits = sum(8 * arrays[name].nbytes for node in chosen for name in node.input[1:])
    return bits / sum(size["K"] * size["N"] for size in sizes)


def test_sentence_encoder(minilm_dir: Path, tmp_path: Path) -> None:
    """The folder and the exported file against the demo's own pooling, which runs all sentences in one batch."""
    for name, recipe in {"m": ("greedy", "--bases", "2"), "f": ("float",)}.items():
        command = [str(minilm_dir), "-o", str(tmp_path / f"{name}.onnx"), "--no-verify", "--recipe", *recipe]
        assert cli.export_main(command) == 0
    sentences = ["The cat sleeps.", "Please close the door.", "How far is it to the station?"]
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(sentences), encoding="utf-8")
    same, plain, changed = evaluate([tmp_path / "f.onnx", tmp_path / "m.onnx"], text, reference=minilm_dir)
    a, b = (Encoder(tmp_path / name, minilm_dir / "tokenizer.json")(sentences) for name in ("f.onnx", "m.onnx"))
    cosines = (a.astype(np.float64) * b).sum(axis=1)
    assert same.cosine == pytest.approx(1, abs=1e-12)
    # float32 outputs agree to 1e-4 (verification.BODY_BOUND); a cosine of 1 is off by the square of that
    assert plain.worst_cosine >= 1 - 1e-7
    assert changed.cosine == pytest.approx(cosines.mean(), abs=2e-4)
    assert changed.worst_sentence == sentences[int(cosines.argmin())]
    assert changed.cosine < 0.99


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["hf", "--device", "quantum"], "--device: no such device"),
        (["no/such/folder"], "no such file or folder"),
        (["empty"], "not a model folder; expected config.json in it"),
        (["vit"], "not a model of text; expected an input input_ids; got ['pixel_values']"),
        (["gpt2", "--window", "65"], "PyTorch cannot run 65 tokens"),
        (["float.onnx", "--reference", "gpt2"], "vocabularies differ in size; expected 61 tokens"),
    ],
)
def test_bad_input_is_one_line(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(folder)
    Path("empty").mkdir(exist_ok=True)
    for family in ("vit", "gpt2"):
        if family in arguments and not Path(family).exists():
            models.tiny(family, Path(family))
    Path("low.txt").write_text(" ".join(f"w{i % 61}" for i in range(70)), encoding="utf-8")
    tokenizer = ["--tokenizer", "tokenizer.json", "--text", "low.txt"]
    window = [] if "--window" in arguments else ["--window", "24"]
    assert cli.main(["eval", *arguments, *tokenizer, *window]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
