"""Folders of decoders: what onnxruntime-genai, plain ONNX Runtime and PyTorch make of them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
genai = pytest.importorskip("onnxruntime_genai")

from qbb_export import cli  # noqa: E402
from qbb_export.artifact import read_graph  # noqa: E402
from qbb_export.evaluate import evaluate  # noqa: E402
from qbb_export.generation.folder import read_config  # noqa: E402
from qbb_export.load import load_torch  # noqa: E402
from qbb_export.module import quantized_linear  # noqa: E402
from qbb_export.passes.function_body import binary_basis_nodes  # noqa: E402
from qbb_export.record import Record  # noqa: E402
from qbb_export.runtimes.decoder import Decoder, empty_cache  # noqa: E402
from qbb_export.runtimes.ort import session  # noqa: E402
from qbb_export.source import LoadOptions  # noqa: E402
from tests.unit import models  # noqa: E402

SMALL = ("--recipe", "fast", "--bases", "2", "--group-size", "32")
PROMPT = [66, 85, 266, 40, 12, 71, 100]


def export(*arguments: object) -> int:
    return cli.export_main([str(a) for a in arguments])


def layers_of(folder: Path) -> list[str]:
    """Names of all quantised layers, those that were fused each by their own."""
    names = [(node.inputs[1].name or "") for node in binary_basis_nodes(read_graph(folder / "model.onnx"))]
    return [part for name in names for part in name.split("+")]


def student(source: Path, record: Path) -> torch.nn.Module:
    """The float model with the record's layers in it, as dense matrices."""
    module = load_torch(str(source), LoadOptions()).module.float()
    with torch.no_grad():
        for name in quantised(record):
            layer = quantized_linear(Record.join(record).load(name))
            module.get_parameter(f"{name}.weight").copy_(layer.dense_weight())
    return module


def quantised(record: Path) -> list[str]:
    from safetensors import safe_open

    names = []
    for file in sorted((record / "layers").glob("*.safetensors")):
        with safe_open(file, framework="numpy") as tensors:
            names.append(json.loads(tensors.metadata()["qbb"])["name"])
    return names


def greedy(folder: Path, prompt: list[int], length: int, *, library: bool = True) -> list[int]:
    """Plain ONNX Runtime, token by token."""
    decoder = Decoder(session(folder / "model.onnx", library=library), length)
    tokens = list(prompt)
    logits = decoder.step(np.asarray([prompt]))
    while len(tokens) < length:
        tokens.append(int(logits[0, -1].argmax()))
        if len(tokens) < length:
            logits = decoder.step(np.asarray([tokens[-1:]]))
    return tokens


def genai_greedy(folder: Path, prompt: list[int], length: int) -> list[int]:
    params = genai.GeneratorParams(model := genai.Model(str(folder)))
    params.set_search_options(max_length=length, min_length=length, do_sample=False)
    generator = genai.Generator(model, params)
    generator.append_tokens(prompt)
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)]


def is_greedy(module: torch.nn.Module, prompt: list[int], tokens: list[int]) -> bool:
    """Whether PyTorch, shown all tokens at once, finds each one behind the prompt the most likely there."""
    with torch.no_grad():
        best = module(input_ids=torch.tensor([tokens])).logits[0].argmax(dim=-1).tolist()
    return tokens[: len(prompt)] == prompt and tokens[len(prompt) :] == best[len(prompt) - 1 : -1]


FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi", "phi3", "olmo", "gemma", "gemma2", "gemma3")


@pytest.mark.parametrize("family", FAMILIES)
def test_families(tmp_path, capsys, family):
    """Biases, tied heads, packed projections, sliding windows, norms of queries, soft caps."""
    source, count = models.tiny_decoder(family, tmp_path / "hf")
    out = tmp_path / "out"
    assert export(source, "-o", out, *SMALL) == 0
    assert "library / student" in capsys.readouterr().out
    names = layers_of(out)
    assert len(names) == count
    assert len(quantised(tmp_path / "out.qbb")) == count
    # Token by token as all at once, and as PyTorch, over more tokens than a window has.
    ids = np.random.default_rng(4).integers(2, 280, (1, 30))
    opened = session(out / "model.onnx")
    decoder = Decoder(opened, 30)
    steps = np.concatenate([decoder.step(ids[:, :9]), *(decoder.step(ids[:, i : i + 1]) for i in range(9, 30))], axis=1)
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), **empty_cache(opened, 1)}
    (whole,) = opened.run(["logits"], feeds)
    module = student(source, tmp_path / "out.qbb")
    with torch.no_grad():
        expected = module(input_ids=torch.from_numpy(ids)).logits.numpy()
    peak = np.abs(expected).max()
    assert np.abs(steps - whole).max() <= 1e-4 * peak
    assert np.abs(steps - expected).max() <= 1e-3 * peak
    tokens = genai_greedy(out, PROMPT, 40)
    assert tokens == greedy(out, PROMPT, 40)
    assert is_greedy(module, PROMPT, tokens)


