"""What else is heavy in a transformer, for CPUs: softmax, normalisations, activations; products: float_products.py.

TVM's own lowering makes plain loops of these. Here are functions of ours in their place, 16 lanes at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from tvm import te, tirx, topi
from tvm.tirx.script.builder import ir as T

from qbb_export.runtimes.tvm.cpu import calls, ir
from qbb_export.runtimes.tvm.cpu.float_products import matmul
from qbb_export.runtimes.tvm.cpu.ir import LANES, Register, load, put, splat, store
from qbb_export.runtimes.tvm.cpu.isa import Isa


def legalizations(isa: Isa) -> dict[str, Callable[[Any, Any], Any]]:
    """For ``relax.transform.LegalizeOps``. What a function cannot take it leaves to TVM."""
    return {
        "relax.permute_dims": lambda _, call: call,  # a product may read it as it lies; see pipeline.py
        "relax.matmul": lambda builder, call: matmul(builder, call, isa),
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
            return calls.default(builder, call)
        return builder.call_te(compute, call.args[0], primfunc_name_hint=call.op.name.split(".")[-1])

    return legalize


# Sums over the last axis.


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
    if not calls.is_float(x) or int(call.attrs.axis) not in (-1, len(x.ty.shape.values) - 1):
        return calls.default(builder, call)
    sizes = list(x.ty.shape.values)

    def build() -> None:
        shape = tuple(tirx.Var(f"n{i}", "int64") if not calls.known(s) else int(s) for i, s in enumerate(sizes))
        buffers = [ir.parameter(name, shape, "float32") for name in ("x", "y")]
        n = shape[-1]
        with ir.body():
            a, out = (calls.flat(buffer, shape) for buffer in buffers)
            with ir.loop(calls.product(shape[:-1]), parallel=True) as row:
                most = Register("float32", tirx.const(-3.0e38, "float32"), lanes=1)
                wide = Register("float32", splat(-3.0e38, "float32"))
                calls.over_row(
                    n,
                    lambda i: wide.set(T.max(load(a, row, i), wide.value)),
                    lambda i: most.set(T.max(a[row, i], most.value)),
                )
                calls.lanes_of(wide.value, T.max, most)
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

                calls.over_row(n, vector, scalar)
                calls.lanes_of(totals.value, lambda p, q: p + q, total)
                one = Register("float32", tirx.const(1, "float32") / total.value, lanes=1)
                calls.over_row(
                    n,
                    lambda i: store(out, load(out, row, i) * splat(one.value), row, i),
                    lambda i: put(out, out[row, i] * one.value, row, i),
                )

    return calls.call(builder, ir.function("softmax", build), "softmax", [x], x.ty)


def _norm(builder: Any, call: Any, *, centred: bool) -> Any:
    x, *weights = call.args
    axes = [int(axis) % len(x.ty.shape.values) for axis in call.attrs.axes]
    sizes = list(x.ty.shape.values)
    if not calls.is_float(x, *weights) or axes != [len(sizes) - 1] or not calls.known(sizes[-1]):
        return calls.default(builder, call)
    n, epsilon = int(sizes[-1]), float(call.attrs.epsilon)
    if centred and not (call.attrs.center and call.attrs.scale):
        return calls.default(builder, call)

    def build() -> None:
        shape = tuple(tirx.Var(f"n{i}", "int64") if not calls.known(s) else int(s) for i, s in enumerate(sizes))
        x_buffer = ir.parameter("x", shape, "float32")
        scale = ir.parameter("scale", (n,), "float32")
        shift = ir.parameter("shift", (n,), "float32") if centred else None
        y_buffer = ir.parameter("y", shape, "float32")
        share = tirx.const(1 / n, "float32")
        with ir.body():
            a, out = calls.flat(x_buffer, shape), calls.flat(y_buffer, shape)
            with ir.loop(calls.product(shape[:-1]), parallel=True) as row:
                mean = Register("float32", tirx.const(0, "float32"), lanes=1)
                if centred:
                    sums = Register("float32", splat(0, "float32"))
                    calls.over_row(n, lambda i: sums.add(load(a, row, i)), lambda i: mean.add(a[row, i]))
                    calls.lanes_of(sums.value, lambda p, q: p + q, mean)
                    mean.set(mean.value * share)
                variance = Register("float32", tirx.const(0, "float32"), lanes=1)
                squares = Register("float32", splat(0, "float32"))

                def vector(i: Any) -> None:
                    d = Register("float32", load(a, row, i) - splat(mean.value))
                    squares.add(d.value * d.value)

                def scalar(i: Any) -> None:
                    d = Register("float32", a[row, i] - mean.value, lanes=1)
                    variance.add(d.value * d.value)

                calls.over_row(n, vector, scalar)
                calls.lanes_of(squares.value, lambda p, q: p + q, variance)
                root = T.sqrt(variance.value * share + tirx.const(epsilon, "float32"))
                one = Register("float32", tirx.const(1, "float32") / root, lanes=1)

                def finish(i: Any) -> None:
                    y = (load(a, row, i) - splat(mean.value)) * splat(one.value) * load(scale, i)
                    store(out, y + load(shift, i) if centred else y, row, i)

                def finish_one(i: Any) -> None:
                    y = (a[row, i] - mean.value) * one.value * scale[i]
                    put(out, y + shift[i] if shift is not None else y, row, i)

                calls.over_row(n, finish, finish_one)

    name = "layer_norm" if centred else "rms_norm"
    return calls.call(builder, ir.function(name, build), name, list(call.args), x.ty)
