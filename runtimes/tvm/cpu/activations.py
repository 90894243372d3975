"""What is made of X before a product: tables of its sums of four, or whole numbers of 8 bits (docs/format.md#modes)."""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from qbb_export.format import WORD_BITS
from qbb_export.runtimes.tvm.cpu import ir
from qbb_export.runtimes.tvm.cpu.geometry import SEGMENT_WORDS, Geometry
from qbb_export.runtimes.tvm.cpu.ir import LANES, Register, load, put, shuffle, splat, store
from qbb_export.runtimes.tvm.cpu.isa import NIBBLES, Isa

TABLE = 128  # entries of the tables of one word
TINY = 2.0**-100  # segments below count as zero: 1 / q stays finite
_WORTH_THREADS = 1 << 15  # inputs


def float_tables(isa: Isa, g: Geometry, limit: int) -> Any:
    """PrimFunc of X ``[M, K]``; out: sums of four, float32 ``[words·rows·128]``, and sums of blocks ``[blocks·rows]``,
    where rows = min(M, limit). It does nothing for more rows than ``limit``.
    """

    def build() -> None:
        M = T.int64()
        x = ir.parameter("x", (M, g.spec.K), "float32")
        rows = tirx.min(M, tirx.const(limit, "int64"))
        tables = ir.parameter("tables", (rows * (g.words * TABLE),), "float32")
        totals = ir.parameter("totals", (rows * g.blocks,), "float32")

        def block_of_row(block: Any, m: Any) -> None:
            inputs = _inputs(g, x, m, block * g.block_words, g.block_words)
            total = Register("float32", tirx.const(0, "float32"), lanes=1)
            with T.serial(0, g.block_words) as w:
                at = ((block * g.block_words + w) * rows + m) * TABLE
                for n in range(NIBBLES):
                    first = w * WORD_BITS + n % 2 * 16 + n // 2 * 4
                    four = [splat(inputs[first + c]) for c in range(4)]
                    signed = [four[c] * T.Cast("float32x16", _signs(c)) for c in range(4)]
                    isa.store_float_table(tables, at, n, (signed[0] + signed[1]) + (signed[2] + signed[3]))
                    total.add((inputs[first] + inputs[first + 1]) + (inputs[first + 2] + inputs[first + 3]))
            put(totals, total.value, block * rows + m)

        with ir.body(), ir.branch(limit >= M):
            _for_all(g, M, block_of_row)

    return ir.function(f"float_tables_{g.spec.K}", build)


