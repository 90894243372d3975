"""64-bit Arm, with and without FEAT_DotProd."""

from __future__ import annotations

from typing import Any

from tvm.tirx.script.builder import ir as T

from qbb_export.runtimes.tvm.cpu.ir import Register, intrinsic, load, shuffle, splat, store
from qbb_export.runtimes.tvm.cpu.isa import BY_BYTE, BY_PAIR, NATURAL, Isa


class Neon(Isa):
    """64-bit Arm. A table of floats lies as four planes of 16 bytes, since one tbl takes 16 bytes.

    Bytes: one tbl on two tables gives entries of two quads of a row side by side, and a pairwise addition adds them.
    """

    name = "neon"
    half_scales = True
    float_order = BY_BYTE
    byte_order = BY_PAIR
    float_rows, byte_rows = 2, 4
    float_sums, byte_sums = 1, 4
    product_rows, product_tiles = 4, 1
    byte_product_rows = 4

    def store_float_table(self, tables: Any, at: Any, nibble: int, entries: Any) -> None:
        planes = shuffle([T.reinterpret("uint8x64", entries)], [4 * i + byte for byte in range(4) for i in range(16)])
        store(tables, T.reinterpret("float32x16", planes), at + nibble * 16)

    def float_index(self, planes: Any, at: tuple[Any, ...]) -> Any:
        return [Register("uint8", load(planes, *at, 16 * byte)) for byte in range(4)]

    def look_up(self, index: Any, nibble: int, tables: Any, at: Any) -> Any:
        byte = index[nibble // 2].value
        place = byte >> splat(4, "uint8") if nibble % 2 else byte & splat(15, "uint8")
        found = []
        for i in range(4):
            plane = T.reinterpret("uint8x16", load(tables, at + (16 * nibble + 4 * i), lanes=4))
            found.append(Register("uint8", intrinsic("llvm.aarch64.neon.tbl1.v16i8", "uint8x16", plane, place)))
        quarters = []
        for half in (0, 8):  # rows 0-7, 8-15
            order = [half + i + 16 * of for i in range(8) for of in range(2)]
            low, high = (
                Register(
                    "uint16",
                    T.reinterpret("uint16x8", shuffle([found[2 * i].value, found[2 * i + 1].value], order)),
                    lanes=8,
                )
                for i in range(2)
            )
            for first in (0, 4):
                order = [first + i + 8 * of for i in range(4) for of in range(2)]
                quarters.append(T.reinterpret("float32x4", shuffle([low.value, high.value], order)))
        return shuffle(quarters, range(16))

    def byte_index(self, planes: Any, at: tuple[Any, ...]) -> Any:
        nibble, place = splat(15, "uint8"), T.reinterpret("uint8x16", splat(0x1000, "uint16", 8))
        found = []
        for part in range(4):  # bytes 0, 1 of rows 0-7 | of rows 8-15 | bytes 2, 3
            pairs = Register("uint8", load(planes, *at, 16 * part))
            low, high = (pairs.value & nibble) | place, (pairs.value >> splat(4, "uint8")) | place
            found.append((Register("uint8", low), Register("uint8", high)))
        return found

    def new_sums(self) -> Any:
        return [Register("int16", splat(0, "int16", 8), lanes=8) for _ in range(2)]

    def add_bytes(self, sums: Any, index: Any, tables: Any, at: Any, *, signed: bool) -> None:
        name = "llvm.aarch64.neon.saddlp.v8i16.v16i8" if signed else "llvm.aarch64.neon.uaddlp.v8i16.v16i8"
        for pair in range(2):
            for half in range(2):
                two = [load(tables, at + (64 * half + 32 * pair + 16 * i)) for i in range(2)]
                for rows in range(2):
                    place = index[2 * pair + rows][half].value
                    entries = intrinsic("llvm.aarch64.neon.tbl2.v16i8", "int8x16", *two, place)
                    sums[rows].add(intrinsic(name, "int16x8", entries))

    def total(self, sums: Any) -> Any:
        return T.Cast("float32x16", T.Cast("int32x16", shuffle([s.value for s in sums], range(16))))


class NeonDot(Neon):
    """With FEAT_DotProd: tbl on four tables takes the four bytes of a row as they lie, and sdot with ones adds them."""

    name = "neondot"
    byte_order = NATURAL
    byte_rows, byte_sums = 2, 4
    byte_product_rows = 6

    def byte_index(self, planes: Any, at: tuple[Any, ...]) -> Any:
        nibble, place = splat(15, "uint8"), T.reinterpret("uint8x16", splat(0x30201000, "uint32", 4))
        found = []
        for part in range(4):  # four rows each
            four = Register("uint8", load(planes, *at, 16 * part))
            low, high = (four.value & nibble) | place, (four.value >> splat(4, "uint8")) | place
            found.append((Register("uint8", low), Register("uint8", high)))
        return found

    def new_sums(self) -> Any:
        return [Register("int32", splat(0, "int32", 4), lanes=4) for _ in range(4)]

    def add_bytes(self, sums: Any, index: Any, tables: Any, at: Any, *, signed: bool) -> None:
        name = "llvm.aarch64.neon.sdot.v4i32.v16i8" if signed else "llvm.aarch64.neon.udot.v4i32.v16i8"
        ones = splat(1, "int8")
        for half in range(2):
            four = [load(tables, at + (64 * half + 16 * i)) for i in range(4)]
            for rows in range(4):
                entries = intrinsic("llvm.aarch64.neon.tbl4.v16i8", "int8x16", *four, index[rows][half].value)
                sums[rows].set(intrinsic(name, "int32x4", sums[rows].value, entries, ones))

    def total(self, sums: Any) -> Any:
        return T.Cast("float32x16", shuffle([s.value for s in sums], range(16)))

    def dot(self, sums: Any, weights: Any, four: Any) -> None:
        quarters = []
        x = T.reinterpret("int8x16", splat(four, lanes=4))
        for i in range(4):
            w = shuffle([weights], range(16 * i, 16 * i + 16))
            start = shuffle([sums.value], range(4 * i, 4 * i + 4))
            quarters.append(intrinsic("llvm.aarch64.neon.sdot.v4i32.v16i8", "int32x4", start, w, x))
        sums.set(shuffle(quarters, range(16)))
