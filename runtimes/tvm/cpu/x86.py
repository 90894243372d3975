"""x86: AVX2, and AVX-512 with and without VBMI and VNNI."""

from __future__ import annotations

from typing import Any

from tvm.tirx.script.builder import ir as T

from qbb_export.runtimes.tvm.cpu.ir import Register, intrinsic, load, shuffle, splat
from qbb_export.runtimes.tvm.cpu.isa import BY_BYTE, NATURAL, Isa


class Avx2(Isa):
    """x86 with AVX2, FMA and F16C: bit 3 of a nibble picks between two tables of eight floats."""

    name = "avx2"
    half_scales = True
    byte_order = BY_BYTE
    float_rows, byte_rows = 2, 2
    float_sums, byte_sums = 1, 4
    product_rows, product_tiles = 6, 1
    byte_product_rows = 4

    def float_index(self, planes: Any, at: tuple[Any, ...]) -> Any:
        return [
            Register("uint32", T.reinterpret("uint32x8", load(planes, *at, 32 * half, lanes=32)), lanes=8)
            for half in range(2)
        ]

    def look_up(self, index: Any, nibble: int, tables: Any, at: Any) -> Any:
        halves = []
        for word in index:
            places = T.reinterpret("int32x8", word.value >> splat(4 * nibble, "uint32", 8))  # the low three bits count
            low, high = (
                intrinsic("llvm.x86.avx2.permps", "float32x8", load(tables, at + (16 * nibble + i), lanes=8), places)
                for i in (0, 8)
            )
            bit3 = T.reinterpret("float32x8", word.value << splat(28 - 4 * nibble, "uint32", 8))
            halves.append(intrinsic("llvm.x86.avx.blendv.ps.256", "float32x8", low, high, bit3))
        return shuffle(halves, range(16))

    def byte_index(self, planes: Any, at: tuple[Any, ...]) -> Any:
        nibble = splat(15, "uint8", 32)
        found = []
        for half in range(2):
            pair = Register("uint8", load(planes, *at, 32 * half, lanes=32), lanes=32)
            found.append(Register("uint8", pair.value & nibble, lanes=32))
            high = T.reinterpret("uint16x16", pair.value) >> splat(4, "uint16")
            found.append(Register("uint8", T.reinterpret("uint8x32", high) & nibble, lanes=32))
        return [found[0], found[2], found[1], found[3]]  # low nibbles of bytes 0, 1 | 2, 3, then high ones

    def new_sums(self) -> Any:
        return [Register("int16", splat(0, "int16")) for _ in range(2)]

    def add_bytes(self, sums: Any, index: Any, tables: Any, at: Any, *, signed: bool) -> None:
        ones = splat(1, "uint8" if signed else "int8", 32)
        for half in range(2):
            found = []
            for i in range(2):
                table = load(tables, at + (64 * half + 32 * i), lanes=32)
                entries = intrinsic("llvm.x86.avx2.pshuf.b", "int8x32", table, index[2 * half + i].value)
                found.append(Register("int8", entries, lanes=32))
            for part, first in zip(sums, (0, 8), strict=True):  # of each 128 bits the lower or the upper half
                order = [lane * 16 + first + i + 32 * of for lane in range(2) for i in range(8) for of in range(2)]
                pairs = shuffle([value.value for value in found], order)
                pair = (ones, pairs) if signed else (pairs, ones)
                part.add(intrinsic("llvm.x86.avx2.pmadd.ub.sw", "int16x16", *pair))

    def total(self, sums: Any) -> Any:
        eights = [shuffle([s.value], range(8)) + shuffle([s.value], range(8, 16)) for s in sums]
        return T.Cast("float32x16", T.Cast("int32x16", shuffle(eights, range(16))))

    def dot(self, sums: Any, weights: Any, four: Any) -> None:
        """vpmaddubsw wants one factor without a sign and clips sums of two at 16 bits: 2·127·127 fits."""
        halves = []
        for half in range(2):
            w = shuffle([weights], range(32 * half, 32 * half + 32))
            x = T.reinterpret("int8x32", splat(four, lanes=8))
            sign = intrinsic("llvm.x86.avx2.psign.b", "int8x32", x, w)
            size = intrinsic("llvm.x86.avx2.psign.b", "int8x32", w, w)
            pairs = intrinsic("llvm.x86.avx2.pmadd.ub.sw", "int16x16", size, sign)
            halves.append(intrinsic("llvm.x86.avx2.pmadd.wd", "int32x8", pairs, splat(1, "int16")))
        sums.add(shuffle(halves, range(16)))


class Avx512(Avx2):
    """AVX-512 (F, BW, VL): a table of floats is one register. Bytes as with AVX2."""

    name = "avx512"
    float_rows, float_sums = 4, 6
    product_rows, product_tiles = 12, 2

    def float_index(self, planes: Any, at: tuple[Any, ...]) -> Any:
        return Isa.float_index(self, planes, at)

    def look_up(self, index: Any, nibble: int, tables: Any, at: Any) -> Any:
        places = T.reinterpret("int32x16", index.value >> splat(4 * nibble, "uint32"))  # the low four bits count
        table = load(tables, at + 16 * nibble)
        return intrinsic("llvm.x86.avx512.permvar.sf.512", "float32x16", table, places)


class Avx512Vnni(Avx512):
    """With VBMI and VNNI: vpermb looks up four tables at once, vpdpbusd with ones adds up the four bytes of a row."""

    name = "avx512vnni"
    byte_order = NATURAL
    byte_rows, byte_sums = 4, 16
    byte_product_rows = 8

    def byte_index(self, planes: Any, at: tuple[Any, ...]) -> Any:
        word = Register("uint32", self.words(planes, at, self.byte_order))
        nibbles, place = splat(0x0F0F0F0F, "uint32"), splat(0x30201000, "uint32")
        return [
            Register("uint32", (word.value & nibbles) | place),
            Register("uint32", ((word.value >> splat(4, "uint32")) & nibbles) | place),
        ]

    def new_sums(self) -> Any:
        return Isa.new_sums(self)

    def add_bytes(self, sums: Any, index: Any, tables: Any, at: Any, *, signed: bool) -> None:
        ones = splat(1, "uint8" if signed else "int8", 64)
        for half in range(2):
            places = T.reinterpret("int8x64", index[half].value)
            table = load(tables, at + 64 * half, lanes=64)
            found = intrinsic("llvm.x86.avx512.permvar.qi.512", "int8x64", table, places)
            pair = (ones, found) if signed else (T.reinterpret("uint8x64", found), ones)
            sums.set(intrinsic("llvm.x86.avx512.vpdpbusd.512", "int32x16", sums.value, *pair))

    def total(self, sums: Any) -> Any:
        return Isa.total(self, sums)

    def dot(self, sums: Any, weights: Any, four: Any) -> None:
        """One factor of vpdpbusd has no sign: weights + 128, and 128 times the sum of the inputs less."""
        shifted = T.reinterpret("uint8x64", weights) ^ splat(0x80, "uint8", 64)
        bias = splat(0x80, "uint8", 64)
        x = T.reinterpret("int8x64", splat(four))
        less = intrinsic("llvm.x86.avx512.vpdpbusd.512", "int32x16", splat(0, "int32"), bias, x)
        sums.set(intrinsic("llvm.x86.avx512.vpdpbusd.512", "int32x16", sums.value, shifted, x))
        sums.set(sums.value - less)
