"""The result of quantizing one matrix, and the way back to floats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qbb_export.format import LAYOUT_ROWS, Spec, unpack_words


@dataclass(frozen=True, eq=False)
class Quantized:
    """One matrix ``[N, K]`` as ``sum_b scales[b] * signs[b] + offset`` (plain rows, layout 0; numpy, on the host).

    Args:
        spec: K, N, bases, and the group_size in force (K where there is one group a row).
        words: uint32 ``[bases, N, ceil(K/32)]``, packed by :func:`qbb_export.format.pack_words`.
        scales: float16 or float32 ``[bases, N, G]``.
        offset: float32 ``[N, G]``, or None.
        errors: squared error relative to the squared norm of the weights: as the recipe went on, and last of what is
            stored.
    """

    spec: Spec
    words: npt.NDArray[np.uint32]
    scales: npt.NDArray[Any]
    offset: npt.NDArray[np.float32] | None
    errors: tuple[float, ...]

    @property
    def relative_error(self) -> float:
        """Squared error of what is stored, relative to the squared norm of the weights."""
        return self.errors[-1]


def rows_spec(N: int, K: int, bases: int, group_size: int) -> Spec:
    """The spec of plain rows."""
    return Spec(K, N, bases, group_size, LAYOUT_ROWS)


def dequantize(q: Quantized, start: int = 0, stop: int | None = None) -> npt.NDArray[np.float32]:
    """Rows ``start`` to ``stop`` of the matrix that ``q`` stands for, float32 ``[stop - start, K]``.

    The bases are added in their order, then the offset, all in float32.
    """
    stop = q.spec.N if stop is None else stop
    group = np.arange(q.spec.K) // q.spec.group_size
    out = np.zeros((stop - start, q.spec.K), dtype=np.float32)
    for words, scales in zip(q.words, q.scales, strict=True):
        scale = scales[start:stop].astype(np.float32)[:, group]
        out += np.where(unpack_words(words[start:stop], q.spec.K), scale, -scale)
    if q.offset is not None:
        out += q.offset[start:stop, group]
    return out
