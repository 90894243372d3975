"""Perplexity of a language model through ONNX Runtime."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qbb_export.errors import QbbError
from qbb_export.runtimes import ort


@dataclass(frozen=True)
class Perplexity:
    """Result of :func:`perplexity`.

    Attributes:
        perplexity: exp of the mean negative log-likelihood per token.
        nll: that mean, in nats.
        tokens: predicted tokens.
        windows: windows they came from.
    """

    perplexity: float
    nll: float
    tokens: int
    windows: int


def perplexity(
    model: Path,
    text: Path,
    *,
    window: int = 1024,
    tokenizer: Path | None = None,
    library: bool = True,
    max_windows: int | None = None,
    on_window: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Perplexity on a text, in non-overlapping windows; the first token of a window is context only.

    Args:
        model: an .onnx file with input ``input_ids`` [batch, sequence] and output ``logits`` [batch, sequence, tokens].
        text: UTF-8 file.
        window: tokens per window; a shorter rest is left out.
        tokenizer: a tokenizer.json; default: the one beside the model.
        library: False runs the function body instead of our kernel.
        max_windows: stop after so many.
        on_window: called with (windows done, windows in all).

    Raises:
        QbbError: a missing or unreadable file, a model without these inputs and outputs, or a text below one window.
    """
    tokens = tokenize(text, find_tokenizer(model, tokenizer))
    count = min(len(tokens) // window, max_windows or len(tokens))
    if window < 2 or count < 1:
        raise QbbError("text is shorter than a window", where=text, expected=f">= {window} tokens", got=len(tokens))
    session = ort.session(model, library=library)
    names = {value.name for value in session.get_inputs()}
    outputs = [value.name for value in session.get_outputs()]
    if "input_ids" not in names or "logits" not in outputs:
        raise QbbError(
            "not a language model", where=model, expected="input_ids and logits", got=f"{sorted(names)}, {outputs}"
        )
    total = 0.0
    for index in range(count):
        ids = tokens[None, index * window : (index + 1) * window]
        total += _negative_log_likelihood(_logits(session, names, ids)[0], ids[0])
        if on_window is not None:
            on_window(index + 1, count)
    predicted = count * (window - 1)
    mean = total / predicted
    return Perplexity(math.exp(mean), mean, predicted, count)


def _logits(session: Any, names: set[str], ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    feeds = {"input_ids": ids}
    if "attention_mask" in names:
        feeds["attention_mask"] = np.ones_like(ids)
    if "position_ids" in names:
        feeds["position_ids"] = np.arange(ids.shape[1], dtype=np.int64)[None, :]
    unknown = sorted(names - set(feeds))
    if unknown:
        raise QbbError(
            "cannot feed an input of the model", expected="input_ids, attention_mask, position_ids", got=unknown
        )
    (logits,) = session.run(["logits"], feeds)
    return np.asarray(logits)


def _negative_log_likelihood(logits: npt.NDArray[Any], ids: npt.NDArray[np.int64]) -> float:
    """Sum over positions of -log softmax(logits[t])[ids[t+1]], in float64 where it adds up."""
    rows = logits[:-1].astype(np.float32, copy=False)
    peak = rows.max(axis=-1, keepdims=True)
    log_sum = np.log(np.exp(rows - peak).sum(axis=-1, dtype=np.float64)) + peak[:, 0]
    picked = rows[np.arange(len(rows)), ids[1:]]
    return float((log_sum - picked).sum())


def find_tokenizer(model: Path, given: Path | None) -> Path:
    """``--tokenizer``, else ``MODEL.tokenizer.json`` as the export writes it, else ``tokenizer.json`` beside MODEL."""
    if given is not None:
        candidates = [given / "tokenizer.json" if given.is_dir() else given]
    else:
        candidates = [model.with_suffix(".tokenizer.json"), model.with_name("tokenizer.json")]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise QbbError("no tokenizer", where=model, expected=f"--tokenizer FILE or {candidates[-1]}")


def tokenize(text: Path, tokenizer: Path) -> npt.NDArray[np.int64]:
    """All token ids of a text file as one row.

    Raises:
        QbbError: a file that is missing, no UTF-8, or no tokenizer.
    """
    from tokenizers import Tokenizer

    try:
        content = text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise QbbError("cannot read the text", where=text, expected="a UTF-8 file", got=error) from error
    try:
        encoder = Tokenizer.from_file(str(tokenizer))
    except Exception as error:  # tokenizers raises bare Exception
        raise QbbError("cannot read the tokenizer", where=tokenizer, got=error) from error
    encoder.no_truncation()
    encoder.no_padding()
    return np.asarray(encoder.encode(content, add_special_tokens=False).ids, dtype=np.int64)