SCALINGS = {
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 1024},
    "llama3": {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
        "original_max_position_embeddings": 16,
    },
    "longrope": {
        "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.1] * 8, "long_factor": [2.1] * 8,
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "family", "changes"),
    [
        ("linear", "llama", {}),
        ("llama3", "llama", {}),
        ("yarn", "qwen3", {"head_dim": 64, "max_position_embeddings": 4096}),
        ("longrope", "phi3", {"original_max_position_embeddings": 32}),
    ],
)
def test_scaled_rotations(tmp_path, kind, family, changes):
    """The export itself compares with PyTorch."""
    source, _ = models.tiny_decoder(family, tmp_path / "hf", rope_parameters=SCALINGS[kind], **changes)
    assert export(source, "-o", tmp_path / "out", *SMALL) == 0


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gemma3"])
def test_float16(tmp_path, family):
    source, count = models.tiny_decoder(family, tmp_path / "hf")
    out = tmp_path / "out"
    assert export(source, "-o", out, *SMALL, "--dtype", "float16") == 0
    assert len(layers_of(out)) == count
    assert {value.type for value in session(out / "model.onnx").get_outputs()} == {"tensor(float16)"}
    assert len(genai_greedy(out, PROMPT, 30)) == 30


def test_portable(tmp_path):
    """No library in the folder, and none is needed."""
    source, _ = models.tiny_decoder("qwen2", tmp_path / "hf")
    for name, options in (("with", ()), ("without", ("--portable",))):
        assert export(source, "-o", tmp_path / name, *SMALL, "--no-verify", *options) == 0
    assert (tmp_path / "with" / "libqbb_ops.so").is_file()
    assert not list((tmp_path / "without").glob("*.so"))
    assert "custom_ops_library" not in read_config(tmp_path / "without")["model"]["decoder"]["session_options"]
    expected = greedy(tmp_path / "with", PROMPT, 40)
    assert genai_greedy(tmp_path / "with", PROMPT, 40) == expected
    assert genai_greedy(tmp_path / "without", PROMPT, 40) == expected
    assert greedy(tmp_path / "without", PROMPT, 40, library=False) == expected
    (tmp_path / "with" / "libqbb_ops.so").write_bytes(b"no library")  # where there is one, it is opened
    with pytest.raises(RuntimeError):
        genai.Model(str(tmp_path / "with"))


def test_a_float_folder(tmp_path):
    """For comparison; it has no operator of ours and no library."""
    source, _ = models.tiny_decoder("phi3", tmp_path / "hf")
    assert export(source, "-o", tmp_path / "out", "--recipe", "float") == 0
    assert layers_of(tmp_path / "out") == []
    assert not list((tmp_path / "out").glob("*.so"))
    tokens = genai_greedy(tmp_path / "out", PROMPT, 30)
    assert is_greedy(load_torch(str(source), LoadOptions()).module, PROMPT, tokens)


def test_a_configuration_for_a_gpu(tmp_path):
    """It cannot be run here; the graph is that of float16 on a CPU."""
    source, _ = models.tiny_decoder("qwen2", tmp_path / "hf")
    graphs = []
    for name, options in (("gpu", ("--provider", "cuda")), ("cpu", ("--dtype", "float16"))):
        assert export(source, "-o", tmp_path / name, *SMALL, *options) == 0
        graphs.append((tmp_path / name / "model.onnx").read_bytes())
    assert graphs[0] == graphs[1]
    (provider,) = read_config(tmp_path / "gpu")["model"]["decoder"]["session_options"]["provider_options"]
    assert list(provider) == ["cuda"]


