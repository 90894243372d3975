"""Figures of `qbb eval` against their formulas, on models that are one Gather."""

import json
import math
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

from qbb_export import cli
from qbb_export.errors import QbbError
from qbb_export.evaluate import EncoderResult, LanguageResult, evaluate, perplexity
from qbb_export.evaluate.sizes import bits_per_weight, file_bytes
from qbb_export.format import Spec
from qbb_export.format import bits_per_weight as bits_of

WORDS = 11
RNG = np.random.default_rng(8)
TABLE = RNG.standard_normal((WORDS, WORDS)).astype(np.float32)


def save_model(path: Path, graph: str, opset: int = 17, **weights: np.ndarray) -> Path:
    """A model from ONNX text; ``w`` in the text is the initializer w."""
    domains = f'"": {opset}, "com.microsoft": 1'
    proto = onnx.parser.parse_model(f"<ir_version: 8, opset_import: [{domains}]> {graph}")
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in weights.items())
    onnx.save(proto, path)
    return path


def bigram_model(path: Path, table: np.ndarray) -> Path:
    """The next token depends on the last one only: logits = table[ids]."""
    text = f"""g (int64[batch, sequence] input_ids) => (float[batch, sequence, {table.shape[1]}] logits) {{
        logits = Gather (table, input_ids) }}"""
    return save_model(path, text, table=table)


def save_tokenizer(path: Path, shift: int = 0) -> Path:
    """Words w0 … w10, and special tokens that only encoders get."""
    words = {f"w{i}": (i + shift) % WORDS for i in range(WORDS)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="w9 $A w10", special_tokens=[("w9", 9), ("w10", 10)])
    tokenizer.enable_truncation(5)  # what a file asks for, and an evaluation must not do
    tokenizer.enable_padding(length=7)
    tokenizer.save(str(path))
    return path


@pytest.fixture
def bigrams(tmp_path: Path) -> Path:
    save_tokenizer(tmp_path / "tokenizer.json")
    return bigram_model(tmp_path / "m.onnx", TABLE)


def write_text(folder: Path, count: int) -> tuple[Path, np.ndarray]:
    ids = RNG.integers(0, WORDS, count)
    path = folder / "text.txt"
    path.write_text(" ".join(f"w{i}" for i in ids), encoding="utf-8")
    return path, ids


def test_the_formula(bigrams: Path, tmp_path: Path) -> None:
    text, ids = write_text(tmp_path, 67)
    seen: list[tuple[int, int]] = []
    result = perplexity(bigrams, text, window=16, on_window=lambda *step: seen.append(step))
    windows = ids[:64].reshape(4, 16)  # 3 tokens are left over
    logits = TABLE.astype(np.float64)[windows[:, :-1]]
    log_probability = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    picked = np.take_along_axis(log_probability, windows[:, 1:, None], -1)
    assert (result.windows, result.tokens) == (4, 60)
    # float32 logits below 4 in size: each term is off by less than 1e-6
    assert result.nll == pytest.approx(-picked.mean(), abs=1e-6)
    assert result.perplexity == pytest.approx(np.exp(-picked.mean()), rel=1e-6)
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert perplexity(bigrams, text, window=16, max_windows=2).windows == 2


