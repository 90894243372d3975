"""ONNX Runtime's fused operators of decoders, taken apart into Relax's.

Shapes: B sequences, S new tokens, P tokens in the cache, T = P + S; H heads of D numbers, L for keys and values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
from tvm import relax, te, tirx

from qbb_export.errors import QbbError

_HIDDEN: Final = -3.0e38  # a score that softmax makes 0


def _sizes(value: Any) -> list[Any]:
    return list(value.ty.shape.values)


def _unsupported(what: str, got: object) -> QbbError:
    return QbbError("cannot be compiled", where=what, got=got)


def _flag(attributes: dict[str, Any], name: str, default: Any) -> Any:
    value = attributes.get(name, default)
    return default if value is None else value


def _attention(builder: Any, inputs: Any, attributes: dict[str, Any], _: Any) -> Any:
    """``GroupQueryAttention``: rotates, appends to the cache, attends to all tokens up to the own one.

    All sequences of a batch must be equally long: padding in ``attention_mask`` is not looked at.
    """
    given = [*inputs] + [None] * 14
    query, key, value, past_key, past_value, _lengths, _total, cos, sin, positions, bias, sink = given[:12]
    what = "GroupQueryAttention"
    H, L = int(attributes["num_heads"]), int(attributes["kv_num_heads"])
    if float(_flag(attributes, "softcap", 0.0)) != 0:
        raise _unsupported(what, "softcap")
    for name, present in {"attention_bias": bias, "head_sink": sink, "position_ids": positions}.items():
        if present is not None:
            raise _unsupported(what, name)
    if past_key is None or past_value is None:
        raise _unsupported(what, "no cache")
    B, S, _width = _sizes(query)
    P, D = _sizes(past_key)[2:]
    window = int(_flag(attributes, "local_window_size", -1))
    scale = float(_flag(attributes, "scale", 0.0)) or float(int(D)) ** -0.5
    if key is None:
        packed, starts = [query] * 3, (0, H, H + L)
    else:
        packed, starts = [query, key, value], (0, 0, 0)
    turned = bool(int(_flag(attributes, "do_rotary", 0)))
    interleaved = bool(int(_flag(attributes, "rotary_interleaved", 0)))
    heads = []
    for source, first, count, turn in zip(packed, starts, (H, L, L), (turned, turned, False), strict=True):
        tables = (cos, sin) if turn else ()
        heads.append(_heads(builder, source, first, count, int(D), P, tables, interleaved))
    q, new_key, new_value = heads
    present_key = builder.normalize(relax.op.concat([past_key, new_key], axis=2))
    present_value = builder.normalize(relax.op.concat([past_value, new_value], axis=2))
    T = _sizes(present_key)[2]
    shared = H // L
    q = builder.emit(relax.op.reshape(q, (B, L, shared * S, D)))
    scores = builder.emit(relax.op.matmul(q, builder.emit(relax.op.permute_dims(present_key, [0, 1, 3, 2]))))
    scores = builder.emit(relax.op.reshape(scores, (B, L, shared, S, T)))
    scores = builder.emit_te(_masked, scores, scale, P, window, primfunc_name_hint="masked")
    scores = builder.emit(relax.op.reshape(scores, (B, L, shared * S, T)))
    y = builder.emit(relax.op.matmul(builder.emit(relax.op.nn.softmax(scores, -1)), present_value))
    y = builder.emit(relax.op.reshape(y, (B, H, S, D)))
    y = builder.emit(relax.op.permute_dims(y, [0, 2, 1, 3]))
    return relax.Tuple([builder.emit(relax.op.reshape(y, (B, S, H * int(D)))), present_key, present_value])


def _masked(scores: Any, scale: float, P: Any, window: int) -> Any:
    """Scores times scale; those of tokens behind the own one, or outside the window, hidden."""

    def compute(b: Any, h: Any, g: Any, s: Any, t: Any) -> Any:
        own = P + s
        visible = t <= own
        if window > 0:
            visible = tirx.all(visible, t > own - window)
        value = scores[b, h, g, s, t] * tirx.const(scale, "float32")
        return tirx.Select(visible, value, tirx.const(_HIDDEN, "float32"))

    return te.compute(scores.shape, compute, name="masked")


def _heads(
    builder: Any, source: Any, first: int, count: int, D: int, P: Any, tables: tuple[Any, ...], interleaved: bool
) -> Any:
    """``[B, count, S, D]`` of heads from ``first`` on in ``[B, S, heads·D]``, by tables ``[positions, pairs]``."""

    def compute(x: Any, P: Any, *angles: Any) -> Any:
        B, S = x.shape[:2]

        def at(b: Any, h: Any, s: Any, d: Any) -> Any:
            own = x[b, s, (h + first) * D + d]
            if not angles:
                return own
            cos, sin = angles
            pairs = int(cos.shape[1])
            if interleaved:
                pair, lower, other = d // 2, d % 2 == 0, tirx.if_then_else(d % 2 == 0, d + 1, d - 1)
            else:
                lower = d < pairs
                pair = tirx.if_then_else(lower, d, d - pairs)
                other = tirx.if_then_else(lower, d + pairs, d - pairs)
            inside = d < 2 * pairs
            pair, other = tirx.if_then_else(inside, pair, 0), tirx.if_then_else(inside, other, 0)
            sign = tirx.Select(lower, tirx.const(-1, "float32"), tirx.const(1, "float32"))
            turned = own * cos[P + s, pair] + sign * x[b, s, (h + first) * D + other] * sin[P + s, pair]
            return turned if 2 * pairs == D else tirx.if_then_else(inside, turned, own)

        return te.compute((B, count, S, D), at, name="heads")

    return builder.emit_te(compute, source, P, *tables, primfunc_name_hint="heads")


def _simplified_norm(builder: Any, inputs: Any, attributes: dict[str, Any], _: Any) -> Any:
    """``SimplifiedLayerNormalization``: by the root mean square."""
    x, scale = inputs[0], inputs[1]
    y = builder.emit(relax.op.nn.rms_norm(x, scale, axes=[-1], epsilon=float(_flag(attributes, "epsilon", 1e-5))))
    return relax.Tuple([y, relax.const(0.0, "float32")])


def _skip_norm(builder: Any, inputs: Any, attributes: dict[str, Any], _: Any, *, simplified: bool) -> Any:
    """``Skip(Simplified)LayerNormalization``: of a sum, which is the fourth output."""
    given = [*inputs] + [None] * 5
    x, skip, scale = given[:3]
    shift, bias = (None, given[3]) if simplified else given[3:5]
    total = builder.emit(relax.op.add(x, skip))
    if bias is not None:
        total = builder.emit(relax.op.add(total, bias))
    epsilon = float(_flag(attributes, "epsilon", 1e-5 if simplified else 1e-12))
    if simplified:
        y = relax.op.nn.rms_norm(total, scale, axes=[-1], epsilon=epsilon)
    else:
        if shift is None:
            shift = relax.const(np.zeros(_sizes(scale)[0].value, np.float32))
        y = relax.op.nn.layer_norm(total, scale, shift, axes=[-1], epsilon=epsilon)
    nothing = relax.const(0.0, "float32")
    return relax.Tuple([builder.emit(y), nothing, nothing, total])


def _quick_gelu(builder: Any, inputs: Any, attributes: dict[str, Any], _: Any) -> Any:
    x = inputs[0]
    alpha = relax.const(float(_flag(attributes, "alpha", 1.702)), "float32")
    gate = builder.emit(relax.op.sigmoid(builder.emit(relax.op.multiply(x, alpha))))
    return relax.op.multiply(x, gate)


def _fast_gelu(builder: Any, inputs: Any, _: dict[str, Any], __: Any) -> Any:
    x = inputs[0]
    if len(inputs) > 1 and inputs[1] is not None:
        x = builder.emit(relax.op.add(x, inputs[1]))
    return relax.op.nn.gelu_tanh(x)


CONVERTERS: Final[dict[str, Callable[..., Any]]] = {
    "GroupQueryAttention": _attention,
    "SimplifiedLayerNormalization": _simplified_norm,
    "SkipSimplifiedLayerNormalization": lambda *a: _skip_norm(*a, simplified=True),
    "SkipLayerNormalization": lambda *a: _skip_norm(*a, simplified=False),
    "QuickGelu": _quick_gelu,
    "FastGelu": _fast_gelu,
}
