"""What the copy learns from: text that a decoder writes itself (for encoders see ``inputs``). No data from outside.

Every batch has its own seed, so the text is the same whichever process makes which part of it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from qbb_export.distill.objective import text_config
from qbb_export.distill.settings import TextSettings
from qbb_export.errors import QbbError
from qbb_export.tokens import open_tokenizer, read_text, token_ids

Tokens = npt.NDArray[np.int64]
Progress = Callable[[int, int], None]

# Bytes that the keys and values of one batch may take while it is written on a CPU; half the memory of a GPU.
_CACHE_BYTES = 1 << 30
_DEFAULT_CONTEXT = 1024


@dataclass(frozen=True)
class Vocabulary:
    """What the tokenizer says about ids.

    Args:
        ordinary: ids that stand for text, in the order of their numbers.
        words: those that are two letters or more, as most words and parts of words are: no punctuation, no numbers, no
            ``[unused7]``. All of them where fewer than half are (Chinese characters, say).
        before: special tokens in front of a text.
        after: special tokens behind it.
        mask: the id that stands for a hidden token, or None.
    """

    ordinary: Tokens
    words: Tokens
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    mask: int | None = None

    @staticmethod
    def of(tokenizer: Path | None, size: int) -> Vocabulary:
        """From a tokenizer.json; without one, all ids below ``size`` are ordinary."""
        if tokenizer is None:
            return Vocabulary(np.arange(size), np.arange(size))
        encoder = open_tokenizer(tokenizer)
        added = json.loads(encoder.to_str()).get("added_tokens", [])
        special = {item["id"] for item in added if item.get("special")}
        found = sorted(i for i in encoder.get_vocab(with_added_tokens=True).values() if i < size and i not in special)
        known = found or list(range(size))
        pieces = [piece.strip().removeprefix("##") for piece in encoder.decode_batch([[i] for i in known])]
        words = [i for i, piece in zip(known, pieces, strict=True) if len(piece) > 1 and piece.isalpha()]
        template = encoder.encode("a")
        inside = [i for i, mark in enumerate(template.special_tokens_mask) if not mark] or [len(template.ids)]
        return Vocabulary(
            np.asarray(known, dtype=np.int64),
            np.asarray(words if 2 * len(words) >= len(known) else known, dtype=np.int64),
            tuple(template.ids[: inside[0]]),
            tuple(template.ids[inside[-1] + 1 :]),
            next((i for i in map(encoder.token_to_id, ("[MASK]", "<mask>")) if i is not None), None),
        )


def context_length(model: nn.Module, wanted: int) -> int:
    """``wanted`` tokens, or as many as the model can take."""
    config = text_config(model)
    for name in ("max_position_embeddings", "n_positions", "n_ctx", "seq_length", "max_seq_len"):
        limit = getattr(config, name, None)
        if isinstance(limit, int) and limit > 1:
            return min(wanted, limit)
    return min(wanted, _DEFAULT_CONTEXT)


def write_text(
    model: nn.Module,
    vocabulary: Vocabulary,
    settings: TextSettings,
    batches: range | None = None,
    tell: Progress | None = None,
) -> Tokens:
    """Let a decoder write: a random first token, then sampling from its own distribution, with a KV cache.

    Args:
        model: a transformers decoder, on its device.
        vocabulary: first tokens are drawn from its ordinary ones.
        settings: how much.
        batches: only these of the ``batch_count`` batches (to share the work).
        tell: called with (sequences done, in all).

    Returns:
        int64 ``[sequences, length]``. End-of-text tokens do not end a sequence: as in training, a new text follows.
    """
    length, per_batch = context_length(model, settings.length), batch_size(model, settings)
    device = next(model.parameters()).device
    texts = []
    chosen = batches if batches is not None else range(batch_count(model, settings))
    total = sum(min(per_batch, settings.sequences - b * per_batch) for b in chosen)
    done = 0
    for batch in chosen:
        count = min(per_batch, settings.sequences - batch * per_batch)
        rng = np.random.default_rng([settings.seed, batch])
        first = rng.choice(vocabulary.ordinary, size=(count, 1))
        start = np.concatenate([np.tile(np.asarray(vocabulary.before, dtype=np.int64), (count, 1)), first], axis=1)
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices), precision(device), torch.no_grad():
            torch.manual_seed(int(rng.integers(1 << 62)))
            written = model.generate(  # type: ignore[operator]
                input_ids=torch.from_numpy(start).to(device),
                attention_mask=torch.ones(start.shape, dtype=torch.long, device=device),
                min_new_tokens=None,
                max_new_tokens=length - start.shape[1],
                do_sample=True,
                temperature=settings.temperature,
                top_k=0,
                top_p=1.0,
                use_cache=True,
                eos_token_id=None,
                pad_token_id=0,
            )
        texts.append(written.cpu().numpy())
        done += count
        if tell is not None:
            tell(done, total)
    return np.concatenate(texts) if texts else np.zeros((0, length), dtype=np.int64)


def batch_size(model: nn.Module, settings: TextSettings) -> int:
    """Sequences written at once: as many as the keys and values leave room for."""
    device = next(model.parameters()).device
    number = 2 if device.type == "cuda" else 4  # bytes
    each = context_length(model, settings.length) * cached_numbers(model) * number
    # 2x: the cache is copied when it grows.
    memory = torch.cuda.get_device_properties(device).total_memory // 2 if device.type == "cuda" else _CACHE_BYTES
    return max(1, min(settings.sequences, 4096, memory // (2 * each)))


def cached_numbers(model: nn.Module) -> int:
    """Keys and values of one token in all layers, as its configuration tells."""
    config = text_config(model)
    heads = getattr(config, "num_attention_heads", 1)
    shared = getattr(config, "num_key_value_heads", None) or heads
    return int(2 * getattr(config, "num_hidden_layers", 1) * getattr(config, "hidden_size", 1024) * shared // heads)


def batch_count(model: nn.Module, settings: TextSettings) -> int:
    """Batches that :func:`write_text` makes."""
    return -(-settings.sequences // batch_size(model, settings))


def precision(device: torch.device) -> torch.autocast:
    """bfloat16 products on a GPU, float32 elsewhere."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")


def read_sequences(file: Path, tokenizer: Path | None, length: int) -> Tokens:
    """A text file as int64 ``[sequences, length]``; a shorter rest is left out.

    Raises:
        QbbError: no tokenizer, no UTF-8, or less than one sequence.
    """
    if tokenizer is None:
        raise QbbError("the model has no tokenizer.json to read a text with", where=f"--calibration {file}")
    ids = token_ids(read_text(file), tokenizer)
    if len(ids) < length:
        raise QbbError("text is shorter than a sequence", where=file, expected=f">= {length} tokens", got=len(ids))
    return ids[: len(ids) // length * length].reshape(-1, length)