def test_plan(tmp_path, capsys):
    source, _ = models.tiny_decoder("qwen2", tmp_path / "hf")
    assert export(source, "-o", tmp_path / "out", *SMALL, "--plan") == 0
    assert "write the file" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_the_same_record_serves_file_and_folder(tmp_path):
    source, _ = models.tiny_decoder("qwen2", tmp_path / "hf")
    record = tmp_path / "r.qbb"
    assert export(source, "-o", tmp_path / "m.onnx", *SMALL, "--no-verify", "--record", record) == 0
    before = {file.name: file.stat().st_mtime_ns for file in (record / "layers").iterdir()}
    assert export(source, "-o", tmp_path / "out", *SMALL, "--no-verify", "--record", record) == 0
    assert {file.name: file.stat().st_mtime_ns for file in (record / "layers").iterdir()} == before


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("float16", 2)])
def test_a_tied_head_is_stored_once(tmp_path, dtype, size):
    source, _ = models.tiny_decoder("llama", tmp_path / "hf", vocab_size=4000)
    assert export(source, "-o", tmp_path / "out", *SMALL, "--no-verify", "--dtype", dtype) == 0
    data = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.data"))
    assert 4000 * 64 * size <= data < 1.5 * 4000 * 64 * size


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_rotations_take_no_room(tmp_path, dtype):
    """The comparison with PyTorch is part of the export; 131072 positions as float16 alone would be 2 MB a table."""
    source, _ = models.tiny_decoder("llama", tmp_path / "hf", max_position_embeddings=131072)
    assert export(source, "-o", tmp_path / "out", *SMALL, "--dtype", dtype) == 0
    assert sum(file.stat().st_size for file in (tmp_path / "out").glob("model.*")) < 600_000


@pytest.mark.parametrize("bases", [1, 3])  # with an offset and without
@pytest.mark.parametrize("layout", ["tiled", "rows"])
def test_a_tied_head_and_its_embedding_are_one_packed_matrix(tmp_path, bases, layout):
    source, _ = models.tiny_decoder("llama", tmp_path / "hf", vocab_size=3001)
    numbers = ("--head-bases", bases, "--embedding-bases", bases, "--layout", layout)
    for output in ("out", "m.onnx"):
        assert export(source, "-o", tmp_path / output, *SMALL, *numbers) == 0
    # bits, float16 scales for 32 inputs, float32 offsets, in pages of 4 kB; blocks and caches of rotations beside them
    packed = 3008 * 64 * bases / 8 + 3008 * 2 * bases * 2 + (3008 * 2 * 4 if bases == 1 else 0)
    for place in (tmp_path / "out", tmp_path):
        data = sum(file.stat().st_size for file in place.glob("*.data"))
        assert packed <= data < packed + 100_000 < 3001 * 64 * 4
    assert layers_of(tmp_path / "out").count("lm_head.qbb_planes") == 1
    assert genai_greedy(tmp_path / "out", PROMPT, 30) == greedy(tmp_path / "out", PROMPT, 30)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_an_embedding_of_its_own(tmp_path, capsys, dtype):
    """Another number of bases than the head; the verification compares with PyTorch."""
    source, count = models.tiny_decoder("gemma", tmp_path / "hf", tie_word_embeddings=False)
    numbers = ("--head-bases", 4, "--embedding-bases", 3, "--dtype", dtype)
    assert export(source, "-o", tmp_path / "out", *SMALL, *numbers) == 0
    assert f"quantised layers    │ {count + 2}" in capsys.readouterr().out
    names = {value.name for value in read_graph(tmp_path / "out" / "model.onnx").graph.initializers.values()}
    assert {"model.embed_tokens.qbb_planes", "lm_head.qbb_planes"} <= names
    assert not {"model.embed_tokens.weight", "lm_head.weight"} & names


def test_a_recipe_that_sees_the_model(tmp_path):
    """It knows packed projections by the names that PyTorch has for them; embeddings are quantised by their weights."""
    source, count = models.tiny_decoder("phi3", tmp_path / "hf")
    options = ("--recipe", "gptq", "--bases", 2, "--group-size", 32, "--head-bases", 3, "--embedding-bases", 3)
    assert export(source, "-o", tmp_path / "out", *options) == 0
    assert len(quantised(tmp_path / "out.qbb")) == count + 2


def test_heads_that_cannot_be_quantised(tmp_path, capsys):
    source, _ = models.tiny_decoder("llama", tmp_path / "hf")
    for options, message in (
        (("--embedding-bases", 2), "embedding and head are one matrix; expected --head-bases 2, too"),
        (("--embedding-bases", 2, "--head-bases", 3), "expected equal bases"),
        (("--head-bases", 9), "bases"),
    ):
        line = error_of(capsys, [source, "-o", tmp_path / "out", *SMALL, *options], cli.export_main)
        assert message in line


def test_attention_reads_the_fused_projection(tmp_path):
    """No Split in front of the attention, unless queries have a norm of their own."""
    for family, splits in (("qwen2", 2), ("qwen3", 4)):
        source, _ = models.tiny_decoder(family, tmp_path / f"{family}-hf")
        assert export(source, "-o", tmp_path / family, *SMALL, "--no-verify") == 0
        graph = read_graph(tmp_path / family / "model.onnx").graph
        assert sum(node.op_type == "Split" for node in graph) == splits  # 2 of gate and up


