"""Inputs for an encoder, which cannot write any: made up from its tokenizer and its table of token embeddings."""

from __future__ import annotations

from typing import Final

import numpy as np
import torch

from qbb_export.distill.settings import TextSettings
from qbb_export.distill.text import Tokens, Vocabulary

# Sentences are short: tokens between the special ones.
LENGTHS: Final = (6, 10, 16, 24, 40, 64)
# Kinds of tokens, the rest being frequent words: near the sequence's topic; any.
_TOPICAL, _ANY = 0.45, 0.1
_MASKED = 0.15
# Topics, and the tokens that each of them has.
_TOPICS, _NEAREST = 4096, 64
_ROWS = 256  # topics looked for at once


def make_inputs(
    vocabulary: Vocabulary, embeddings: torch.Tensor, settings: TextSettings, context: int, tokens: int
) -> list[Tokens]:
    """Sequences of random words with something in common, as batches of equal length.

    An encoder tells texts apart by what they are about. Words drawn without regard to each other are about nothing:
    the outputs for all such sequences are much alike, and little is learnt from them. So each sequence has a topic, a
    random word. About half of its tokens are among the words nearest to it in the table of embeddings, where words that
    occur together lie together; nearly as many are frequent words, drawn by Zipf's law over the order of their ids,
    because vocabularies list frequent pieces first; the rest may be any piece. In a quarter of the sequences some
    tokens are replaced by the mask token, where there is one: leave it out for a model that no longer predicts tokens.

    Args:
        vocabulary: ids to draw from.
        embeddings: ``[ids, d]``, the model's input embeddings.
        settings: as many tokens in all as it asks for.
        context: longest input of the model.
        tokens: of a batch, about.

    Returns:
        int64 arrays ``[sequences, length]``, lengths varying from batch to batch.
    """
    rng = np.random.default_rng(settings.seed)
    words = vocabulary.words
    zipf = 1.0 / (np.arange(len(words)) + 2.7)  # Mandelbrot's shift
    zipf /= zipf.sum()
    topics = nearest_words(embeddings, words, rng.choice(len(words), size=min(_TOPICS, len(words)), replace=False))
    around = len(vocabulary.before) + len(vocabulary.after)
    lengths = [n for n in LENGTHS if n + around <= context] or [max(1, context - around)]
    batches, left = [], settings.sequences * settings.length
    while left > 0:
        length = int(rng.choice(lengths))
        count = max(1, min(left, tokens) // (length + around))
        shape, row = (count, length), np.arange(count)[:, None]
        topic = rng.integers(len(topics), size=(count, 1))
        kind = rng.random(shape)
        ids = rng.choice(words, size=shape, p=zipf)
        ids = np.where(kind < _TOPICAL, topics[topic, rng.integers(topics.shape[1], size=shape)], ids)
        ids = np.where(kind >= 1.0 - _ANY, rng.choice(vocabulary.ordinary, size=shape), ids)
        if vocabulary.mask is not None:
            ids = np.where((rng.random(shape) < _MASKED) & (row % 4 == 3), vocabulary.mask, ids)
        before = np.tile(np.asarray(vocabulary.before, dtype=np.int64), (count, 1))
        after = np.tile(np.asarray(vocabulary.after, dtype=np.int64), (count, 1))
        batches.append(np.concatenate([before, ids, after], axis=1).astype(np.int64))
        left -= batches[-1].size
    return batches


def nearest_words(embeddings: torch.Tensor, words: Tokens, chosen: Tokens) -> Tokens:
    """For each chosen word those nearest to it by the angle of their embeddings, itself first.

    Args:
        embeddings: ``[ids, d]``.
        words: ids to look among.
        chosen: places in ``words``.

    Returns:
        int64 ``[chosen, 64]`` ids, fewer columns if there are fewer words.
    """
    table = embeddings.detach()[torch.from_numpy(words).to(embeddings.device)].float().cpu()
    table = torch.nn.functional.normalize(table - table.mean(0), dim=-1)  # what they all share says nothing
    found = [
        (table[torch.from_numpy(part)] @ table.T).topk(min(_NEAREST, len(words)), dim=-1).indices.numpy()
        for part in np.split(chosen, range(_ROWS, len(chosen), _ROWS))
    ]
    return np.asarray(words[np.concatenate(found)])
