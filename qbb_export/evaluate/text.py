"""Text to token ids: windows of a whole file, or one sentence a line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qbb_export.errors import QbbError
from qbb_export.tokens import open_tokenizer, token_ids

Ids = npt.NDArray[np.int64]


def tokenizer_beside(model: Path) -> Path | None:
    """``MODEL.tokenizer.json`` as the export writes it, else ``tokenizer.json`` beside an .onnx file."""
    candidates = (model.with_suffix(".tokenizer.json"), model.with_name("tokenizer.json"))
    return next((file for file in candidates if file.is_file()), None)


def given_tokenizer(given: Path) -> Path:
    """``--tokenizer``: the file, or ``tokenizer.json`` in a folder.

    Raises:
        QbbError: no such file.
    """
    file = given / "tokenizer.json" if given.is_dir() else given
    if not file.is_file():
        raise QbbError("no tokenizer", where="--tokenizer", expected="a tokenizer.json", got=file)
    return file


def windows(content: str, tokenizer: Path, window: int) -> list[Ids]:
    """The tokens of a text in windows that do not overlap, int64 ``[1, window]``; a shorter rest is left out.

    The text goes through the tokenizer as one piece, without special tokens.

    Raises:
        QbbError: the tokenizer cannot be read, or the text is shorter than a window.
    """
    ids = token_ids(content, tokenizer)
    if len(ids) < window:
        raise QbbError("text is shorter than a window", where="--text", expected=f">= {window} tokens", got=len(ids))
    count = len(ids) // window
    return list(ids[: count * window].reshape(count, 1, window))


def sentence_ids(lines: Sequence[str], tokenizer: Path, window: int) -> list[Ids]:
    """Each sentence as int64 ``[1, tokens]``, with special tokens, cut to ``window`` tokens.

    Raises:
        QbbError: the tokenizer cannot be read.
    """
    encoder = open_tokenizer(tokenizer)
    encoder.enable_truncation(max_length=window)
    return [np.asarray([encoding.ids], dtype=np.int64) for encoding in encoder.encode_batch(list(lines))]


def encode_alike(tokenizers: Sequence[Path], encode: Callable[[Path], list[Ids]]) -> list[Ids]:
    """Token ids that all tokenizers agree on.

    *Why:* figures of models that read different tokens cannot stand in one table, and the wrong tokenizer gives figures
    that look like a bad model.

    Args:
        tokenizers: at least one file.
        encode: the ids with one of them.

    Raises:
        QbbError: two of them give different tokens.
    """
    distinct: dict[bytes, Path] = {}
    for file in tokenizers:
        distinct.setdefault(file.read_bytes(), file)
    first, *others = distinct.values()
    ids = encode(first)
    for other in others:
        if not _equal(ids, encode(other)):
            raise QbbError("models read the text as different tokens", where=other, expected=f"those of {first}")
    return ids


def _equal(a: Sequence[npt.NDArray[Any]], b: Sequence[npt.NDArray[Any]]) -> bool:
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
