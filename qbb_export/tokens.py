"""Text files and tokenizers, as every part that turns text into token ids reads them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from qbb_export.errors import QbbError

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def read_text(text: Path) -> str:
    """A whole file.

    Raises:
        QbbError: it is missing or no UTF-8.
    """
    try:
        return text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise QbbError("cannot read the text", where=text, expected="a UTF-8 file", got=error) from error


def open_tokenizer(file: Path) -> Tokenizer:
    """A tokenizer without the padding and truncation that its file may ask for.

    Raises:
        QbbError: it cannot be read.
    """
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises bare Exception
        raise QbbError("cannot read the tokenizer", where=file, got=error) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def token_ids(content: str, tokenizer: Path) -> npt.NDArray[np.int64]:
    """A text in one piece, without special tokens: int64 ``[tokens]``.

    Raises:
        QbbError: the tokenizer cannot be read.
    """
    return np.asarray(open_tokenizer(tokenizer).encode(content, add_special_tokens=False).ids, dtype=np.int64)