def byte_tables(g: Geometry, size: int, limit: int | None) -> Any:
    """PrimFunc of X ``[M, K]``; out: int8, and float32 steps and totals ``[blocks·M]`` of the codes.

    Up to ``limit`` rows (None: however many) the first are tables of sums, ``[words, M, size, 128]``; above, codes
    ``[blocks, M, inputs of a block]``, the inputs of a word by the bits of its four bytes.
    With ``size`` 2 there are no codes: products are those of floats.

    Args:
        g: the matrix.
        size: bytes of an entry, 1 or 2.
        limit: most rows for tables.
    """

    def build() -> None:
        M = T.int64()
        x = ir.parameter("x", (M, g.spec.K), "float32")
        codes = ir.parameter("codes", (codes_shape(g, M, size, limit),), "int8")
        steps = ir.parameter("steps", (M * g.blocks,), "float32")
        totals = ir.parameter("totals", (M * g.blocks,), "float32")

        def block_of_row(block: Any, m: Any, *, tables: bool) -> None:
            first = block * g.block_words
            start, end = _segment(g, first)
            inputs = _inputs(g, x, m, start, SEGMENT_WORDS)
            largest = Register("float32", splat(0, "float32"))
            probe = Register("float32", splat(0, "float32"))
            with T.serial(0, (end - start) * (WORD_BITS // LANES)) as i:
                size_of = Register("float32", T.abs(load(inputs, i * LANES)))
                if tables:
                    size_of.add(shuffle([size_of.value], [c ^ 1 for c in range(LANES)]))
                    size_of.add(shuffle([size_of.value], [c ^ 2 for c in range(LANES)]))
                largest.set(T.max(size_of.value, largest.value))
                probe.add(size_of.value * splat(0, "float32"))  # NaN where an input is not finite
            q = Register("float32", _across("float32", largest.value, T.max), lanes=1)
            bad = Register("float32", _across("float32", probe.value, lambda a, b: a + b), lanes=1)
            numbers = 32512.0 if tables else 127.0
            usable = tirx.all(bad.value == tirx.const(0, "float32"), q.value >= tirx.const(TINY, "float32"))
            inverse = Register("float32", tirx.const(0, "float32"), lanes=1)
            step = Register("float32", bad.value, lanes=1)
            with ir.branch(usable):
                inverse.set(tirx.const(numbers, "float32") / q.value)
                step.set(q.value / tirx.const(numbers / (256 if tables and size == 1 else 1), "float32"))
            put(steps, step.value, block * M + m)
            whole = T.alloc_buffer((g.block_words * WORD_BITS,), "int32")
            sum_of = Register("int32", splat(0, "int32"))
            with T.serial(0, g.block_words * (WORD_BITS // LANES)) as i:
                code = Register("int32", splat(0, "int32"))
                with ir.branch(inverse.value != tirx.const(0, "float32")):
                    scaled = load(inputs, (first - start) * WORD_BITS + i * LANES) * splat(inverse.value)
                    code.set(T.Cast("int32x16", T.nearbyint(scaled)))
                sum_of.add(code.value)
                store(whole, code.value, i * LANES)
            total = T.Cast("float32", _across("int32", sum_of.value, lambda a, b: a + b))
            if tables and size == 1:
                total = total * tirx.const(2.0**-8, "float32")
            put(totals, total, block * M + m)
            if tables:
                _store_tables(codes, whole, first, m, M, size, g.block_words)
            else:
                _store_codes(codes, whole, (block * M + m) * (g.block_words * WORD_BITS), g.block_words)

        def few() -> None:
            _for_all(g, M, lambda block, m: block_of_row(block, m, tables=True))

        def many() -> None:
            if size == 1:
                _for_all(g, M, lambda block, m: block_of_row(block, m, tables=False))

        with ir.body():
            if limit is None:
                few()
            else:
                ir.if_else(limit >= M, few, many)

    return ir.function(f"byte_tables_{g.spec.K}", build)


def codes_shape(g: Geometry, M: Any, size: int, limit: int | None) -> Any:
    """Bytes that :func:`byte_tables` fills for M rows."""
    if limit is None:
        return M * (g.words * TABLE * size)
    few = tirx.min(M, tirx.const(limit, "int64")) * (g.words * TABLE * size)
    return tirx.max(few, M * (g.words * WORD_BITS)) if size == 1 else few


def _signs(c: int) -> Any:
    """-1 or 1: the sign of input c in the 16 sums, by bit c of an entry's number."""
    return ir.interleaved([1 if entry >> c & 1 else -1 for entry in range(16)])


def _for_all(g: Geometry, M: Any, emit: Any) -> None:
    """``emit(block, row)`` for all, on several threads where it is worth it."""

    def loops(parallel: bool) -> None:
        with ir.loop(g.blocks, parallel=parallel) as block, T.serial(0, M) as m:
            emit(T.Cast("int64", block), m)

    ir.if_else(M * g.spec.K >= _WORTH_THREADS, lambda: loops(True), lambda: loops(False))


def _inputs(g: Geometry, x: Any, m: Any, first: Any, words: int) -> Any:
    """``words`` words of a row of X from ``first`` on in memory of their own, 0 past K."""
    K = g.spec.K
    inputs = T.alloc_buffer((words * WORD_BITS,), "float32")

    def copy_all() -> None:
        with T.serial(0, words * (WORD_BITS // LANES)) as i:
            store(inputs, load(x, m, first * WORD_BITS + i * LANES), i * LANES)

    def copy_some() -> None:
        with T.serial(0, words * WORD_BITS) as i:
            k = first * WORD_BITS + i
            put(inputs, T.if_then_else(k < K, x[m, k], tirx.const(0, "float32")), i)

    ir.if_else((first + words) * WORD_BITS <= K, copy_all, copy_some)
    return inputs


def _segment(g: Geometry, word: Any) -> tuple[Any, Any]:
    """First word and end of the segment that a word is in."""
    eight, group = tirx.const(SEGMENT_WORDS, "int64"), tirx.const(g.group_words, "int64")
    start = tirx.max(word // eight * eight, word // group * group)
    end = tirx.min((word // eight + 1) * eight, (word // group + 1) * group)
    return start, tirx.min(end, tirx.const(g.words, "int64"))


def _across(dtype: str, vector: Any, join: Any) -> Any:
    """One number of 16."""
    lanes = LANES
    register = Register(dtype, vector)
    while lanes > 1:
        halves = [shuffle([register.value], range(first, first + lanes // 2)) for first in (0, lanes // 2)]
        if lanes == 2:
            return join(*halves)
        lanes //= 2
        register = Register(dtype, join(*halves), lanes=lanes)
    raise AssertionError


def _store_tables(codes: Any, whole: Any, first: Any, m: Any, M: Any, size: int, words: int) -> None:
    """Sums of four whole numbers, as one byte (rounded) or two."""
    with T.serial(0, words) as w:
        at = ((first + w) * M + m) * (size * TABLE)
        for quad in range(NIBBLES):
            first_input = w * WORD_BITS + quad * 4
            signed = [splat(T.Cast("int16", whole[first_input + c])) * T.Cast("int16x16", _signs(c)) for c in range(4)]
            t = Register("int16", (signed[0] + signed[1]) + (signed[2] + signed[3]))
            top = t.value + splat(128, "int16") if size == 1 else t.value
            store(codes, T.Cast("int8x16", top >> splat(8, "int16")), at + quad * 16)
            if size == 2:
                store(codes, T.Cast("int8x16", t.value), at + (TABLE + quad * 16))


def _store_codes(codes: Any, whole: Any, at: Any, words: int) -> None:
    """Whole numbers of 8 bits; of 16 inputs first those of bit 0 of the four bytes, then of bit 1, ..."""
    by_bit = [c % 4 * 4 + c // 4 for c in range(LANES)]
    with T.serial(0, words * (WORD_BITS // LANES)) as i:
        store(codes, T.Cast("int8x16", shuffle([load(whole, i * LANES)], by_bit)), at + i * LANES)
