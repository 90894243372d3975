"""Inputs made up for an encoder: they fit the model, and each has a topic."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from qbb_export.distill.inputs import make_inputs, nearest_words  # noqa: E402
from qbb_export.distill.run import Work, learning_text  # noqa: E402
from qbb_export.distill.settings import ModelRecipe, TextSettings  # noqa: E402
from qbb_export.distill.text import Vocabulary  # noqa: E402
from qbb_export.load import load_torch  # noqa: E402
from qbb_export.record import Record  # noqa: E402
from qbb_export.source import LoadOptions  # noqa: E402
from tests.unit.models import tiny  # noqa: E402

# Ids 10 to 199 are junk; 200 to 1799 are words in 16 clusters of 100, a word's cluster being its id modulo 16.
IDS, WORDS, CLUSTERS = 1800, np.arange(200, 1800), 16


def table() -> torch.Tensor:
    """Embeddings: clusters far apart, all of them far from zero."""
    rng = np.random.default_rng(0)
    centres = 5 * rng.normal(size=(CLUSTERS, 32))
    return torch.from_numpy(100 + centres[np.arange(IDS) % CLUSTERS] + rng.normal(size=(IDS, 32))).float()


def made(context: int, mask: int | None, sequences: int = 256) -> list[np.ndarray]:
    known = Vocabulary(np.arange(10, IDS), WORDS, before=(2,), after=(3, 3), mask=mask)
    return make_inputs(known, table(), TextSettings(sequences=sequences, length=64), context, 1024)


@pytest.mark.parametrize("context", [70, 20, 5])
@pytest.mark.parametrize("mask", [None, 4])
def test_they_fit_model_and_tokenizer(context: int, mask: int | None) -> None:
    batches = made(context, mask)
    assert 256 * 64 <= sum(batch.size for batch in batches) < 256 * 64 + 1024
    lengths = {batch.shape[1] for batch in batches}
    assert max(lengths) <= context and (len(lengths) > 1) == (context > 10)
    inner = []
    for batch in batches:
        assert batch.dtype == np.int64 and batch.size <= 1024
        assert (batch[:, 0] == 2).all() and (batch[:, -2:] == 3).all()
        inner.append(batch[:, 1:-2])
    ids = np.concatenate([part.ravel() for part in inner])
    assert set(ids) <= {*range(10, IDS), mask}
    masked = np.concatenate([(part == 4).any(1) for part in inner])
    assert masked.any() == (mask is not None) and masked.mean() <= 0.25
    again = made(context, mask)
    assert all(np.array_equal(a, b) for a, b in zip(batches, again, strict=True))


def test_they_are_words_of_one_topic_frequent_words_and_a_few_others() -> None:
    inner = [batch[:, 1:-2] for batch in made(70, None, 2048)]
    ids = np.concatenate([part.ravel() for part in inner])
    n = len(ids)
    # A tenth is drawn from all pieces, 190 of 1790 of which are no words. 5 sigma, as below.
    share = 0.1 * 190 / 1790
    assert abs((ids < 200).mean() - share) < 5 * np.sqrt(share / n)
    # The first ten words: 45 % of the tokens follow Zipf's law; the others seldom hit so few.
    zipf = 1 / (np.arange(len(WORDS)) + 2.7)
    first = 0.45 * zipf[:10].sum() / zipf.sum()
    found = np.isin(ids, WORDS[:10]).mean()
    assert first - 5 * np.sqrt(first / n) < found < first + 0.02
    # Words of the topic come from one cluster. Of the rest a sixteenth falls there, more where frequent words do.
    long = np.concatenate([part for part in inner if part.shape[1] == 64])
    most = np.array([np.bincount(row % CLUSTERS, minlength=CLUSTERS).max() for row in long]) / 64
    assert 0.45 < most.mean() < 0.6
    assert len({np.bincount(row % CLUSTERS).argmax() for row in long}) == CLUSTERS


def test_words_nearest_to_a_word() -> None:
    found = nearest_words(table(), WORDS, np.array([5, 700, 3]))
    assert found.shape == (3, 64) and found[:, 0].tolist() == [205, 900, 203]
    assert (found % CLUSTERS == found[:, :1] % CLUSTERS).all()
    assert all(len(set(row)) == 64 and set(row) <= set(WORDS) for row in found)
    few = nearest_words(table(), np.arange(10, 15), np.arange(5))
    assert few.shape == (5, 5) and few[:, 0].tolist() == list(range(10, 15))


@pytest.mark.parametrize("head", [False, True])
def test_only_a_model_that_predicts_tokens_sees_masks(tmp_path: Path, head: bool) -> None:
    loaded = load_torch(str(tiny("bert", tmp_path / "hf")[0]), LoadOptions())
    if head:
        loaded = replace(loaded, module=transformers.BertForMaskedLM(loaded.module.config))
    recipe = ModelRecipe(text=TextSettings(sequences=64, length=32, validation=8))
    with Record.open(tmp_path / "m.qbb", recipe="best") as record:
        work = Work(loaded, [], recipe, record, "cpu", lambda *_: None)
        ordinary = np.arange(10, 40)
        work.vocabulary = Vocabulary(ordinary, ordinary, mask=4)
        learn, validation = learning_text(work)
    assert any((batch == 4).any() for batch in [*learn, *validation]) == head