def test_evaluation_through_the_cache(tmp_path):
    """Perplexity and KL of whole windows and of a few tokens a run."""
    source, _ = models.tiny_decoder("qwen3", tmp_path / "hf")
    assert export(source, "-o", tmp_path / "out", *SMALL, "--no-verify") == 0
    text = tmp_path / "text.txt"
    text.write_text("a cat sat on the other mat. " * 12)
    whole, chunks = (
        evaluate([tmp_path / "out"], text, reference=source, window=40, chunk=chunk) for chunk in (None, 7)
    )
    assert whole[1].bits_per_weight == chunks[1].bits_per_weight is not None
    assert whole[1].perplexity == pytest.approx(chunks[1].perplexity, rel=1e-3)
    assert whole[1].kl == pytest.approx(chunks[1].kl, abs=1e-3)
    assert whole[1].kl > 0.01


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("run")
    source, _ = models.tiny_decoder("qwen2", place / "hf")
    assert export(source, "-o", place / "out", *SMALL, "--no-verify") == 0
    return place / "out"


def test_run(folder, capsys):
    """Both runtimes write the same; with a seed, the same text each time."""
    texts = {}
    for runtime in ("genai", "ort"):
        arguments = ["run", str(folder), "--prompt", "the cat", "--max-tokens", "20", "--runtime", runtime]
        assert cli.main(arguments) == 0
        out, err = capsys.readouterr()
        texts[runtime] = out
        assert out.startswith("the cat")
        assert "+ " in err
        assert "tokens/s" in err
        sampled = []
        for _ in range(2):
            assert (
                cli.main([*arguments, "--temperature", "1.5", "--seed", "4", "--mode", "int8", "--threads", "1"]) == 0
            )
            sampled.append(capsys.readouterr().out)
        assert sampled[0] == sampled[1]
    assert texts["genai"] == texts["ort"]


def error_of(capsys: pytest.CaptureFixture[str], arguments: list[object], main=cli.main) -> str:
    capsys.readouterr()
    assert main([str(a) for a in arguments]) == 2
    out, err = capsys.readouterr()
    assert not out
    (line,) = (line for line in err.splitlines() if "error" in line.lower() or "Traceback" in line)
    assert line.startswith("error: ")
    return line


def test_damaged_folders(folder, tmp_path, capsys):
    """One line each."""
    cases = {
        "genai_config.json": "half-written",
        "tokenizer.json": "no tokenizer",
        "model.onnx": "half-written",
        "libqbb_ops.so": "half-written",
    }
    for missing, message in cases.items():
        copy = tmp_path / missing
        shutil.copytree(folder, copy)
        (copy / missing).unlink()
        assert message in error_of(capsys, ["run", copy, "--prompt", "x"])
    next((copy / "..").resolve().joinpath("genai_config.json").glob("*.data")).unlink()
    (tmp_path / "tokenizer.json" / "genai_config.json").write_text("{")
    assert "configuration is damaged" in error_of(capsys, ["run", tmp_path / "tokenizer.json", "--prompt", "x"])
    assert "no such folder" in error_of(capsys, ["run", tmp_path / "nothing", "--prompt", "x"])
    text = tmp_path / "text.txt"
    text.write_text("the cat " * 50)
    assert "half-written" in error_of(capsys, ["eval", tmp_path / "genai_config.json", "--text", text])
    assert "no room" in error_of(capsys, ["run", folder, "--prompt", "x" * 500])
    assert "out of range" in error_of(capsys, ["run", folder, "--prompt", "x", "--top-p", "0"])


def test_code_in_a_folder_is_not_run(folder, tmp_path, capsys):
    """onnxruntime-genai loads what the configuration names; without asking, only a copy of the installed library."""
    arguments = ["--prompt", "the cat", "--max-tokens", "9"]
    assert cli.main(["run", str(folder), *arguments]) == 0
    expected = capsys.readouterr().out
    for name in ("library", "option", "provider", "path"):
        copy = tmp_path / name
        shutil.copytree(folder, copy)
        config = read_config(copy)
        options = config["model"]["decoder"]["session_options"]
        if name == "library":
            with (copy / "libqbb_ops.so").open("ab") as file:
                file.write(b"\0")
        elif name == "option":
            options["ep.library"] = "evil.so"
        elif name == "provider":
            options["provider_options"] = [{"QNN": {"backend_path": "evil.so"}}]
        else:
            options["custom_ops_library"] = "../option/libqbb_ops.so"
        (copy / "genai_config.json").write_text(json.dumps(config))
        if name == "path":
            assert "bare file name" in error_of(capsys, ["run", copy, *arguments])
            continue
        assert "would run code from it" in error_of(capsys, ["run", copy, *arguments, "--runtime", "genai"])
        assert cli.main(["run", str(copy), *arguments]) == 0  # in plain ONNX Runtime, with the installed library
        assert capsys.readouterr().out == expected
    assert cli.main(["run", str(tmp_path / "library"), *arguments, "--runtime", "genai", "--trust"]) == 0


