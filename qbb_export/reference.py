"""The operator in numpy float64: what every other implementation is held against."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from qbb_export.errors import QbbError
from qbb_export.format import OP_TYPE, Spec, from_layout, unpack_words

Array = npt.NDArray[Any]


def dense_weight(planes: Array, scales: Array, offset: Array, spec: Spec) -> npt.NDArray[np.float64]:
    """The matrix that a node stands for: W[n,k] = Σ_b S[b,n,g(k)]·sign(b,n,k) + Z[n,g(k)].

    Args:
        planes: B, uint32 ``spec.planes_shape``.
        scales: S, float16 or float32 ``spec.scales_shape``.
        offset: Z, float32 ``spec.offset_shape`` or ``[1, 1]``.
        spec: attributes of the node.

    Returns:
        float64 ``[N, K]`` (out_features, in_features).
    """
    words, row_scales, row_offset = from_layout(planes, scales, offset, spec)
    group_of_input = np.arange(spec.K) // spec.group_size
    per_group = np.broadcast_to(row_offset.astype(np.float64), (spec.N, spec.groups))
    weight = per_group[:, group_of_input].copy()
    for basis in range(spec.bases):
        signs = np.where(unpack_words(words[basis], spec.K), 1.0, -1.0)
        weight += signs * row_scales[basis].astype(np.float64)[:, group_of_input]
    return weight


def binary_basis_matmul(x: Array, planes: Array, scales: Array, offset: Array, bias: Array, spec: Spec) -> Array:
    """``qbb::BinaryBasisMatMul`` as ``docs/format.md`` defines it, summed in float64.

    Args:
        x: float16, float32 or float64 ``[..., K]``.
        planes, scales, offset: as in :func:`dense_weight`.
        bias: C, float32 ``[N]`` or ``[1]``.
        spec: attributes of the node.

    Returns:
        ``[..., N]`` in the type of x.

    Raises:
        QbbError: an input whose shape does not fit the attributes.
    """
    expected: dict[str, tuple[Array, tuple[tuple[int, ...], ...]]] = {
        "planes": (planes, (spec.planes_shape,)),
        "scales": (scales, (spec.scales_shape,)),
        "offset": (offset, (spec.offset_shape, (1, 1))),
        "bias": (bias, ((spec.N,), (1,))),
    }
    for name, (array, shapes) in expected.items():
        if array.shape not in shapes:
            raise QbbError(f"wrong shape of {name}", where=OP_TYPE, expected=shapes[0], got=array.shape)
    if x.ndim < 1 or x.shape[-1] != spec.K:
        raise QbbError("wrong shape of X", where=OP_TYPE, expected=f"[..., {spec.K}]", got=x.shape)
    weight = dense_weight(planes, scales, offset, spec)
    result = x.astype(np.float64) @ weight.T + bias.astype(np.float64)
    return result.astype(x.dtype)
