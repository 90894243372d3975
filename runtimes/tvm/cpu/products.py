"""Products of few rows of X by look-up, and of many rows by making the weights numbers first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from qbb_export.format import WORD_BITS
from qbb_export.runtimes.tvm.cpu import ir
from qbb_export.runtimes.tvm.cpu.activations import TABLE, TINY, codes_shape
from qbb_export.runtimes.tvm.cpu.geometry import Geometry
from qbb_export.runtimes.tvm.cpu.ir import LANES, Register, load, put, splat, store
from qbb_export.runtimes.tvm.cpu.isa import NIBBLES, Isa

_ROWS = 128  # of X for which weights are made numbers once
_BLOCK_WORDS = 4  # of K, in products of floats


class Product:
    """The function of one matrix while it is emitted.

    Args:
        isa: the instruction set.
        g: the matrix.
        scale_dtype: ``"float16"`` or ``"float32"``.
        size: bytes of an entry of the tables; 0: floats.
        limit: most rows of X that are few; None: all.
    """

    def __init__(self, isa: Isa, g: Geometry, scale_dtype: str, size: int, limit: int | None) -> None:
        self.isa, self.g, self.size, self.limit = isa, g, size, limit
        self.scale_dtype = scale_dtype
        self.order = isa.byte_order if size else isa.float_order

    def function(self) -> Any:
        """PrimFunc of X ``[M, K]``, what :mod:`activations` made of it, planes uint8 ``[tiles, words, bases, 64]``,
        scales ``[tiles, groups, bases, 16]``, bias ``[tiles, 16]``, where there is one the offset
        ``[tiles, groups, 16]``, and Y ``[M, N]``.
        """
        g, spec = self.g, self.g.spec

        def build() -> None:
            self.M = T.int64()
            self.x = ir.parameter("x", (self.M, spec.K), "float32")
            if self.size:
                self.codes = ir.parameter("codes", (codes_shape(g, self.M, self.size, self.limit),), "int8")
                self.rows = self.M
                self.steps = ir.parameter("steps", (self.M * g.blocks,), "float32")
            else:
                self.rows = tirx.min(self.M, tirx.const(self.limit, "int64"))
                self.codes = ir.parameter("tables", (self.rows * (g.words * TABLE),), "float32")
            self.totals = ir.parameter("totals", (self.rows * g.blocks,), "float32")
            self.planes = ir.parameter("planes", (spec.tiles, g.words, spec.bases, 64), "uint8")
            self.scales = ir.parameter("scales", (spec.tiles, spec.groups, spec.bases, LANES), self.scale_dtype)
            self.bias = ir.parameter("bias", (spec.tiles, LANES), "float32")
            if g.has_offset:
                self.offset = ir.parameter("offset", (spec.tiles, spec.groups, LANES), "float32")
            self.y = ir.parameter("y", (self.M, spec.N), "float32")
            many = self._many_bytes if self.size == 1 else self._many_floats
            with ir.body():
                if self.limit is None:
                    self._few()
                else:
                    ir.if_else(self.limit >= self.M, self._few, many)

        return ir.function(f"{self.isa.name}_{('floats', 'bytes', 'words')[self.size]}_{spec.K}_{spec.N}", build)

    def _scale(self, tile: Any, group: Any, basis: int) -> Any:
        return T.Cast("float32x16", load(self.scales, tile, group, basis, 0))

    def _finish(self, tile: Any, row: Any, value: Any) -> None:
        """Store 16 outputs of a row; rows of the matrix at or past N are dropped here."""
        N = self.g.spec.N
        first = tile * LANES
        if N % LANES == 0:
            store(self.y, value, row, first)
            return
        out = T.alloc_buffer((LANES,), "float32")
        store(out, value, 0)
        with T.serial(0, tirx.min(tirx.const(LANES, "int64"), N - first)) as n:
            put(self.y, out[n], row, first + n)

    # Few rows.

    def _few(self) -> None:
        most = self.isa.byte_rows if self.size else self.isa.float_rows
        with ir.loop(tirx.const(self.g.spec.tiles, "int64"), parallel=True) as tile:
            ir.row_blocks(self.M, most, lambda R, row: self._few_rows(R, tile, row))

    def _few_rows(self, R: int, tile: Any, row: Any) -> None:
        g, bases = self.g, self.g.spec.bases
        sums = [Register("float32", load(self.bias, tile, 0)) for _ in range(R)]
        at_once = (self.isa.byte_sums // self.size if self.size else self.isa.float_sums) // R
        at_once = max(1, min(at_once, bases))
        with T.serial(0, tirx.const(g.blocks, "int64")) as block:
            group = block * g.block_words // g.group_words
            of_block = [Register("float32", splat(0, "float32")) for _ in range(R)] if self.size else sums
            add = self._add_bytes if self.size else self._add_floats
            for b in range(0, bases, at_once):
                add(list(range(b, min(b + at_once, bases))), tile, row, block, group, of_block)
            for r in range(R):
                if g.has_offset:
                    total = splat(self.totals[block * self.rows + row + r])
                    of_block[r].add(load(self.offset, tile, group, 0) * total)
                if self.size:
                    sums[r].add(of_block[r].value * splat(self.steps[block * self.M + row + r]))
        for r in range(R):
            self._finish(tile, row + r, sums[r].value)

    def _add_bytes(self, bases: list[int], tile: Any, row: Any, block: Any, group: Any, out: list[Register]) -> None:
        isa, size = self.isa, self.size
        new = [[[isa.new_sums() for _ in range(size)] for _ in bases] for _ in out]
        with self._words() as w:
            word = block * self.g.block_words + w
            index = [isa.byte_index(self.planes, (tile, word, b)) for b in bases]
            for r, of_row in enumerate(new):
                at = Register("int64", (word * self.M + row + r) * (size * TABLE), lanes=1).value
                for i, of_basis in enumerate(of_row):
                    isa.add_bytes(of_basis[0], index[i], self.codes, at, signed=True)
                    if size == 2:
                        isa.add_bytes(of_basis[1], index[i], self.codes, at + TABLE, signed=False)
        for r, of_row in enumerate(new):
            for b, of_basis in zip(bases, of_row, strict=True):
                p = isa.total(of_basis[0])
                if size == 2:
                    p = p * splat(256, "float32") + isa.total(of_basis[1])
                out[r].add(self._scale(tile, group, b) * p)

    def _add_floats(self, bases: list[int], tile: Any, row: Any, block: Any, group: Any, out: list[Register]) -> None:
        isa = self.isa
        new = [[Register("float32", splat(0, "float32")) for _ in bases] for _ in out]
        with self._words() as w:
            word = block * self.g.block_words + w
            index = [isa.float_index(self.planes, (tile, word, b)) for b in bases]
            for r, of_row in enumerate(new):
                at = Register("int64", (word * self.rows + row + r) * TABLE, lanes=1).value
                for i, p in enumerate(of_row):
                    parts = [
                        Register("float32", isa.look_up(index[i], n, self.codes, at)).value for n in range(NIBBLES)
                    ]
                    while len(parts) > 1:
                        parts = [a + b for a, b in zip(parts[::2], parts[1::2], strict=True)]
                    p.add(parts[0])
        for r, of_row in enumerate(new):
            for b, p in zip(bases, of_row, strict=True):
                out[r].add(self._scale(tile, group, b) * p.value)

    def _words(self) -> Any:
        return T.serial(0, tirx.const(self.g.block_words, "int64"))

    # Many rows.

    def _many(self, block_words: int, dtype: str, expand: Callable[..., None], multiply: Callable[..., None]) -> None:
        """For chunks of tiles and rows of X: blocks of K of weights as numbers, then all rows times those."""
        g, spec = self.g, self.g.spec
        T_ = self.isa.product_tiles
        numbers = block_words * WORD_BITS * LANES
        blocks = tirx.const(-(-g.words // block_words), "int64")
        with ir.loop(tirx.const(-(-spec.tiles // T_), "int64"), parallel=True) as chunk:
            acc = T.alloc_buffer((_ROWS, T_ * LANES), "float32")
            weights = T.alloc_buffer((numbers * T_,), dtype)
            steps = T.alloc_buffer((T_ * LANES,), "float32")
            with T.serial(0, (self.M + (_ROWS - 1)) // _ROWS) as part:
                rows = Register("int64", tirx.min(tirx.const(_ROWS, "int64"), self.M - part * _ROWS), lanes=1).value
                with T.serial(0, rows) as r, T.serial(0, T_) as t:
                    tile = tirx.min(chunk * T_ + t, tirx.const(spec.tiles - 1, "int64"))
                    store(acc, load(self.bias, tile, 0), r, t * LANES)
                with T.serial(0, blocks) as block:
                    for t in range(T_):
                        expand(tirx.min(chunk * T_ + t, tirx.const(spec.tiles - 1, "int64")), t, block, weights, steps)
                    most = self.isa.byte_product_rows if dtype == "int8" else self.isa.product_rows

                    def rows_at(R: int, first: Any, part: Any = part, block: Any = block) -> None:
                        multiply(R, part * _ROWS + first, first, block, weights, steps, acc)

                    ir.even_blocks(rows, most, rows_at)
                for t in range(T_):
                    with ir.branch(chunk * T_ + t < spec.tiles), T.serial(0, rows) as r:
                        self._finish(chunk * T_ + t, part * _ROWS + r, load(acc, r, t * LANES))

    def _many_floats(self) -> None:
        g, spec, T_ = self.g, self.g.spec, self.isa.product_tiles
        whole_blocks = g.words % _BLOCK_WORDS == 0
        inputs_of_block = _BLOCK_WORDS * WORD_BITS

        def expand(tile: Any, t: int, block: Any, weights: Any, _: Any) -> None:
            words = _BLOCK_WORDS
            left = words if whole_blocks else tirx.min(tirx.const(words, "int64"), g.words - block * words)
            with T.serial(0, left) as w:
                word = block * words + w
                group = word // g.group_words
                scales = [Register("float32", self._scale(tile, group, b)) for b in range(spec.bases)]
                z = Register("float32", load(self.offset, tile, group, 0)) if g.has_offset else None
                bits = [
                    Register("uint32", self.isa.words(self.planes, (tile, word, b), self.order))
                    for b in range(spec.bases)
                ]
                for k in range(WORD_BITS):
                    bit = k % 16 // 4 * 8 + k % 4 + k // 16 * 4
                    total = None if z is None else z.value
                    for b in range(spec.bases):
                        plus = T.reinterpret("int32x16", bits[b].value << splat(31 - bit, "uint32")) < splat(0, "int32")
                        s = scales[b].value
                        value = tirx.Select(plus, s, -s)
                        total = value if total is None else total + value
                    store(weights, total, ((w * WORD_BITS + k) * T_ + t) * LANES)

        def multiply(R: int, row: Any, at: Any, block: Any, weights: Any, _: Any, acc: Any) -> None:
            sums = [[Register("float32", splat(0, "float32")) for _ in range(T_)] for _ in range(R)]
            first = block * inputs_of_block
            with T.serial(0, tirx.min(tirx.const(inputs_of_block, "int64"), spec.K - first)) as k:
                w = [Register("float32", load(weights, (k * T_ + t) * LANES)) for t in range(T_)]
                for r in range(R):
                    x = Register("float32", splat(self.x[row + r, first + k]))
                    for t in range(T_):
                        sums[r][t].add(x.value * w[t].value)
            for r in range(R):
                for t in range(T_):
                    store(acc, load(acc, at + r, t * LANES) + sums[r][t].value, at + r, t * LANES)

        self._many(_BLOCK_WORDS, "float32", expand, multiply)

    def _many_bytes(self) -> None:
        """Weights of a block in whole numbers of a common step: see docs/format.md and byte_product_kernel.h."""
        g, spec, T_ = self.g, self.g.spec, self.isa.product_tiles

        def expand(tile: Any, t: int, block: Any, weights: Any, steps: Any) -> None:
            group = block * g.block_words // g.group_words
            scales = [Register("float32", self._scale(tile, group, b)) for b in range(spec.bases)]
            most, base = Register("float32", splat(0, "float32")), Register("float32", splat(0, "float32"))
            for s in scales:
                most.add(T.abs(s.value))
                base.set(base.value - s.value)
            if g.has_offset:
                z = Register("float32", load(self.offset, tile, group, 0))
                most.add(T.abs(z.value))
                base.add(z.value)
            most.set(T.max(most.value, splat(TINY, "float32")))
            inverse = Register("float32", splat(124, "float32") / most.value)
            store(steps, most.value / splat(124, "float32"), t * LANES)
            e = Register("float32", base.value * inverse.value)
            d = []
            for s in scales:
                exact = Register("float32", (s.value + s.value) * inverse.value)
                rounded = Register("float32", T.nearbyint(exact.value))
                e.add(splat(0.5, "float32") * (exact.value - rounded.value))
                d.append(Register("int8", _four_times(rounded.value), lanes=64))
            start = Register("int8", _four_times(T.nearbyint(e.value)), lanes=64)
            with T.serial(0, tirx.const(g.block_words, "int64")) as w:
                bits = [
                    Register(
                        "uint8",
                        T.reinterpret(
                            "uint8x64", self.isa.words(self.planes, (tile, block * g.block_words + w, b), self.order)
                        ),
                        lanes=64,
                    )
                    for b in range(spec.bases)
                ]
                for bit in range(8):
                    total = start.value
                    mask = splat(1 << bit, "uint8", 64)
                    for b in range(spec.bases):
                        total = total + tirx.Select((bits[b].value & mask) == mask, d[b].value, splat(0, "int8", 64))
                    store(weights, total, ((w * 8 + bit) * T_ + t) * 64, lanes=64)

        def multiply(R: int, row: Any, at: Any, block: Any, weights: Any, steps: Any, acc: Any) -> None:
            sums = [[Register("int32", splat(0, "int32")) for _ in range(T_)] for _ in range(R)]
            inputs = g.block_words * WORD_BITS
            with T.serial(0, tirx.const(inputs // 4, "int64")) as k:
                w = [Register("int8", load(weights, (k * T_ + t) * 64, lanes=64), lanes=64) for t in range(T_)]
                for r in range(R):
                    from_ = (block * self.M + row + r) * inputs + k * 4
                    four = Register("int32", T.reinterpret("int32", load(self.codes, from_, lanes=4)), lanes=1)
                    for t in range(T_):
                        self.isa.dot(sums[r][t], w[t].value, four.value)
            for r in range(R):
                step = splat(self.steps[block * self.M + row + r])
                for t in range(T_):
                    p = T.Cast("float32x16", sums[r][t].value) * step
                    store(acc, load(acc, at + r, t * LANES) + p * load(steps, t * LANES), at + r, t * LANES)

        self._many(g.block_words, "int8", expand, multiply)


def _four_times(whole: Any) -> Any:
    """Small whole numbers in float32x16 as int8x64: each four times."""
    byte = T.Cast("int32x16", whole) & splat(255, "int32")
    return T.reinterpret("int8x64", byte * splat(0x01010101, "int32"))
