"""Values of a few bits out of 32-bit words, as GPTQ and AWQ pack them."""

from __future__ import annotations

import math
from typing import Final

import numpy as np
import numpy.typing as npt

from qbb_export.format import WORD_BITS

# Value ``AWQ_ORDER[i]`` of eight lies in bits 4i..4i+3 of the word.
AWQ_ORDER: Final = (0, 2, 4, 6, 1, 3, 5, 7)


def words_per_period(bits: int) -> int:
    """Words after which a stream of values begins with a word again: 3 for 3 bits, 1 for 2, 4 and 8."""
    return bits // math.gcd(bits, WORD_BITS)


def unpack_stream(words: npt.NDArray[np.uint32], bits: int, axis: int) -> npt.NDArray[np.int32]:
    """Values of a stream of bits, lowest first, that runs along one axis of a matrix.

    Args:
        words: uint32, a multiple of :func:`words_per_period` along ``axis``.
        bits: of a value, 1..8.
        axis: 0 or 1.

    Returns:
        int32, ``32 / bits`` times as long along ``axis``.
    """
    period = words_per_period(bits)
    rows = np.moveaxis(words, axis, 0)
    rows = rows.reshape(-1, period, rows.shape[1])
    values = np.empty((rows.shape[0], period * WORD_BITS // bits, rows.shape[2]), dtype=np.int32)
    for i in range(values.shape[1]):
        word, shift = divmod(i * bits, WORD_BITS)
        value = rows[:, word] >> np.uint32(shift)
        if shift + bits > WORD_BITS:
            value = value | rows[:, word + 1] << np.uint32(WORD_BITS - shift)
        values[:, i] = value & np.uint32((1 << bits) - 1)
    return np.moveaxis(values.reshape(-1, values.shape[2]), 0, axis)


def unpack_awq(words: npt.NDArray[np.uint32]) -> npt.NDArray[np.int32]:
    """uint32 ``[n, m]`` to int32 ``[n, 8 m]``, values 0..15 in their true order."""
    values = np.empty((*words.shape, len(AWQ_ORDER)), dtype=np.int32)
    for i, place in enumerate(AWQ_ORDER):
        values[:, :, place] = words >> np.uint32(4 * i) & np.uint32(15)
    return values.reshape(words.shape[0], -1)
