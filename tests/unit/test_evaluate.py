"""Perplexity against the formula, on a bigram model that is one Gather."""

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from qbb_export.errors import QbbError
from qbb_export.evaluate import perplexity

WORDS = 11
RNG = np.random.default_rng(8)
TABLE = RNG.standard_normal((WORDS, WORDS)).astype(np.float32)


@pytest.fixture
def bigrams(tmp_path: Path) -> Path:
    text = f"""<ir_version: 8, opset_import: ["": 17]>
      g (int64[batch, sequence] input_ids) => (float[batch, sequence, {WORDS}] logits) {{
        logits = Gather (table, input_ids)
      }}"""
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(TABLE, "table"))
    onnx.save(proto, tmp_path / "m.onnx")
    tokenizer = Tokenizer(WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "m.onnx"


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
    with pytest.raises(QbbError, match="not a language model; expected input_ids and logits"):
        perplexity(bigrams, text, window=4)
