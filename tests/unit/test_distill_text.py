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
from qbb_export.distill.text import Vocabulary, read_sequences, write_text  # noqa: E402
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


@pytest.mark.parametrize(
    ("kind", "words", "others"),
    [
        ("WordPiece", ["the", "##ing", "Straße"], ["[unused1]", "a", "##s", "##,", "1997"]),
        ("byte-level BPE", ["the", "Ġthe", "ing"], ["Ġ", "a", "Ġa", "Ġ,", "Ġ19", "Ã"]),
        ("SentencePiece", ["▁the", "ing", "▁слово"], ["▁", "▁a", "▁,", "▁19"]),
    ],
)
def test_words_in_the_vocabularies_of_several_tokenizers(
    tmp_path: Path, kind: str, words: list[str], others: list[str]
) -> None:
    from tokenizers import Tokenizer, decoders, models

    vocabulary = {piece: i for i, piece in enumerate(["[UNK]", *others, *words, *(f"x{c}x" for c in "abcdef")])}
    made = {
        "WordPiece": lambda: Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]")),
        "byte-level BPE": lambda: Tokenizer(models.BPE(vocabulary, [])),
        "SentencePiece": lambda: Tokenizer(models.Unigram([(piece, -1.0) for piece in vocabulary], 0)),
    }[kind]()
    made.decoder = {
        "WordPiece": decoders.WordPiece(),
        "byte-level BPE": decoders.ByteLevel(),
        "SentencePiece": decoders.Metaspace(),
    }[kind]
    made.add_special_tokens(["[UNK]"])
    made.save(str(tmp_path / "tokenizer.json"))
    known = Vocabulary.of(tmp_path / "tokenizer.json", len(vocabulary))
    assert known.ordinary.tolist() == list(range(1, len(vocabulary)))
    assert known.words.tolist() == list(range(1 + len(others), len(vocabulary)))


def test_where_few_pieces_are_words_all_ids_are_taken(tmp_path: Path) -> None:
    known = Vocabulary.of(tokenizer(tmp_path), 5 + len(WORDS))  # single letters
    assert np.array_equal(known.words, known.ordinary)


def test_without_a_tokenizer_all_ids_are_ordinary(tmp_path: Path) -> None:
    known = Vocabulary.of(None, 7)
    assert known.ordinary.tolist() == known.words.tolist() == list(range(7))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(QbbError, match="cannot read the tokenizer"):
        Vocabulary.of(tmp_path / "tokenizer.json", 7)


def test_the_text_does_not_depend_on_who_writes_which_part(writer: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, known = TextSettings(sequences=10, length=12), Vocabulary(*2 * [np.arange(5, SIZE)], before=(1, 2))
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
    known = Vocabulary(*2 * [np.array([7, 50, 90])])
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