def test_bad_input(bigrams: Path, tmp_path: Path) -> None:
    text, _ = write_text(tmp_path, 20)
    with pytest.raises(QbbError, match="text is shorter than a window; expected >= 21 tokens; got 20"):
        perplexity(bigrams, text, window=21)
    with pytest.raises(QbbError, match="no tokenizer"):
        perplexity(bigrams, text, window=4, tokenizer=tmp_path / "gone.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(QbbError, match="cannot read the tokenizer"):
        perplexity(bigrams, text, window=4, tokenizer=tmp_path / "bad.json")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(QbbError, match="cannot read the text; expected a UTF-8 file"):
        perplexity(bigrams, tmp_path / "latin.txt", window=4)
    with pytest.raises(QbbError, match="no such file"):
        perplexity(tmp_path / "gone.onnx", text, window=4)
    proto = onnx.load(bigrams)
    proto.graph.output[0].name = proto.graph.node[0].output[0] = "scores"
    onnx.save(proto, bigrams)
    with pytest.raises(QbbError, match="not a language model, and encoders are compared with a reference"):
        perplexity(bigrams, text, window=4)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_against_a_reference(bigrams: Path, tmp_path: Path) -> None:
    text, ids = write_text(tmp_path, 67)
    tables = [TABLE, TABLE + 0.5 * RNG.standard_normal(TABLE.shape).astype(np.float32)]
    other = bigram_model(tmp_path / "other.onnx", tables[1])
    seen: list[tuple[int, int]] = []
    results = evaluate([other, bigrams], text, reference=bigrams, window=16, on_step=lambda *step: seen.append(step))
    context, following = ids[:64].reshape(4, 16)[:, :-1], ids[:64].reshape(4, 16)[:, 1:]
    p, q = (log_softmax(table)[context] for table in tables)
    kl = (np.exp(p) * (p - q)).sum(-1)
    difference = (np.take_along_axis(p - q, following[..., None], -1)).mean((1, 2))
    reference, changed, same = results
    assert all(isinstance(result, LanguageResult) for result in results)
    assert [result.model for result in results] == [str(bigrams), str(other), str(bigrams)]
    # float64 on the same float32 logits: what is left is the order of at most 60 · 11 additions
    assert changed.kl == pytest.approx(kl.mean(), abs=1e-12)
    assert changed.agreement == pytest.approx((p.argmax(-1) == q.argmax(-1)).mean(), abs=1e-12)
    assert changed.perplexity_ratio == pytest.approx(np.exp(difference.mean()), abs=1e-12)
    assert changed.perplexity == pytest.approx(reference.perplexity * changed.perplexity_ratio, rel=1e-12)
    for got, values in ((changed.kl_ci, kl.mean(1)), (np.log(changed.perplexity_ratio_ci), difference)):
        half = 3.18244630528371 * values.std(ddof=1) / 2  # t for 3 degrees of freedom, √4 windows
        expected = max(values.mean() - half, 0) if values is not difference else values.mean() - half
        assert got == pytest.approx((expected, values.mean() + half), abs=1e-9)
    for result in (reference, same):
        assert (result.kl, result.kl_ci, result.agreement) == (0, (0, 0), 1)
        assert (result.perplexity_ratio, result.perplexity_ratio_ci) == (1, (1, 1))
    assert seen == [(step, 12) for step in range(1, 13)]


def test_one_window_has_no_interval(bigrams: Path, tmp_path: Path) -> None:
    text, _ = write_text(tmp_path, 20)
    (_, result) = evaluate([bigrams], text, reference=bigrams, window=16)
    assert (result.perplexity_ci, result.kl_ci, result.perplexity_ratio_ci) == (None, None, None)


def test_command_line(bigrams: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, _ = write_text(tmp_path, 67)
    other = bigram_model(tmp_path / "other.onnx", TABLE / 2)
    command = ["eval", str(other), "--reference", str(bigrams), "--text", str(text), "--window", "16"]
    assert cli.main([*command, "--windows", "3", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["text"], printed["window"], printed["reference"]) == (str(text), 16, str(bigrams))
    assert [model["model"] for model in printed["models"]] == [str(bigrams), str(other)]
    for model in printed["models"]:
        assert (model["windows"], model["tokens"]) == (3, 45)
        assert math.exp(model["nll"]) == pytest.approx(model["perplexity"])
        assert model["perplexity_ci"][0] < model["perplexity"] < model["perplexity_ci"][1]
    assert cli.main(command) == 0
    table = capsys.readouterr().out
    for word in ("m.onnx", "other.onnx", "perplexity", "KL", "60 tokens in 4 windows of 16"):
        assert word in table
    assert max(map(len, table.splitlines())) <= 80
    assert cli.main(["eval", str(bigrams), "--text", str(text), "--window", "16"]) == 0
    assert "KL" not in capsys.readouterr().out


def encoder(path: Path, table: np.ndarray, pooled: bool = False) -> Path:
    """last_hidden_state = table[ids], or its mean over tokens; an integer output comes first."""
    d = table.shape[1]
    shape, node = ("batch, sequence, d", "y = Identity (h)")
    if pooled:
        shape, node = (f"batch, {d}", "y = ReduceMean <axes = [1], keepdims = 0> (h)")
    text = f"""g (int64[batch, sequence] input_ids, int64[batch, sequence] attention_mask,
        int64[batch, sequence] token_type_ids) => (int64[batch, sequence] echo, float[{shape}] y) {{
        echo = Identity (input_ids) h = Gather (table, input_ids) {node} }}"""
    return save_model(path, text, table=table)


def test_encoders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tokenizer(tmp_path / "tokenizer.json")
    tables = [RNG.standard_normal((WORDS, 6)).astype(np.float32) for _ in range(2)]
    reference, other = (encoder(tmp_path / f"{i}.onnx", table) for i, table in enumerate(tables))
    pooled = encoder(tmp_path / "pooled.onnx", tables[1], pooled=True)
    text = tmp_path / "sentences.txt"
    text.write_text("w1 w2 w3\n\n  \nw4\n w5 w6 w7 w8 w1 w2 w3 w4 w5\n", encoding="utf-8")
    kept = [[9, 1, 2, 3, 10], [9, 4, 10], [9, 5, 6, 7, 8, 1, 2, 10]]  # special tokens, cut to 8
    results = evaluate([other, pooled], text, reference=reference, window=8)
    cosines = []
    for ids in kept:
        a, b = (table.astype(np.float64)[ids].mean(0) for table in tables)
        cosines.append(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    assert all(isinstance(result, EncoderResult) for result in results)
    assert results[0].cosine == pytest.approx(1, abs=1e-15)
    assert results[1].cosine == pytest.approx(np.mean(cosines), abs=1e-14)
    # the graph takes the mean in float32: 8 additions of numbers below 4
    assert results[2].cosine == pytest.approx(np.mean(cosines), abs=8 * 4 * 2**-23)
    assert results[1].worst_cosine == pytest.approx(min(cosines), abs=1e-14)
    assert results[1].worst_sentence == ["w1 w2 w3", "w4", "w5 w6 w7 w8 w1 w2 w3 w4 w5"][int(np.argmin(cosines))]
    assert results[1].sentences == 3
    assert evaluate([other], text, reference=reference, window=8, max_windows=2)[1].sentences == 2
    command = ["eval", str(other), "--reference", str(reference), "--text", str(text), "--window", "8"]
    assert cli.main(command) == 0
    table = capsys.readouterr().out
    assert results[1].worst_sentence.split()[0] in table
    assert f"{results[1].worst_cosine:.5f}" in table


def test_a_decoder_with_a_cache_starts_with_an_empty_one(tmp_path: Path) -> None:
    """Logits would grow with the length of the cache, and with positions that do not start at 0."""
    save_tokenizer(tmp_path / "tokenizer.json")
    text = f"""g (int64[batch, sequence] input_ids, int32[batch, sequence] position_ids,
        float16[batch, 2, past, 4] cache) => (float[batch, sequence, {WORDS}] logits) {{
        two = Constant <value = int64[1] {{2}}> ()
        dims = Shape (cache) length = Gather (dims, two)
        first = ReduceMin <keepdims = 0> (position_ids) start = Cast <to = 7> (first)
        one = Constant <value = int64[1] {{1}}> () more = Add (length, start) factor = Add (more, one)
        scale = Cast <to = 1> (factor) plain = Gather (table, input_ids) logits = Mul (plain, scale) }}"""
    model = save_model(tmp_path / "cache.onnx", text, table=TABLE)
    proto = onnx.load(model)
    proto.graph.input[2].name = "past_key_values.0.key"  # ONNX text has no names with dots
    next(node for node in proto.graph.node if node.op_type == "Shape").input[0] = "past_key_values.0.key"
    onnx.save(proto, model)
    words, _ = write_text(tmp_path, 40)
    plain = bigram_model(tmp_path / "m.onnx", TABLE)
    assert perplexity(model, words, window=8).nll == perplexity(plain, words, window=8).nll


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["m.onnx", "gone.onnx"], "gone.onnx: no such file"),
        (["m.onnx", "--reference", "wide.onnx"], "m.onnx: vocabularies differ in size; expected 12 tokens as the"),
        (["encoder.onnx", "--reference", "m.onnx"], "encoder.onnx: models of different kinds; expected a language"),
        (["m.onnx", "encoder.onnx"], "encoder.onnx: models of different kinds; expected a language model (logits)"),
        (["encoder.onnx"], "encoders are compared with a reference; expected an output logits, or --reference"),
        (["m.onnx", "--window", "41"], "text is shorter than a window; expected >= 41 tokens; got 40"),
        (["m.onnx", "--window", "1"], "--window: window is too short; expected >= 2; got 1"),
        (["m.onnx", "--windows", "0"], "--windows: too few windows; expected >= 1; got 0"),
        (["m.onnx", "--text", "gone.txt"], "gone.txt: cannot read the text"),
        (["m.onnx", "--tokenizer", "gone"], "--tokenizer: no tokenizer; expected a tokenizer.json; got gone"),
        (["lone/m.onnx"], "lone/m.onnx: no tokenizer; expected a tokenizer.json"),
        (["m.onnx", "other.onnx"], "tokenizer.json: models read the text as different tokens"),
        (["nan.onnx"], "nan.onnx: logits hold NaN or Inf; got nan nats per token, KL 0.0, in window 1"),
        (["small.onnx"], "small.onnx: tokenizer and model do not fit; expected tokens below 10; got token 10"),
        (["classes.onnx"], "classes.onnx: not a language model; expected logits [1, 8, vocabulary]; got [1, 11]"),
        (["pixels.onnx"], "pixels.onnx: not a model of text; expected an input input_ids; got ['pixels']"),
        (["extra.onnx"], "extra.onnx: cannot feed an input of the model"),
        (["weights.pt"], "weights.pt: cannot be evaluated; expected an .onnx file, or a Hugging Face folder"),
        (["encoder.onnx", "--reference", "encoder.onnx", "--text", "empty.txt"], "empty.txt: no sentences"),
    ],
)
def test_bad_input_is_one_line(
    bigrams: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(" ".join(f"w{i % WORDS}" for i in range(40)), encoding="utf-8")
    (tmp_path / "empty.txt").write_text("\n \n", encoding="utf-8")
    (tmp_path / "weights.pt").write_bytes(b"x")
    (tmp_path / "lone").mkdir()
    bigram_model(tmp_path / "lone" / "m.onnx", TABLE)
    bigram_model(tmp_path / "wide.onnx", np.zeros((WORDS, WORDS + 1), np.float32))
    bigram_model(tmp_path / "small.onnx", np.zeros((WORDS, 10), np.float32))
    bigram_model(tmp_path / "nan.onnx", np.full((WORDS, WORDS), np.nan, np.float32))
    bigram_model(tmp_path / "other.onnx", TABLE)
    save_tokenizer(tmp_path / "other.tokenizer.json", shift=1)
    encoder(tmp_path / "encoder.onnx", TABLE)
    for name, graph in {
        "classes": "(int64[b, s] input_ids) => (float[b, 11] logits) { h = Gather (table, input_ids)"
        " logits = ReduceMean <axes = [1], keepdims = 0> (h) }",
        "pixels": "(float[b, 3] pixels) => (float[b, 3] logits) { logits = Identity (pixels) }",
        "extra": "(int64[b, s] input_ids, bool[b] use_cache) => (float[b, s, 11] logits)"
        " { logits = Gather (table, input_ids) }",
    }.items():
        save_model(tmp_path / f"{name}.onnx", f"g {graph}", table=TABLE)
    text = [] if "--text" in arguments else ["--text", "text.txt"]
    window = [] if "--window" in arguments else ["--window", "8"]
    assert cli.main(["eval", *arguments, *text, *window]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]


def test_size_of_our_files(tmp_path: Path) -> None:
    text = "g (float[b, 2000] x) => (float[b, 40] y) { h = MatMul (x, w) r = Relu (h) y = MatMul (r, v) }"
    weights = {"w": (2000, 33), "v": (33, 40)}  # the first is large enough for a data file
    arrays = {name: RNG.standard_normal(shape).astype(np.float32) for name, shape in weights.items()}
    source = save_model(tmp_path / "in.onnx", text, **arrays)
    out = tmp_path / "out.onnx"
    settings = ("--include", "*", "--bases", "3", "--group-size", "64", "--no-verify")
    assert cli.export_main([str(source), "-o", str(out), *settings]) == 0
    specs = Spec(2000, 33, 3, 64), Spec(33, 40, 3, 33)  # a group of 64 is longer than the row of 33
    bits = sum(bits_of(spec, offset=True) * spec.K * spec.N for spec in specs)
    assert bits_per_weight(out) == pytest.approx(bits / (2000 * 33 + 33 * 40), rel=1e-15)
    (data,) = tmp_path.glob("out.*.data")
    assert file_bytes(out) == out.stat().st_size + data.stat().st_size
    assert bits_per_weight(source) is None
    assert file_bytes(tmp_path / "no-such-hub/id") is None


def test_size_of_matmulnbits(tmp_path: Path) -> None:
    """4 bits, a float32 scale and a 4-bit zero point for every 128; the matrix that two nodes share counts once."""
    text = """g (float[b, 256] x) => (float[b, 256] y) {
        h = com.microsoft.MatMulNBits <K = 256, N = 256, bits = 4, block_size = 128> (x, q, s, z)
        y = com.microsoft.MatMulNBits <K = 256, N = 256, bits = 4, block_size = 128> (h, q, s, z) }"""
    parts = {
        "q": np.zeros((256, 2, 64), np.uint8),
        "s": np.ones((256, 2), np.float32),
        "z": np.zeros((256, 1), np.uint8),
    }
    assert bits_per_weight(save_model(tmp_path / "n.onnx", text, **parts)) == 4 + 32 / 128 + 4 / 128
