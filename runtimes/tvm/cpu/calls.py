"""What functions of ours in place of Relax's operators have in common: sizes, rows, calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import relax, tirx
from tvm.tirx.script.builder import ir as T

from qbb_export.runtimes.tvm.cpu.ir import LANES, Register, shuffle


def default(builder: Any, call: Any) -> Any:
    """TVM's own lowering of a call."""
    return call.op.get_attr("FLegalize")(builder, call)


def is_float(*values: Any) -> bool:
    """Whether all are float32 tensors whose rank is known."""
    return all(isinstance(v.ty, relax.TensorType) and v.ty.shape is not None for v in values) and all(
        str(v.ty.dtype) == "float32" for v in values
    )


def product(sizes: Any) -> Any:
    """Of sizes, numbers or expressions, int64."""
    total: Any = tirx.const(1, "int64")
    for size in sizes:
        total = total * size
    return total


def known(size: Any) -> bool:
    """Whether a size is a number."""
    return isinstance(size, int | tirx.IntImm)


def flat(buffer: Any, shape: tuple[Any, ...]) -> Any:
    """The same memory as ``[rows, n]``."""
    return T.decl_buffer((product(shape[:-1]), shape[-1]), "float32", data=buffer.data)


def call(builder: Any, function: Any, name: str, arguments: list[Any], out: Any) -> Any:
    """A call of a function that is new to the module; ``out``: the type of its result."""
    return relax.call_tir(builder.add_func(function, name), arguments, out_ty=out)


def lanes_of(vector: Any, join: Any, out: Register) -> None:
    """Join all lanes of a vector, and what ``out`` holds, into ``out``."""
    lanes = LANES
    register = Register("float32", vector)
    while lanes > 1:
        halves = [shuffle([register.value], range(first, first + lanes // 2)) for first in (0, lanes // 2)]
        lanes //= 2
        if lanes == 1:
            out.set(join(out.value, join(*halves)))
        else:
            register = Register("float32", join(*halves), lanes=lanes)


def over_row(n: Any, vector: Callable[[Any], None], scalar: Callable[[Any], None]) -> None:
    """``vector(i)`` for whole vectors of n numbers, ``scalar(i)`` for those left over."""
    if isinstance(n, int | tirx.IntImm):
        n = int(n)
        if n >= LANES:
            with T.serial(0, tirx.const(n // LANES, "int64")) as i:
                vector(i * LANES)
        for i in range(n // LANES * LANES, n):
            scalar(tirx.const(i, "int64"))
        return
    with T.serial(0, n // LANES) as i:
        vector(i * LANES)
    with T.serial(0, n % LANES) as i:
        scalar(n // LANES * LANES + i)
