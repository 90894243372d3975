"""Format 1 of ``qbb::BinaryBasisMatMul``: names, limits, layouts and the arithmetic of sizes.

``docs/format.md`` is the specification; ``custom_ops/include/qbb/format.h`` holds the same constants for C++.
Everything here is numpy only, so that files can be packed and read without PyTorch.

Logical values of one layer, whatever the layout:

* ``signs``  bool ``[bases, N, K]``; True is +1, False is -1
* ``scales`` float16 or float32 ``[bases, N, G]``, ``G = num_groups(K, group_size)``
* ``offset`` float32 ``[N, G]`` or ``[1, 1]``
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from qbb_export.errors import QbbError

DOMAIN: Final = "qbb"
OP_TYPE: Final = "BinaryBasisMatMul"
OPSET_VERSION: Final = 1
FORMAT_VERSION: Final = 1
MAX_BASES: Final = 8

LAYOUT_ROWS: Final = 0
LAYOUT_TILED: Final = 1
LAYOUTS: Final = (LAYOUT_ROWS, LAYOUT_TILED)

# What kernels may do to activations: the node's optional attribute ``mode`` is the place in this tuple.
MODES: Final = ("exact", "int8", "int16")

WORD_BITS: Final = 32
TILE_ROWS: Final = 16

Array = npt.NDArray[Any]


def mode_number(mode: str) -> int:
    """The attribute ``mode`` for the name of one.

    Raises:
        QbbError: there is no such mode.
    """
    if mode not in MODES:
        raise QbbError("unknown mode", where="--mode", expected=" or ".join(MODES), got=mode)
    return MODES.index(mode)


@dataclass(frozen=True)
class Spec:
    """Attributes of one node. All are integers and all are required.

    Args:
        K: in_features.
        N: out_features.
        bases: number of binary matrices, 1..8.
        group_size: inputs that share a scale: K (one scale per row) or a multiple of 32 below K.
        layout: ``LAYOUT_ROWS`` or ``LAYOUT_TILED``.
        format: format version, 1.

    Raises:
        QbbError: for any other value.
    """

    K: int
    N: int
    bases: int
    group_size: int
    layout: int = LAYOUT_TILED
    format: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        if self.format != FORMAT_VERSION:
            raise QbbError(
                "unknown format version (written by a newer qbb-export?)",
                where=OP_TYPE,
                expected=FORMAT_VERSION,
                got=self.format,
            )
        if self.layout not in LAYOUTS:
            raise QbbError("unknown layout", where=OP_TYPE, expected=f"one of {LAYOUTS}", got=self.layout)
        if self.K < 1 or self.N < 1:
            raise QbbError("empty matrix", where=OP_TYPE, expected="K >= 1 and N >= 1", got=f"K={self.K}, N={self.N}")
        if not 1 <= self.bases <= MAX_BASES:
            raise QbbError("bad number of bases", where=OP_TYPE, expected=f"1..{MAX_BASES}", got=self.bases)
        grouped = self.group_size > 0 and self.group_size % WORD_BITS == 0 and self.group_size < self.K
        if not grouped and self.group_size != self.K:
            raise QbbError(
                "bad group_size",
                where=OP_TYPE,
                expected=f"K ({self.K}) or a multiple of {WORD_BITS} below it",
                got=self.group_size,
            )

    @property
    def words(self) -> int:
        """32-bit words in a row of one basis."""
        return -(-self.K // WORD_BITS)

    @property
    def groups(self) -> int:
        """Scales in a row of one basis; the last group may be shorter."""
        return -(-self.K // self.group_size)

    @property
    def tiles(self) -> int:
        """Tiles of 16 rows."""
        return -(-self.N // TILE_ROWS)

    @property
    def planes_shape(self) -> tuple[int, ...]:
        """Shape of B (uint32)."""
        if self.layout == LAYOUT_ROWS:
            return (self.bases, self.N, self.words)
        return (self.bases, self.tiles, self.words, TILE_ROWS)

    @property
    def scales_shape(self) -> tuple[int, ...]:
        """Shape of S (float16 or float32)."""
        if self.layout == LAYOUT_ROWS:
            return (self.bases, self.N, self.groups)
        return (self.bases, self.tiles, self.groups, TILE_ROWS)

    @property
    def offset_shape(self) -> tuple[int, ...]:
        """Shape of Z (float32) where it is not ``[1, 1]``."""
        return self.scales_shape[1:]


def effective_group_size(K: int, group_size: int) -> int:
    """The attribute ``group_size`` for a layer with K inputs where the user asked for ``group_size`` (0: whole rows).

    A group that would be as long as the row or longer is the row itself.
    """
    if group_size < 0 or group_size % WORD_BITS:
        raise QbbError(
            "bad group size", where="--group-size", expected=f"0 or a multiple of {WORD_BITS}", got=group_size
        )
    return K if group_size == 0 or group_size >= K else group_size


def pack_words(signs: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint32]:
    """bool ``[..., K]`` to uint32 ``[..., ceil(K/32)]``: input k is bit ``k % 32`` of word ``k // 32``; padding: 0."""
    k = signs.shape[-1]
    pad = -k % WORD_BITS
    if pad:
        signs = np.concatenate([signs, np.zeros((*signs.shape[:-1], pad), dtype=np.bool_)], axis=-1)
    packed = np.packbits(signs, axis=-1, bitorder="little")
    return packed.view("<u4").astype(np.uint32, copy=False)


