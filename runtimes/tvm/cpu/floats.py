"""What else is heavy in a transformer, for CPUs: products of floats, softmax, normalisations.

TVM's own lowering makes plain loops of these. Here are functions of ours in their place, 16 lanes at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
import tvm
import tvm_ffi
from tvm import relax, te, tirx, topi
from tvm.tirx.script.builder import ir as T

from qbb_export.runtimes.tvm.cpu import ir
from qbb_export.runtimes.tvm.cpu.ir import LANES, Register, load, put, shuffle, splat, store
from qbb_export.runtimes.tvm.cpu.isa import Isa

_COLUMNS: Final = 2 * LANES  # of a panel
_ROW_COLUMNS: Final = 4 * LANES  # of a panel that one row is multiplied with, so that sums do not wait for each other


def legalizations(isa: Isa) -> dict[str, Callable[[Any, Any], Any]]:
    """For ``relax.transform.LegalizeOps``. What a function cannot take it leaves to TVM."""
    return {
        "relax.matmul": lambda builder, call: _matmul(builder, call, isa),
        "relax.nn.softmax": _softmax,
        "relax.nn.layer_norm": lambda builder, call: _norm(builder, call, centred=True),
        "relax.nn.rms_norm": lambda builder, call: _norm(builder, call, centred=False),
        "relax.exp": _fast(topi.fast_exp),
        "relax.erf": _fast(topi.fast_erf),
        "relax.tanh": _fast(topi.fast_tanh),
        "relax.sigmoid": _fast(_sigmoid),
        "relax.nn.silu": _fast(lambda x: topi.multiply(x, _sigmoid(x))),
        "relax.nn.gelu": _fast(_gelu),
        "relax.nn.gelu_tanh": _fast(_gelu_tanh),
    }


def _sigmoid(x: Any) -> Any:
    return te.compute(x.shape, lambda *i: tirx.const(1, "float32") / (tirx.const(1, "float32") + _exp(-x)(*i)))


def _exp(x: Any) -> Any:
    return topi.fast_exp(x)


def _gelu(x: Any) -> Any:
    half = tirx.const(0.5, "float32")
    e = topi.fast_erf(topi.multiply(x, tirx.const(0.5**0.5, "float32")))
    return te.compute(x.shape, lambda *i: half * x(*i) * (tirx.const(1, "float32") + e(*i)))


def _gelu_tanh(x: Any) -> Any:
    a, b = tirx.const((2 / np.pi) ** 0.5, "float32"), tirx.const(0.044715, "float32")
    inner = te.compute(x.shape, lambda *i: a * (x(*i) + b * x(*i) * x(*i) * x(*i)))
    t = topi.fast_tanh(inner)
    return te.compute(x.shape, lambda *i: tirx.const(0.5, "float32") * x(*i) * (tirx.const(1, "float32") + t(*i)))


def _fast(compute: Callable[[Any], Any]) -> Callable[[Any, Any], Any]:
    """Polynomials in place of libm's functions, off by a few units in the last place: those become vectors."""

    def legalize(builder: Any, call: Any) -> Any:
        if str(call.args[0].ty.dtype) != "float32":
            return _default(builder, call)
        return builder.call_te(compute, call.args[0], primfunc_name_hint=call.op.name.split(".")[-1])

    return legalize


def _default(builder: Any, call: Any) -> Any:
    return call.op.get_attr("FLegalize")(builder, call)


def _is_float(*values: Any) -> bool:
    return all(isinstance(v.ty, relax.TensorType) and v.ty.shape is not None for v in values) and all(
        str(v.ty.dtype) == "float32" for v in values
    )


def _product(sizes: Any) -> Any:
    total: Any = tirx.const(1, "int64")
    for size in sizes:
        total = total * size
    return total


# Sums over the last axis.


