"""What differs between instruction sets: looking up sums of four inputs by nibbles of the weights, and adding them up.

A lane is a row of the matrix, of 16 side by side. Nibble n of a word picks its sum from table n (docs/format.md):

    nibble            0          1           2          3      ...    7
    inputs         x[0..3]   x[16..19]    x[4..7]   x[20..23]      x[28..31]

Tables of floats lie as ``[8 nibbles, 16]`` for each word, tables of bytes as
``[even and odd nibbles, 4, 16]``. Everything that only computes is the same for all and not here.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from tvm.tirx.script.builder import ir as T

from qbb_export.runtimes.tvm.cpu.ir import LANES, Register, load, shuffle, splat, store

NIBBLES = 8
NATURAL = tuple(range(64))
BY_BYTE = tuple(row * 4 + byte for byte in range(4) for row in range(LANES))  # byte 0 of all rows, byte 1, ...
# Bytes 0 and 1 of rows 0-7 in pairs, the same of rows 8-15, then bytes 2 and 3.
BY_PAIR = tuple(row * 4 + pair * 2 + byte for pair in range(2) for row in range(LANES) for byte in range(2))


class Isa:
    """Any machine: one look-up at a time.

    Attributes:
        name: in names of functions.
        float_order, byte_order: bytes of the 16 words of a tile, in the order that look-ups want them in.
        float_rows, byte_rows: rows of X at a time, a power of two.
        float_sums, byte_sums: rows times bases at a time.
        half_scales: whether there are instructions for float16. Without, a conversion is a call of a function, and on
            riscv64 one number in many came out wrong behind such calls (LLVM 22 in TVM 0.27).
        product_rows: rows of X at a time in a product of floats.
    """

    name = "portable"
    float_order: ClassVar[tuple[int, ...]] = NATURAL
    byte_order: ClassVar[tuple[int, ...]] = NATURAL
    half_scales = False
    float_rows, byte_rows = 1, 1
    float_sums, byte_sums = 1, 1
    product_rows, product_tiles = 2, 1
    byte_product_rows = 2

    def planes(self, planes: npt.NDArray[np.uint32], order: tuple[int, ...]) -> npt.NDArray[np.uint8]:
        """Bytes ``[tiles, words, bases, 64]`` of words ``[tiles, words, bases, 16]`` in an order."""
        as_bytes = planes.astype("<u4").view(np.uint8)
        return np.ascontiguousarray(as_bytes[..., list(order)])

    def words(self, planes: Any, at: tuple[Any, ...], order: tuple[int, ...]) -> Any:
        """The 16 words of a tile as uint32, whatever the order."""
        found = load(planes, *at, 0, lanes=64)
        if order != NATURAL:
            place = {byte: i for i, byte in enumerate(order)}
            found = shuffle([found], [place[i] for i in range(64)])
        return T.reinterpret("uint32x16", found)

    # Floats.

    def store_float_table(self, tables: Any, at: Any, nibble: int, entries: Any) -> None:
        """Keep the 16 sums of a nibble; ``at``: where the tables of a word and row begin."""
        store(tables, entries, at + nibble * 16)

    def float_index(self, planes: Any, at: tuple[Any, ...]) -> Any:
        """What :meth:`look_up` wants of the words of a tile; rows of X share it."""
        return Register("uint32", self.words(planes, at, self.float_order))

    def look_up(self, index: Any, nibble: int, tables: Any, at: Any) -> Any:
        """Sums of the 16 rows of the matrix as float32."""
        places = ((index.value >> splat(4 * nibble, "uint32")) & splat(15, "uint32")) + splat(16 * nibble, "uint32")
        return tables[splat(at) + T.Cast("int64x16", places)]

    # Bytes.

    def byte_index(self, planes: Any, at: tuple[Any, ...]) -> Any:
        """What :meth:`add_bytes` wants of the words of a tile; rows of X share it."""
        return Register("uint32", self.words(planes, at, self.byte_order))

    def new_sums(self) -> Any:
        """Sums of what is looked up in a block, for the 16 rows of the matrix."""
        return Register("int32", splat(0, "int32"))

    def add_bytes(self, sums: Any, index: Any, tables: Any, at: Any, *, signed: bool) -> None:
        """Look up the 8 nibbles of each of the 16 words, add up; ``at``: where the tables begin."""
        for n in range(NIBBLES):
            first = n % 2 * 64 + n // 2 * 16
            places = ((index.value >> splat(4 * n, "uint32")) & splat(15, "uint32")) + splat(first, "uint32")
            found = tables[splat(at) + T.Cast("int64x16", places)]
            sums.add(T.Cast("int32x16", found if signed else T.reinterpret("uint8x16", found)))

    def total(self, sums: Any) -> Any:
        """The sums of the 16 rows as float32."""
        return T.Cast("float32x16", sums.value)

    # Products of bytes.

    def dot(self, sums: Any, weights: Any, four: Any) -> None:
        """sums int32x16 += for each row of the matrix, four int8 weights (int8x64) times the bytes of ``four``."""
        x = T.reinterpret("int8x64", splat(four))
        wide = T.Cast("int16x64", weights) * T.Cast("int16x64", x)  # |w x| <= 127 * 127
        for i in range(4):
            sums.add(T.Cast("int32x16", shuffle([wide], range(i, 64, 4))))
