"""How the products of ``gpu`` are cut into blocks and threads."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Final

from qbb_export.format import TILE_ROWS, WORD_BITS, Spec

WARP: Final = 32
FEW: Final = 8  # rows of X, at most, that look-ups take


@dataclass(frozen=True)
class Launch:
    """How a kernel is cut into threads.

    Attributes:
        rows: rows of X that a block multiplies with.
        tiles: that a block reads.
        splits: threads, or warps of a look-up, that share K.
        words: words of a segment, at most.
        look_up: which kernel.
    """

    rows: int
    tiles: int
    splits: int
    words: int = 4
    look_up: bool = False

    @property
    def threads(self) -> int:
        """Of a block."""
        return self.splits * (WARP if self.look_up else TILE_ROWS)

    def grid(self, spec: Spec, rows: int) -> tuple[int, int]:
        """Blocks along N and M."""
        return -(-spec.tiles // self.tiles), -(-rows // self.rows)


def launches(spec: Spec, *, cuda: bool) -> tuple[Launch, ...]:
    """For one row of X, two rows, at most ``FEW`` and more."""
    many = Launch(8, 1, min(16, spec.words))
    if not cuda:
        return replace(many, rows=1), replace(many, rows=2), replace(many, rows=4), many
    # About as many warps at a time as a large GPU holds, and none idle for a turn (benchmarks/tvm_gpu.py --sweep).
    # What a lane makes of X serves all its tiles. Sums for more rows of X need registers.
    more = _look_ups(spec, tiles=4 if spec.tiles >= 512 else 1, warps=8)
    middle = 192 <= spec.tiles < 512
    one = _look_ups(spec, tiles=2 if middle else more.tiles, warps=32 if middle else 16)
    return one, replace(more, rows=2), replace(more, rows=4, tiles=min(more.tiles, 2)), many


def _look_ups(spec: Spec, *, tiles: int, warps: int) -> Launch:
    """For one row of X, at most ``warps``; long segments, unless they leave warps without any."""
    words = 4 if -(-spec.words // segment_words(spec, 4)) >= 1.5 * warps else 2
    segments = -(-spec.words // segment_words(spec, words))
    turns = -(-segments // (2 * warps))
    return Launch(1, tiles, -(-segments // (2 * turns)), words, look_up=True)


def segment_words(spec: Spec, most: int) -> int:
    """Words of a segment: a segment lies in one group."""
    return most if spec.group_size == spec.K else math.gcd(spec.group_size // WORD_BITS, most)
