"""Small words for writing kernels with TVM's IR builder: registers, vectors of 16 lanes, loops over blocks of rows.

Kernels are plain Python that runs while a function is built; what stays a loop in the result says so with ``T``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import contextmanager
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.target import codegen
from tvm.tirx.script.builder import ir as T

from qbb_export.format import TILE_ROWS

LANES = TILE_ROWS


class Register:
    """A variable that LLVM keeps in registers: a vector of numbers, on the stack only in name."""

    def __init__(self, dtype: str, start: Any = None, lanes: int = LANES) -> None:
        self.lanes = lanes
        self._buffer = T.alloc_buffer((lanes,), dtype)
        if start is not None:
            self.set(start)

    @property
    def value(self) -> Any:
        """What it holds, as an expression."""
        return self._buffer[T.ramp(0, 1, self.lanes)] if self.lanes > 1 else self._buffer[0]

    def set(self, value: Any) -> None:
        """Give it another value."""
        T.buffer_store(self._buffer, value, [T.ramp(0, 1, self.lanes) if self.lanes > 1 else 0])

    def add(self, value: Any) -> None:
        """Add to it."""
        self.set(self.value + value)


def splat(value: Any, dtype: str | None = None, lanes: int = LANES) -> Any:
    """A number in all lanes."""
    return T.broadcast(value if dtype is None else tirx.const(value, dtype), lanes)


def load(buffer: Any, *at: Any, lanes: int = LANES) -> Any:
    """Neighbours along the last axis as a vector."""
    *outer, inner = at
    return buffer[(*outer, T.ramp(inner, 1, lanes))]


def store(buffer: Any, value: Any, *at: Any, lanes: int = LANES) -> None:
    """The opposite of :func:`load`."""
    *outer, inner = at
    T.buffer_store(buffer, value, [*outer, T.ramp(inner, 1, lanes)])


def put(buffer: Any, value: Any, *at: Any) -> None:
    """Store one number."""
    T.buffer_store(buffer, value, list(at))


def intrinsic(name: str, dtype: str, *arguments: Any) -> Any:
    """One of LLVM's functions without side effects."""
    return tirx.call_llvm_pure_intrin(dtype, codegen.llvm_lookup_intrinsic_id(name), *arguments)


def shuffle(vectors: Iterable[Any], order: Iterable[int]) -> Any:
    """Elements of vectors side by side, by their places."""
    return tirx.Shuffle(list(vectors), [tirx.const(i, "int32") for i in order])


def interleaved(ones: list[int]) -> Any:
    """A constant vector of small numbers as int32."""
    return tirx.Shuffle([tirx.const(i, "int32") for i in ones], [tirx.const(i, "int32") for i in range(len(ones))])


def fma(a: Any, b: Any, c: Any) -> Any:
    """a·b + c, rounded once where the machine can."""
    return a * b + c  # LLVM is told to fuse (TVM's default)


@contextmanager
def branch(condition: Any) -> Any:
    """What follows happens only if."""
    with T.If(condition), T.Then():
        yield


def if_else(condition: Any, then: Callable[[], None], otherwise: Callable[[], None]) -> None:
    """Emit both."""
    with T.If(condition):
        with T.Then():
            then()
        with T.Else():
            otherwise()


def row_blocks(rows: Any, most: int, emit: Callable[[int, Any], None]) -> None:
    """Emit ``emit(R, first)`` for blocks of rows: as many as possible of ``most``, a power of two, then halves."""
    count = most
    with T.serial(0, rows // most) as i:
        emit(most, i * most)
    while count > 1:
        count //= 2
        with branch(rows % (2 * count) >= count):
            emit(count, rows // (2 * count) * (2 * count))


def even_blocks(rows: Any, most: int, emit: Callable[[int, Any], None]) -> None:
    """Emit ``emit(R, first)`` for blocks of rows that are as even as can be, none above ``most``."""
    blocks = Register("int64", (rows + (most - 1)) // most, lanes=1)
    with T.serial(0, blocks.value) as i:
        first = Register("int64", i * rows // blocks.value, lanes=1)
        count = Register("int64", (i + 1) * rows // blocks.value - first.value, lanes=1)
        for R in range(1, most + 1):
            with branch(count.value == R):
                emit(R, first.value)


def function(name: str, build: Callable[[], None]) -> Any:
    """A PrimFunc whose parameters and body ``build`` emits; Relax's passes leave it as it is."""
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name(name)
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8})
        build()
    return builder.get().without_attr("global_symbol")


def parameter(name: str, shape: tuple[Any, ...], dtype: str) -> Any:
    """One buffer of a function."""
    return T.match_buffer(T.arg(name, T.handle()), shape, dtype)


@contextmanager
def body() -> Any:
    """What follows the parameters. Relax wants a block around it, but nothing to be known of what it reads."""
    with T.sblock("root"):
        T.reads()
        T.writes()
        yield


def loop(extent: Any, *, parallel: Any = False) -> Any:
    """A loop, over threads if so."""
    return T.parallel(0, extent) if parallel else T.serial(0, extent)
