"""How a matrix lies in a compiled library, and the numbers that kernels are built with.

Constants are copied into the library anyway, so bits and scales are brought into the order of reading: all bases of a
word side by side, tile after tile. K is cut into blocks of equally many words, none of which crosses the end of a
group or of a segment (docs/format.md#modes); the last one is padded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from qbb_export.format import TILE_ROWS, WORD_BITS, Spec

SEGMENT_WORDS = 8


@dataclass(frozen=True)
class Geometry:
    """Sizes of one matrix.

    Attributes:
        spec: its layer, layout 1.
        has_offset: whether any offset is not 0.
    """

    spec: Spec
    has_offset: bool

    @cached_property
    def segments(self) -> list[tuple[int, int]]:
        """First word and end of each segment: the inputs of a group, cut at multiples of 256."""
        group_words = self.group_words
        found, word = [], 0
        while word < self.spec.words:
            end = min(
                (word // SEGMENT_WORDS + 1) * SEGMENT_WORDS, (word // group_words + 1) * group_words, self.spec.words
            )
            found.append((word, end))
            word = end
        return found

    @property
    def group_words(self) -> int:
        """Words of a group."""
        spec = self.spec
        return spec.words if spec.group_size == spec.K else spec.group_size // WORD_BITS

    @cached_property
    def block_words(self) -> int:
        """Words of a block."""
        counts = [end - first for first, end in self.segments]
        return math.gcd(*counts[:-1]) if len(counts) > 1 else counts[0]

    @property
    def blocks(self) -> int:
        """Blocks of K."""
        return -(-self.spec.words // self.block_words)

    @property
    def words(self) -> int:
        """Words of K with padding."""
        return self.blocks * self.block_words

    def planes(self, planes: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
        """Bits ``[bases, tiles, words, 16]`` as ``[tiles, words, bases, 16]``."""
        extra = self.words - planes.shape[2]
        padded = np.pad(planes, ((0, 0), (0, 0), (0, extra), (0, 0)))
        return np.ascontiguousarray(padded.transpose(1, 2, 0, 3))

    def scales(self, scales: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
        """Scales ``[bases, tiles, groups, 16]`` as ``[tiles, groups, bases, 16]``; 0 in rows past N."""
        rows = np.arange(self.spec.tiles * TILE_ROWS).reshape(1, self.spec.tiles, 1, TILE_ROWS) < self.spec.N
        return np.ascontiguousarray(np.where(rows, scales, scales.dtype.type(0)).transpose(1, 2, 0, 3))
