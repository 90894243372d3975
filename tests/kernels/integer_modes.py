"""The integer modes as docs/format.md defines them: whole numbers exactly, everything else in float64."""

from __future__ import annotations

import numpy as np

from qbb_export import format as fmt
from tests.kernels.layers import Layer, many_rows

INT8, INT16 = 1, 2
SEGMENT = 256  # inputs; shorter where a group ends


def segments(spec: fmt.Spec) -> list[tuple[int, int, int]]:
    """First input, end and group of each segment."""
    found, k = [], 0
    while k < spec.K:
        group = k // spec.group_size
        end = min((k // SEGMENT + 1) * SEGMENT, (group + 1) * spec.group_size, spec.K)
        found.append((k, end, group))
        k = end
    return found


def plain(layer: Layer) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Signs -1 or 1 [bases, N, K], scales [bases, N, G] and offsets [N, G] in float64."""
    offset = np.broadcast_to(layer.offset, layer.spec.offset_shape).astype(np.float32)
    words, scales, z = fmt.from_layout(layer.planes, layer.scales, np.ascontiguousarray(offset), layer.spec)
    signs = np.where(fmt.unpack_words(words, layer.spec.K), 1.0, -1.0)
    return signs, scales.astype(np.float64), z.reshape(layer.spec.N, -1).astype(np.float64)


def rounded(x: np.ndarray, largest: np.ndarray, codes: float) -> np.ndarray:
    """x times codes / largest in float32, to the nearest whole number; all 0 where the largest is tiny."""
    one = np.float32(1)
    inverse = np.where(largest >= 2.0**-100, np.float32(codes) / np.maximum(largest, np.float32(2.0**-100)), 0 * one)
    return np.rint(x.astype(np.float32) * inverse.astype(np.float32)).astype(np.int64)


def tables(layer: Layer, x: np.ndarray, mode: int) -> tuple[np.ndarray, np.ndarray]:
    """The output for few rows, and Σ of the magnitudes of all that is added in float32."""
    signs, scales, offset = plain(layer)
    y = np.zeros((len(x), layer.spec.N))
    size = np.zeros_like(y)
    for first, end, group in segments(layer.spec):
        pad = -(end - first) % 4
        part = np.pad(x[:, first:end].astype(np.float32), ((0, 0), (0, pad)))
        a = np.abs(part).reshape(len(x), -1, 4)
        quads = (a[..., 0] + a[..., 1]) + (a[..., 2] + a[..., 3])  # in float32, in this order
        largest = quads.max(axis=1, keepdims=True)
        codes = rounded(part, largest, 32512)
        step = np.where(largest >= 2.0**-100, largest.astype(np.float64) / 32512, 0)
        total = codes.sum(axis=1)[:, None]
        s = np.pad(signs[:, :, first:end], ((0, 0), (0, 0), (0, pad))).reshape(*signs.shape[:2], -1, 4).astype(np.int64)
        sums = np.einsum("bnqc,mqc->bmnq", s, codes.reshape(len(x), -1, 4))
        if mode == INT8:
            sums = (sums + 128 >> 8) * 256
        p = sums.sum(axis=-1)  # [bases, M, N]
        y += step * (np.einsum("bn,bmn->mn", scales[:, :, group], p) + total * offset[:, group])
        size += step * (np.einsum("bn,bmn->mn", np.abs(scales[:, :, group]), np.abs(p)))
        size += step * np.abs(total * offset[:, group])
    return y + layer.bias, size + np.abs(layer.bias)


def product(layer: Layer, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The int8 output for many rows, and Σ of the magnitudes of all that is added in float32."""
    signs, scales, offset = plain(layer)
    y = np.zeros((len(x), layer.spec.N))
    size = np.zeros_like(y)
    for first, end, group in segments(layer.spec):
        part = x[:, first:end].astype(np.float32)
        largest = np.abs(part).max(axis=1, keepdims=True)
        codes = rounded(part, largest, 127)
        x_step = np.where(largest >= 2.0**-100, largest.astype(np.float64) / 127, 0)
        s32, z32 = scales[:, :, group].astype(np.float32), offset[:, group].astype(np.float32)
        most, base = np.zeros_like(z32), np.zeros_like(z32)
        for s in s32:
            most, base = most + np.abs(s), base - s
        if layer.offset.size > 1 or layer.offset.item() != 0:
            most, base = most + np.abs(z32), base + z32
        most = np.maximum(most, np.float32(2.0**-100))
        inverse = np.float32(124) / most
        e = base * inverse
        d = []
        for s in s32:
            exact = (s + s) * inverse
            d.append(np.rint(exact))
            e = e + np.float32(0.5) * (exact - d[-1])
        weight = np.rint(e)[:, None] + np.einsum("bn,bnk->nk", np.stack(d), signs[:, :, first:end] > 0)
        assert np.abs(weight).max() <= 127
        p = codes @ weight.T.astype(np.int64)
        w_step = most.astype(np.float64) / 124
        y += x_step * w_step * p
        size += np.abs(x_step * w_step * p)
    return y + layer.bias, size + np.abs(layer.bias)


def expected(layer: Layer, x: np.ndarray, mode: int) -> tuple[np.ndarray, np.ndarray]:
    """The output in float64, and how far float32 may be from it: one rounding by 2^-24 for every addition, and a few
    for the steps.
    """
    spec = layer.spec
    y, size = product(layer, x) if many_rows(spec.bases, len(x), mode) and mode == INT8 else tables(layer, x, mode)
    depth = len(segments(spec)) + spec.bases + 6
    return y, 1.01 * depth * 2.0**-24 * size


def promise(layer: Layer, x: np.ndarray, mode: int) -> np.ndarray:
    """How far docs/format.md lets the mode be from exact arithmetic, float32 rounding not counted."""
    _, scales, offset = plain(layer)
    bound = np.zeros((len(x), layer.spec.N))
    for first, end, group in segments(layer.spec):
        part = np.abs(np.pad(x[:, first:end].astype(np.float64), ((0, 0), (0, -(end - first) % 4))))
        weight = np.abs(scales[:, :, group]).sum(axis=0) + np.abs(offset[:, group])
        if not many_rows(layer.spec.bases, len(x), mode):
            quads = part.reshape(len(x), -1, 4).sum(axis=-1)
            one = quads.max(axis=1) * quads.shape[1] / (250 if mode == INT8 else 16256)
            bound += one[:, None] * weight
        else:
            largest, total = part.max(axis=1), part.sum(axis=1)
            of_x = largest * (end - first) / 254
            of_w = (0.5 + layer.spec.bases / 4) / 124
            bound += (of_x + of_w * (total + of_x))[:, None] * weight
    return bound
