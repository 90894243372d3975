"""How far CUDA kernels may be from the exact result: docs/format.md, "On CUDA"."""

from __future__ import annotations

import numpy as np

from tests.kernels.layers import Layer

CHUNK = 128
FEW = 16319  # steps of the largest input where there are more than two rows of X


def cuda_bound(
    layer: Layer, x: np.ndarray, *, digits: int, half: bool, bits: int = 16, whole: bool = False, steps: int = FEW
) -> np.ndarray:
    """The bound for x float64 ``[M, K]``.

    Args:
        layer: the weights.
        x: what the kernel was given.
        digits: of the output's type.
        half: X has 16 bits, so weights may be rounded to float16, or else activations to whole steps of 128.
        bits: of those steps, with one or two rows.
        steps: of the largest input, with more rows; what not all kernels need is less.
        whole: levels, too, may be rounded to whole numbers of 16 bits, and the products of lower bytes left out.
    """
    chunks = np.pad(np.abs(x), ((0, 0), (0, -x.shape[1] % CHUNK))).reshape(len(x), -1, CHUNK)
    largest = np.repeat(chunks.max(axis=-1), CHUNK, axis=1)[:, : x.shape[1]]
    steps = steps if bits == 16 and len(x) > 2 else 2 ** (bits - 1) - 1
    total = layer.terms(largest, bias=False) / steps / 2
    if half:
        total = np.maximum(total, 2.0 ** (-10 if layer.spec.bases == 4 else -11) * layer.terms(x, bias=False))
    if whole:
        levels = layer.row_levels() / 32600
        rounded = layer.spec.bases * np.abs(x).sum(axis=1) / 2 + largest.sum(axis=1) / 2
        total += levels * rounded[:, None]
    total += layer.spec.K * 2.0**-23 * layer.terms(x)  # sums; tensor cores cut off where others round
    return total + 2.0**-digits * (np.abs(layer.exact(x)) + total) + 1e-30