def test_damaged_weights_are_found_before_they_run(folder, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (data,) = copy.glob("*.data")
    data.write_bytes(data.read_bytes()[:-1] + b"\x55")
    for runtime in ("genai", "ort"):
        line = error_of(capsys, ["run", copy, "--prompt", "x", "--runtime", runtime])
        assert "weights are damaged" in line


def test_what_cannot_become_a_folder(tmp_path, capsys):
    """One line each, and nothing is left."""
    source, _ = models.tiny_decoder("qwen2", tmp_path / "hf")
    (source / "tokenizer.json").unlink()
    main = cli.export_main
    assert "no tokenizer" in error_of(capsys, [source, "-o", tmp_path / "out", *SMALL], main)
    neox, _ = models.tiny("gpt_neox", tmp_path / "neox")
    models.byte_tokenizer(neox)
    assert "architecture cannot be exported" in error_of(capsys, [neox, "-o", tmp_path / "out", *SMALL], main)
    options = ("--provider", "cuda", "--dtype", "float32")
    assert "no attention" in error_of(capsys, [source, "-o", tmp_path / "out", *SMALL, *options], main)
    assert "are for folders" in error_of(capsys, [source, "-o", tmp_path / "m.onnx", "--portable"], main)
    assert "model of transformers" in error_of(capsys, [tmp_path / "x.onnx", "-o", tmp_path / "out"], main)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").touch()
    models.byte_tokenizer(source)
    assert "something else" in error_of(capsys, [source, "-o", tmp_path / "other", *SMALL, "--force"], main)
    assert "does not exist" in error_of(capsys, [source, "-o", tmp_path / "no" / "out", *SMALL], main)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "neox", "other"]


def test_an_existing_folder_stays_until_the_new_one_is_complete(folder, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(folder, out)
    source = folder.parent / "hf"
    assert "exists already" in error_of(capsys, [source, "-o", out, *SMALL], cli.export_main)
    before = sorted(path.name for path in out.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr("qbb_export.generation.folder.library_info", lambda: (_ for _ in ()).throw(OSError("disk full")))
        assert "disk full" in error_of(capsys, [source, "-o", out, *SMALL, "--force", "--no-verify"], cli.export_main)
    assert sorted(path.name for path in out.iterdir()) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.qbb"]
    (tmp_path / "out.tmp").mkdir()  # of a run that was killed
    assert export(source, "-o", out, *SMALL, "--force", "--no-verify", "--bases", "1") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.qbb"]
    assert len(greedy(out, PROMPT, 12)) == 12


def test_a_layer_that_the_builder_drops_is_missed(tmp_path, capsys, monkeypatch):
    from qbb_export.generation import build

    source, _ = models.tiny_decoder("qwen2", tmp_path / "hf")
    finder = build._finder

    def forgetful(module):
        find = finder(module)
        return lambda tensor: None if (found := find(tensor)) and "1.mlp.up_proj" in found.parameter else found

    monkeypatch.setattr(build, "_finder", forgetful)
    line = error_of(capsys, [source, "-o", tmp_path / "out", *SMALL], cli.export_main)
    assert "model.layers.1.mlp.up_proj.weight: linear layer is not in the graph" in line


def test_real_model(shared, tmp_path):
    """300 tokens of the 28 M llama: onnxruntime-genai, plain ONNX Runtime and PyTorch write the same."""
    source = shared / "models" / "gutenberg-llama-28m"
    assert export(source, "-o", tmp_path / "out", "--recipe", "greedy", "--bases", "3") == 0
    prompt = [893, 327, 259, 1563, 929, 12, 280, 261]  # "It was a dark night, and the"
    tokens = genai_greedy(tmp_path / "out", prompt, 300)
    assert len(tokens) == 300
    assert is_greedy(student(source, tmp_path / "out.qbb"), prompt, tokens)
    assert greedy(tmp_path / "out", prompt, 300) == tokens