def _lanes_of(vector: Any, join: Any, out: Register) -> None:
    lanes = LANES
    register = Register("float32", vector)
    while lanes > 1:
        halves = [shuffle([register.value], range(first, first + lanes // 2)) for first in (0, lanes // 2)]
        lanes //= 2
        if lanes == 1:
            out.set(join(out.value, join(*halves)))
        else:
            register = Register("float32", join(*halves), lanes=lanes)


def _over_row(n: Any, vector: Callable[[Any], None], scalar: Callable[[Any], None]) -> None:
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


def _exp_of(value: Any, lanes: int) -> Any:
    """e^x as in ``topi.fast_exp``: Cephes' expf, for vectors."""

    def c(number: float) -> Any:
        return splat(number, "float32", lanes) if lanes > 1 else tirx.const(number, "float32")

    integers = f"int32x{lanes}" if lanes > 1 else "int32"
    floats = f"float32x{lanes}" if lanes > 1 else "float32"
    x = Register("float32", T.max(T.min(value, c(88.3762626647950)), c(-88.3762626647949)), lanes)
    n = Register("float32", T.floor(x.value * c(1.44269504088896341) + c(0.5)), lanes)
    f = Register("float32", x.value - n.value * c(0.693359375) - n.value * c(-2.12194440e-4), lanes)
    y = Register("float32", c(1.9875691500e-4), lanes)
    for coefficient in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        y.set(y.value * f.value + c(coefficient))
    y.set(y.value * f.value * f.value + f.value + c(1))
    whole = T.Cast(integers, n.value)
    bias, places = (splat(k, "int32", lanes) if lanes > 1 else tirx.const(k, "int32") for k in (127, 23))
    return y.value * T.reinterpret(floats, (whole + bias) << places)


def _softmax(builder: Any, call: Any) -> Any:
    x = call.args[0]
    if not _is_float(x) or int(call.attrs.axis) not in (-1, len(x.ty.shape.values) - 1):
        return _default(builder, call)
    sizes = list(x.ty.shape.values)

    def build() -> None:
        shape = tuple(tirx.Var(f"n{i}", "int64") if not _known(s) else int(s) for i, s in enumerate(sizes))
        buffers = [ir.parameter(name, shape, "float32") for name in ("x", "y")]
        n = shape[-1]
        with ir.body():
            a, out = (_flat(buffer, shape) for buffer in buffers)
            with ir.loop(_product(shape[:-1]), parallel=True) as row:
                most = Register("float32", tirx.const(-3.0e38, "float32"), lanes=1)
                wide = Register("float32", splat(-3.0e38, "float32"))
                _over_row(
                    n,
                    lambda i: wide.set(T.max(load(a, row, i), wide.value)),
                    lambda i: most.set(T.max(a[row, i], most.value)),
                )
                _lanes_of(wide.value, T.max, most)
                total = Register("float32", tirx.const(0, "float32"), lanes=1)
                totals = Register("float32", splat(0, "float32"))

                def vector(i: Any) -> None:
                    e = Register("float32", _exp_of(load(a, row, i) - splat(most.value), LANES))
                    totals.add(e.value)
                    store(out, e.value, row, i)

                def scalar(i: Any) -> None:
                    e = Register("float32", _exp_of(a[row, i] - most.value, 1), lanes=1)
                    total.add(e.value)
                    put(out, e.value, row, i)

                _over_row(n, vector, scalar)
                _lanes_of(totals.value, lambda p, q: p + q, total)
                one = Register("float32", tirx.const(1, "float32") / total.value, lanes=1)
                _over_row(
                    n,
                    lambda i: store(out, load(out, row, i) * splat(one.value), row, i),
                    lambda i: put(out, out[row, i] * one.value, row, i),
                )

    return _call(builder, ir.function("softmax", build), "softmax", [x], x.ty)


def _norm(builder: Any, call: Any, *, centred: bool) -> Any:
    x, *weights = call.args
    axes = [int(axis) % len(x.ty.shape.values) for axis in call.attrs.axes]
    sizes = list(x.ty.shape.values)
    if not _is_float(x, *weights) or axes != [len(sizes) - 1] or not _known(sizes[-1]):
        return _default(builder, call)
    n, epsilon = int(sizes[-1]), float(call.attrs.epsilon)
    if centred and not (call.attrs.center and call.attrs.scale):
        return _default(builder, call)

    def build() -> None:
        shape = tuple(tirx.Var(f"n{i}", "int64") if not _known(s) else int(s) for i, s in enumerate(sizes))
        x_buffer = ir.parameter("x", shape, "float32")
        scale = ir.parameter("scale", (n,), "float32")
        shift = ir.parameter("shift", (n,), "float32") if centred else None
        y_buffer = ir.parameter("y", shape, "float32")
        share = tirx.const(1 / n, "float32")
        with ir.body():
            a, out = _flat(x_buffer, shape), _flat(y_buffer, shape)
            with ir.loop(_product(shape[:-1]), parallel=True) as row:
                mean = Register("float32", tirx.const(0, "float32"), lanes=1)
                if centred:
                    sums = Register("float32", splat(0, "float32"))
                    _over_row(n, lambda i: sums.add(load(a, row, i)), lambda i: mean.add(a[row, i]))
                    _lanes_of(sums.value, lambda p, q: p + q, mean)
                    mean.set(mean.value * share)
                variance = Register("float32", tirx.const(0, "float32"), lanes=1)
                squares = Register("float32", splat(0, "float32"))

                def vector(i: Any) -> None:
                    d = Register("float32", load(a, row, i) - splat(mean.value))
                    squares.add(d.value * d.value)

                def scalar(i: Any) -> None:
                    d = Register("float32", a[row, i] - mean.value, lanes=1)
                    variance.add(d.value * d.value)

                _over_row(n, vector, scalar)
                _lanes_of(squares.value, lambda p, q: p + q, variance)
                root = T.sqrt(variance.value * share + tirx.const(epsilon, "float32"))
                one = Register("float32", tirx.const(1, "float32") / root, lanes=1)

                def finish(i: Any) -> None:
                    y = (load(a, row, i) - splat(mean.value)) * splat(one.value) * load(scale, i)
                    store(out, y + load(shift, i) if centred else y, row, i)

                def finish_one(i: Any) -> None:
                    y = (a[row, i] - mean.value) * one.value * scale[i]
                    put(out, y + shift[i] if shift is not None else y, row, i)

                _over_row(n, finish, finish_one)

    name = "layer_norm" if centred else "rms_norm"
    return _call(builder, ir.function(name, build), name, list(call.args), x.ty)


def _known(size: Any) -> bool:
    return isinstance(size, int | tirx.IntImm)


def _flat(buffer: Any, shape: tuple[Any, ...]) -> Any:
    """The same memory as ``[rows, n]``."""
    return T.decl_buffer((_product(shape[:-1]), shape[-1]), "float32", data=buffer.data)


def _call(builder: Any, function: Any, name: str, arguments: list[Any], out: Any) -> Any:
    return relax.call_tir(builder.add_func(function, name), arguments, out_ty=out)


# Products.


def _matmul(builder: Any, call: Any, isa: Isa) -> Any:
    a, b = call.args
    if not _is_float(a, b) or len(a.ty.shape.values) < 2 or len(b.ty.shape.values) < 2:
        return _default(builder, call)
    a_sizes, b_sizes = list(a.ty.shape.values), list(b.ty.shape.values)
    constant = _constant(builder, b)
    if constant is not None and constant.ndim == 2:
        return _matmul_constant(builder, call, a, constant, isa)
    equal = len(a_sizes) == len(b_sizes) and all(
        tvm_ffi.structural_equal(p, q) for p, q in zip(a_sizes[:-2], b_sizes[:-2], strict=True)
    )
    if not equal:
        return _default(builder, call)
    function = _batched(isa, a_sizes, b_sizes)
    return _call(builder, function, "matmul", [a, b], call.ty)


def _constant(builder: Any, value: Any) -> Any:
    """A constant, or one transposed, as numpy's array; None for anything else."""
    if isinstance(value, relax.Var):
        value = builder.lookup_binding(value)
    if isinstance(value, tvm.ir.GenericConst):
        return value.value.numpy()
    if isinstance(value, relax.Call) and value.op == tvm.ir.Op.get("relax.permute_dims"):
        inner = _constant(builder, value.args[0])
        if inner is not None:
            axes = value.attrs.axes
            return np.transpose(inner, None if axes is None else [int(i) for i in axes])
    return None


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
    rows = _product(sizes[:-1])
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


def _batched(isa: Isa, a_sizes: list[Any], b_sizes: list[Any]) -> Any:
    """``[batch, M, K]`` times ``[batch, K, N]``. The last columns are copied and padded: all are vectors."""
    most = max(1, isa.product_rows * isa.product_tiles // (_COLUMNS // LANES))

    def build() -> None:
        names: dict[str, Any] = {}

        def size_of(size: Any, name: str) -> Any:
            return int(size) if _known(size) else names.setdefault(name, tirx.Var(name, "int64"))

        outer = [size_of(size, f"b{i}") for i, size in enumerate(a_sizes[:-2])]
        M, K = size_of(a_sizes[-2], "m"), size_of(a_sizes[-1] if _known(a_sizes[-1]) else b_sizes[-2], "k")
        N = size_of(b_sizes[-1], "n")
        a = ir.parameter("a", (*outer, M, K), "float32")
        b = ir.parameter("b", (*outer, K, N), "float32")
        c = ir.parameter("c", (*outer, M, N), "float32")
        batch = _product(outer)
        with ir.body():
            x, w, y = (
                T.decl_buffer((batch, rows, columns), "float32", data=buffer.data)
                for buffer, rows, columns in ((a, M, K), (b, K, N), (c, M, N))
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
                        put(padded, T.if_then_else(j < left.value, w[i, k, column + j], zero), k * _COLUMNS + j)

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

                if isinstance(N, int) and N % _COLUMNS == 0:
                    whole()
                else:
                    ir.if_else(column + _COLUMNS <= width, whole, rest)

            panels = (width + (_COLUMNS - 1)) // _COLUMNS
            with ir.loop(batch * panels, parallel=True) as task:
                panel_of(task // panels, task % panels)

    return ir.function("matmul", build)