def unpack_words(words: npt.NDArray[np.uint32], K: int) -> npt.NDArray[np.bool_]:
    """The inverse of :func:`pack_words`: uint32 ``[..., ceil(K/32)]`` to bool ``[..., K]``."""
    octets = np.ascontiguousarray(words).astype("<u4", copy=False).view(np.uint8)
    return np.unpackbits(octets, axis=-1, count=K, bitorder="little").astype(np.bool_)


def swizzle(words: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    """Order the bits of plain words as layout 1 wants them.

    Byte j of the result holds inputs 4j..4j+3 in its low and 16+4j..16+4j+3 in its high nibble.
    """
    w = words.astype(np.uint32, copy=False)
    out = np.zeros_like(w)
    for j in range(4):
        low = (w >> np.uint32(4 * j)) & np.uint32(15)
        high = (w >> np.uint32(16 + 4 * j)) & np.uint32(15)
        out |= (low << np.uint32(8 * j)) | (high << np.uint32(8 * j + 4))
    return out


def unswizzle(words: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    """The inverse of :func:`swizzle`."""
    w = words.astype(np.uint32, copy=False)
    out = np.zeros_like(w)
    for j in range(4):
        low = (w >> np.uint32(8 * j)) & np.uint32(15)
        high = (w >> np.uint32(8 * j + 4)) & np.uint32(15)
        out |= (low << np.uint32(4 * j)) | (high << np.uint32(16 + 4 * j))
    return out


def _tile_rows(values: Array, axis: int) -> Array:
    """``[.., N, D]`` with N at ``axis`` (the last but one) to ``[.., N/16, D, 16]``; missing rows are zero."""
    n = values.shape[axis]
    pad = -n % TILE_ROWS
    if pad:
        width = [(0, 0)] * values.ndim
        width[axis] = (0, pad)
        values = np.pad(values, width)
    shape = values.shape
    tiled = values.reshape(*shape[:axis], shape[axis] // TILE_ROWS, TILE_ROWS, shape[axis + 1])
    return np.ascontiguousarray(np.swapaxes(tiled, axis + 1, axis + 2))


def _untile_rows(values: Array, axis: int, N: int) -> Array:
    """The inverse of :func:`_tile_rows`: ``[.., N/16, D, 16]`` with the tiles at ``axis`` to ``[.., N, D]``."""
    swapped = np.swapaxes(values, axis + 1, axis + 2)
    shape = swapped.shape
    rows = swapped.reshape(*shape[:axis], shape[axis] * TILE_ROWS, shape[axis + 2])
    return np.ascontiguousarray(rows[(slice(None),) * axis + (slice(N),)])


def to_layout(
    words: npt.NDArray[np.uint32], scales: Array, offset: Array | None, spec: Spec
) -> tuple[Array, Array, Array]:
    """Bring a layer from plain rows (layout 0) into ``spec.layout``.

    Args:
        words: uint32 ``[bases, N, words]`` from :func:`pack_words`.
        scales: ``[bases, N, G]``.
        offset: float32 ``[N, G]``, or None for no offset.
        spec: attributes of the node.

    Returns:
        The initializers (B, S, Z) of the node.
    """
    rows = Spec(spec.K, spec.N, spec.bases, spec.group_size, LAYOUT_ROWS)
    for name, array, shape in (("planes", words, rows.planes_shape), ("scales", scales, rows.scales_shape)):
        if array.shape != shape:
            raise QbbError(f"wrong shape of {name}", where=OP_TYPE, expected=shape, got=array.shape)
    if offset is not None and offset.shape != rows.offset_shape:
        raise QbbError("wrong shape of offset", where=OP_TYPE, expected=rows.offset_shape, got=offset.shape)
    none = np.zeros((1, 1), dtype=np.float32)
    if spec.layout == LAYOUT_ROWS:
        return words, scales, none if offset is None else offset.astype(np.float32, copy=False)
    return (
        _tile_rows(swizzle(words), 1),
        _tile_rows(scales, 1),
        none if offset is None else _tile_rows(offset.astype(np.float32, copy=False), 0),
    )


def from_layout(planes: Array, scales: Array, offset: Array, spec: Spec) -> tuple[Array, Array, Array]:
    """The inverse of :func:`to_layout`: initializers (B, S, Z) to plain rows."""
    if spec.layout == LAYOUT_ROWS:
        return planes, scales, offset
    return (
        unswizzle(_untile_rows(planes, 1, spec.N)),
        _untile_rows(scales, 1, spec.N),
        offset if offset.shape == (1, 1) else _untile_rows(offset, 0, spec.N),
    )


def bits_per_weight(spec: Spec, *, scale_bits: int = 16, offset: bool = False) -> float:
    """Bits that the initializers B, S and Z take for each weight, scales, offset and padding counted."""
    planes = np.prod(spec.planes_shape) * WORD_BITS
    scales = np.prod(spec.scales_shape) * scale_bits
    zeros = np.prod(spec.offset_shape) * 32 if offset else 32
    return float(planes + scales + zeros) / (spec.K * spec.N)
