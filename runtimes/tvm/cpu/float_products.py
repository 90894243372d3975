"""Products of floats for CPUs: by constants, of attention.

TVM's own lowering makes plain loops of these.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
import tvm
import tvm_ffi
from tvm import relax, tirx
from tvm.tirx.script.builder import ir as T

from qbb_export.runtimes.tvm.cpu import calls, ir
from qbb_export.runtimes.tvm.cpu.ir import LANES, Register, load, put, splat, store
from qbb_export.runtimes.tvm.cpu.isa import Isa

_COLUMNS: Final = 2 * LANES  # of a panel
_DOTS: Final = 8  # rows up to which a transposed matrix is read as it lies
_DOT_ROWS: Final = 4  # of them at once
_ROW_COLUMNS: Final = 4 * LANES  # of a panel that one row is multiplied with, so that sums do not wait for each other


def matmul(builder: Any, call: Any, isa: Isa) -> Any:
    """``relax.matmul`` by a constant, or of as many matrices on both sides; others stay TVM's.

    The second matrix may be a transpose that is not computed yet: it is read as it lies then.
    """
    a, b = call.args
    if not calls.is_float(a, b) or len(a.ty.shape.values) < 2 or len(b.ty.shape.values) < 2:
        return calls.default(builder, call)
    a_sizes, b_sizes = list(a.ty.shape.values), list(b.ty.shape.values)
    constant = _constant(builder, b)
    if constant is not None and constant.ndim == 2:
        return _matmul_constant(builder, call, a, constant, isa)
    equal = len(a_sizes) == len(b_sizes) and all(
        tvm_ffi.structural_equal(p, q) for p, q in zip(a_sizes[:-2], b_sizes[:-2], strict=True)
    )
    if not equal:
        return calls.default(builder, call)
    turned = _transposed(builder, b)
    function = _batched(isa, a_sizes, b_sizes, transposed=turned is not None)
    return calls.call(builder, function, "matmul", [a, b if turned is None else turned], call.ty)


def _bound(builder: Any, value: Any) -> Any:
    """What a variable stands for; any other expression as it is."""
    return builder.lookup_binding(value) if isinstance(value, relax.Var) else value


def _permuted(value: Any) -> tuple[Any, list[int]] | None:
    """What is transposed, and its axes in their new order; None if ``value`` is no transpose."""
    if not (isinstance(value, relax.Call) and value.op == tvm.ir.Op.get("relax.permute_dims")):
        return None
    rank, axes = len(value.ty.shape.values), value.attrs.axes
    return value.args[0], list(reversed(range(rank))) if axes is None else [int(axis) % rank for axis in axes]


def _transposed(builder: Any, value: Any) -> Any:
    """What ``value`` is the transpose of, the last two axes swapped; None if it is none."""
    found = _permuted(_bound(builder, value))
    rank = len(value.ty.shape.values)
    return found[0] if found is not None and found[1] == [*range(rank - 2), rank - 1, rank - 2] else None


def _constant(builder: Any, value: Any) -> Any:
    """A constant, or one transposed, as numpy's array; None for anything else."""
    value = _bound(builder, value)
    if isinstance(value, tvm.ir.GenericConst):
        return value.value.numpy()
    found = _permuted(value)
    inner = None if found is None else _constant(builder, found[0])
    return None if found is None or inner is None else np.transpose(inner, found[1])


def _multiply(
    R: int, columns: int, K: Any, x: Callable[[int, Any], Any], w: Callable[[Any, int], Any], done: Any
) -> None:
    """Sums of R rows times ``columns``, over K; ``done(r, t, sums)``."""
    parts = columns // LANES
    sums = [[Register("float32", splat(0, "float32")) for _ in range(parts)] for _ in range(R)]
    with T.serial(0, K) as k:
        weights = [Register("float32", w(k, t * LANES)) for t in range(parts)]
        for r in range(R):
            number = Register("float32", splat(x(r, k)))
            for t in range(parts):
                sums[r][t].add(number.value * weights[t].value)
    for r in range(R):
        for t in range(parts):
            done(r, t, sums[r][t].value)


