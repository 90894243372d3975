"""What is learnt from: text that does not depend on who writes it, and inputs that fit the model and its tokenizer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from torch import nn  # noqa: E402

from qbb_export.distill import text as texts  # noqa: E402
from qbb_export.distill.settings import TextSettings  # noqa: E402
from qbb_export.distill.text import Vocabulary, make_inputs, read_sequences, write_text  # noqa: E402
from qbb_export.errors import QbbError  # noqa: E402
from qbb_export.load import load_torch  # noqa: E402
from qbb_export.source import LoadOptions  # noqa: E402
from tests.unit.models import tiny_llama  # noqa: E402

SIZE = 97
WORDS = ["a", "b", "c", "d", "e", "f"]


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    model = load_torch(str(tiny_llama(tmp_path_factory.mktemp("llama"))), LoadOptions()).module.float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 8 if parameter.ndim == 2 else 1
    return model


def tokenizer(folder: Path, before: str = "", after: str = "", mask: str | None = None) -> Path:
    """Words, five special tokens in front, and one for which the model has no row."""
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from tokenizers.processors import TemplateProcessing

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", mask or "[OTHER]"]
    made = Tokenizer(WordLevel({word: i for i, word in enumerate([*special, *WORDS, "beyond"])}, unk_token="[UNK]"))
    made.pre_tokenizer = WhitespaceSplit()
    made.add_special_tokens([AddedToken(token, special=True) for token in special])
    if before or after:
        used = [(token, special.index(token)) for token in ("[CLS]", "[SEP]")]
        made.post_processor = TemplateProcessing(single=f"{before} $A {after}".strip(), special_tokens=used)
    made.enable_truncation(4)  # as some files have it; it must not matter
    made.enable_padding(length=9)
    made.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


@pytest.mark.parametrize(
    ("before", "after", "mask", "wanted"),
    [
        ("", "", None, ((), (), None)),
        ("[CLS]", "[SEP]", "[MASK]", ((2,), (3,), 4)),
        ("[CLS] [CLS]", "", "<mask>", ((2, 2), (), 4)),
    ],
)
def test_ids_as_the_tokenizer_tells_them(
    tmp_path: Path, before: str, after: str, mask: str | None, wanted: object
) -> None:
    known = Vocabulary.of(tokenizer(tmp_path, before, after, mask), 5 + len(WORDS))
    assert known.ordinary.tolist() == list(range(5, 5 + len(WORDS)))
    assert (known.before, known.after, known.mask) == wanted


def test_without_a_tokenizer_all_ids_are_ordinary(tmp_path: Path) -> None:
    assert Vocabulary.of(None, 7).ordinary.tolist() == list(range(7))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(QbbError, match="cannot read the tokenizer"):
        Vocabulary.of(tmp_path / "tokenizer.json", 7)


def test_the_text_does_not_depend_on_who_writes_which_part(writer: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, known = TextSettings(sequences=10, length=12), Vocabulary(np.arange(5, SIZE), before=(1, 2))
    each = 2 * 2 * 12 * 64 * 2 // 4 * 4  # keys and values of a sequence: layers, length, width, heads, bytes
    monkeypatch.setattr(texts, "_CACHE_BYTES", 2 * each * 3)
    assert (texts.batch_size(writer, settings), texts.batch_count(writer, settings)) == (3, 4)
    told: list[tuple[int, int]] = []
    state = torch.random.get_rng_state()
    whole = write_text(writer, known, settings, tell=lambda *now: told.append(now))
    assert torch.equal(torch.random.get_rng_state(), state)  # nobody else's random numbers are touched
    assert told == [(3, 10), (6, 10), (9, 10), (10, 10)]
    assert whole.shape == (10, 12) and whole.dtype == np.int64
    parts = [write_text(writer, known, settings, range(rank, 4, 3)) for rank in range(3)]
    assert np.array_equal(parts[2], whole[6:9])
    assert np.array_equal(np.concatenate([parts[0][:3], parts[1], parts[2], parts[0][3:]]), whole)
    assert write_text(writer, known, settings, range(4, 4)).shape == (0, 12)
    assert (whole[:, :2] == [1, 2]).all() and (whole[:, 2] >= 5).all()
    assert whole.min() >= 0 and whole.max() < SIZE and len(np.unique(whole, axis=0)) == 10
    other = write_text(writer, known, TextSettings(sequences=10, length=12, seed=1))
    assert not np.array_equal(other, whole)


def test_first_tokens_are_drawn_evenly_and_the_rest_by_the_model(writer: nn.Module) -> None:
    known = Vocabulary(np.array([7, 50, 90]))
    settings = TextSettings(sequences=300, length=2)
    first, second = write_text(writer, known, settings).T
    counts = np.array([(first == token).sum() for token in known.ordinary])
    assert counts.sum() == 300 and (np.abs(counts - 100) < 5 * np.sqrt(300 * 1 / 3 * 2 / 3)).all()  # 5 sigma
    with torch.no_grad():
        wanted = torch.softmax(writer(input_ids=torch.from_numpy(known.ordinary)[:, None]).logits[:, -1], -1).numpy()
    for token, count, chances in zip(known.ordinary, counts, wanted, strict=True):
        found = np.bincount(second[first == token], minlength=SIZE)
        assert (np.abs(found - count * chances) <= 5 * np.sqrt(count * chances) + 5).all()
        assert (found > 0).sum() > 5  # no top-k, no greedy choice
    cold = write_text(writer, known, TextSettings(sequences=60, length=2, temperature=1e-4))
    best = dict(zip(known.ordinary.tolist(), wanted.argmax(-1).tolist(), strict=True))
    assert all(best[a] == b for a, b in cold.tolist())


def test_no_sequence_is_longer_than_the_model_can_take(writer: nn.Module) -> None:
    assert texts.context_length(writer, 512) == 64 and texts.context_length(writer, 10) == 10
    assert write_text(writer, Vocabulary.of(None, SIZE), TextSettings(sequences=2)).shape == (2, 64)


@pytest.mark.parametrize("context", [64, 20, 5])
@pytest.mark.parametrize("mask", [None, 4])
def test_inputs_made_up_for_an_encoder(context: int, mask: int | None) -> None:
    known = Vocabulary(np.arange(10, 1000), before=(2,), after=(3, 3), mask=mask)
    settings = TextSettings(sequences=64, length=64)
    batches = make_inputs(known, settings, context, 512)
    total = sum(batch.size for batch in batches)
    assert 4096 <= total < 4096 + 512
    lengths = {batch.shape[1] for batch in batches}
    assert max(lengths) <= context and (len(lengths) > 1) == (context > 10)
    inner = []
    for batch in batches:
        assert batch.dtype == np.int64 and batch.size <= 512
        assert (batch[:, 0] == 2).all() and (batch[:, -2:] == 3).all()
        inner.append(batch[:, 1:-2])
    ids = np.concatenate([part.ravel() for part in inner])
    hidden = ids == 4
    assert set(ids[~hidden]) <= set(known.ordinary)
    assert hidden.any() == (mask is not None)
    masked = np.concatenate([(part == 4).any(1) for part in inner])
    assert not masked[[0, 1]].any() and masked.mean() < 0.55  # in half of them at most
    even = np.concatenate([part[::2].ravel() for part in inner])
    frequent = np.concatenate([part[1::2].ravel() for part in inner])
    assert np.median(even[even != 4]) > 400 and np.median(frequent[frequent != 4]) < 300
    again = make_inputs(known, settings, context, 512)
    assert all(np.array_equal(a, b) for a, b in zip(batches, again, strict=True))


def test_a_text_file_in_sequences(tmp_path: Path) -> None:
    words = tokenizer(tmp_path, "[CLS]", "[SEP]")
    file = tmp_path / "text.txt"
    file.write_text("a b c d e f a b " * 3)
    found = read_sequences(file, words, 10)  # neither special tokens nor the file's truncation and padding
    assert found.tolist() == [[5 + i % 8 % 6 for i in range(10)], [5 + i % 8 % 6 for i in range(10, 20)]]
    for name, size, message in (("text.txt", 25, ">= 25 tokens; got 24"), ("none.txt", 4, "cannot read the text")):
        with pytest.raises(QbbError, match=message):
            read_sequences(tmp_path / name, words, size)
    with pytest.raises(QbbError, match=r"no tokenizer\.json"):
        read_sequences(file, None, 4)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(QbbError, match="expected a UTF-8 file"):
        read_sequences(file, words, 4)