def _matmul_constant(builder: Any, call: Any, a: Any, weights: Any, isa: Isa) -> Any:
    """X times a constant: its columns lie in panels, one after the other, so that memory is read in order."""
    K, N = weights.shape
    panels = -(-N // _ROW_COLUMNS)
    padded = np.zeros((K, panels * _ROW_COLUMNS), np.float32)
    padded[:, :N] = weights
    constant = relax.const(np.ascontiguousarray(padded.reshape(K, panels, _ROW_COLUMNS).transpose(1, 0, 2)))
    sizes = list(a.ty.shape.values)
    rows = calls.product(sizes[:-1])
    most = max(1, isa.product_rows * isa.product_tiles // (_ROW_COLUMNS // LANES))

    def build() -> None:
        M = T.int64()
        x = ir.parameter("x", (M, K), "float32")
        w = ir.parameter("w", (panels, K, _ROW_COLUMNS), "float32")
        y = ir.parameter("y", (M, N), "float32")
        with ir.body(), ir.loop(tirx.const(panels, "int64"), parallel=True) as panel:

            def block(R: int, first: Any) -> None:
                def done(r: int, t: int, value: Any) -> None:
                    column = panel * _ROW_COLUMNS + t * LANES
                    if N % _ROW_COLUMNS == 0:
                        store(y, value, first + r, column)
                        return
                    out = T.alloc_buffer((LANES,), "float32")
                    store(out, value, 0)
                    left = tirx.max(tirx.min(tirx.const(LANES, "int64"), N - column), tirx.const(0, "int64"))
                    with T.serial(0, left) as n:
                        put(y, out[n], first + r, column + n)

                _multiply(
                    R,
                    _ROW_COLUMNS,
                    tirx.const(K, "int64"),
                    lambda r, k: x[first + r, k],
                    lambda k, t: load(w, panel, k, t),
                    done,
                )

            ir.even_blocks(M, most, block)

    function = builder.add_func(ir.function(f"matmul_{K}_{N}", build), f"matmul_{K}_{N}")
    flat = builder.emit(relax.op.reshape(a, (rows, K))) if len(sizes) > 2 else a
    y = relax.call_tir(function, [flat, constant], out_ty=relax.TensorType((rows, N), "float32"))
    return relax.op.reshape(builder.emit(y), (*sizes[:-1], N)) if len(sizes) > 2 else y


def _batched(isa: Isa, a_sizes: list[Any], b_sizes: list[Any], *, transposed: bool) -> Any:
    """``[batch, M, K]`` times ``[batch, K, N]``. The last columns are copied and padded: all are vectors.

    A matrix that lies transposed, ``[batch, N, K]``, is multiplied row by row where X has few rows, as keys are by the
    query of one token; for more rows its columns are copied, too.
    """
    most = max(1, isa.product_rows * isa.product_tiles // (_COLUMNS // LANES))

    def build() -> None:
        names: dict[str, Any] = {}

        def size_of(size: Any, name: str) -> Any:
            return int(size) if calls.known(size) else names.setdefault(name, tirx.Var(name, "int64"))

        outer = [size_of(size, f"b{i}") for i, size in enumerate(a_sizes[:-2])]
        M, K = size_of(a_sizes[-2], "m"), size_of(a_sizes[-1] if calls.known(a_sizes[-1]) else b_sizes[-2], "k")
        N = size_of(b_sizes[-1], "n")
        a = ir.parameter("a", (*outer, M, K), "float32")
        b = ir.parameter("b", (*outer, N, K) if transposed else (*outer, K, N), "float32")
        c = ir.parameter("c", (*outer, M, N), "float32")
        batch = calls.product(outer)
        with ir.body():
            x, w, y = (
                T.decl_buffer((batch, rows, columns), "float32", data=buffer.data)
                for buffer, rows, columns in ((a, M, K), (b, N, K) if transposed else (b, K, N), (c, M, N))
            )
            wide = tirx.const(K, "int64") if isinstance(K, int) else K
            height = tirx.const(M, "int64") if isinstance(M, int) else M
            width = tirx.const(N, "int64") if isinstance(N, int) else N

            def panel_of(i: Any, panel: Any) -> None:
                column = panel * _COLUMNS

                def whole() -> None:
                    def block(R: int, first: Any) -> None:
                        _multiply(
                            R,
                            _COLUMNS,
                            wide,
                            lambda r, k: x[i, first + r, k],
                            lambda k, t: load(w, i, k, column + t),
                            lambda r, t, value: store(y, value, i, first + r, column + t * LANES),
                        )

                    ir.even_blocks(height, most, block)

                def rest() -> None:
                    left = Register("int64", width - column, lanes=1)
                    padded = T.alloc_buffer((wide * _COLUMNS,), "float32")
                    out = T.alloc_buffer((_COLUMNS,), "float32")
                    with T.serial(0, wide) as k, T.serial(0, _COLUMNS) as j:
                        zero = tirx.const(0, "float32")
                        number = w[i, column + j, k] if transposed else w[i, k, column + j]
                        put(padded, T.if_then_else(j < left.value, number, zero), k * _COLUMNS + j)

                    def block(R: int, first: Any) -> None:
                        def done(r: int, t: int, value: Any) -> None:
                            store(out, value, t * LANES)
                            if (t + 1) * LANES == _COLUMNS:
                                with T.serial(0, left.value) as j:
                                    put(y, out[j], i, first + r, column + j)

                        _multiply(
                            R,
                            _COLUMNS,
                            wide,
                            lambda r, k: x[i, first + r, k],
                            lambda k, t: load(padded, k * _COLUMNS + t),
                            done,
                        )

                    ir.even_blocks(height, most, block)

                def dots() -> None:
                    ir.even_blocks(height, _DOT_ROWS, lambda R, first: _dots(R, i, first, column, width, K, x, w, y))

                if transposed:
                    ir.if_else(height <= _DOTS, dots, rest)
                elif isinstance(N, int) and N % _COLUMNS == 0:
                    whole()
                else:
                    ir.if_else(column + _COLUMNS <= width, whole, rest)

            panels = (width + (_COLUMNS - 1)) // _COLUMNS
            with ir.loop(batch * panels, parallel=True) as task:
                panel_of(task // panels, task % panels)

    return ir.function("matmul", build)


def _dots(R: int, i: Any, first: Any, column: Any, width: Any, K: Any, x: Any, w: Any, y: Any) -> None:
    """R rows of X times a panel's columns, which are rows of ``w``."""
    with T.serial(0, tirx.min(tirx.const(_COLUMNS, "int64"), width - column)) as j:
        wide = [Register("float32", splat(0, "float32")) for _ in range(R)]
        sums = [Register("float32", tirx.const(0, "float32"), lanes=1) for _ in range(R)]

        def vector(k: Any) -> None:
            weights = Register("float32", load(w, i, column + j, k))
            for r in range(R):
                wide[r].add(load(x, i, first + r, k) * weights.value)

        def scalar(k: Any) -> None:
            for r in range(R):
                sums[r].add(x[i, first + r, k] * w[i, column + j, k])

        calls.over_row(K, vector, scalar)
        for r in range(R):
            calls.lanes_of(wide[r].value, lambda p, q: p + q, sums[r])
            put(y, sums[r].value, i, first + r, column + j)
