"""A weight matrix that is read a block of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
from array_api_compat import array_namespace, device, to_device

# Weights read at once. It bounds the memory (temporaries stay below 16 blocks of float32) and changes no result.
BLOCK: Final = 1 << 20
# A GPU has the memory, and small blocks would leave it waiting for the next kernel launch.
GPU_BLOCKS: Final = 16


@runtime_checkable
class WeightRows(Protocol):
    """A matrix ``[N, K]`` (out_features, in_features) that gives blocks of its rows when asked."""

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        ...

    def rows(self, start: int, stop: int) -> Any:
        """Rows ``start`` to ``stop`` as a float array ``[stop - start, K]`` of numpy or torch."""
        ...


class MatrixRows:
    """A float matrix of numpy or torch, ``[N, K]``, or ``[K, N]`` with ``transposed`` (as ONNX MatMul holds it).

    Only the block asked for is ever transposed, so a memory-mapped matrix stays in its file.
    """

    def __init__(self, matrix: Any, *, transposed: bool = False) -> None:
        # A torch Parameter would record every step for a backward pass.
        self._matrix = matrix.detach() if hasattr(matrix, "detach") else matrix
        self._transposed = transposed

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K); whatever the matrix has, if it has not two dimensions."""
        shape: tuple[int, int] = tuple(self._matrix.shape)
        return (shape[1], shape[0]) if self._transposed else shape

    def rows(self, start: int, stop: int) -> Any:
        """Rows ``start`` to ``stop``, ``[stop - start, K]``."""
        return self._matrix[:, start:stop].T if self._transposed else self._matrix[start:stop]


def as_rows(weights: Any) -> WeightRows:
    """A plain ``[N, K]`` matrix or anything that gives rows already, as :class:`WeightRows`."""
    return weights if isinstance(weights, WeightRows) else MatrixRows(weights)


def row_blocks(source: WeightRows) -> Iterator[tuple[int, int, Any, Any]]:
    """Blocks of rows as (start, stop, array namespace, float32 ``[stop - start, K]``).

    A value beyond float32 becomes infinite, to be refused like any other infinity.
    """
    N, K = source.shape
    height = max(1, BLOCK * device_blocks(source.rows(0, 1)) // K)
    for start in range(0, N, height):
        stop = min(N, start + height)
        block = source.rows(start, stop)
        xp = array_namespace(block)
        with np.errstate(over="ignore"):
            block = xp.astype(block, xp.float32)
        yield start, stop, xp, block


def device_blocks(array: Any) -> int:
    """How many host blocks the device of an array takes at once."""
    return 1 if str(device(array)) == "cpu" else GPU_BLOCKS


def to_host(array: Any) -> npt.NDArray[Any]:
    """A numpy array of the same values."""
    return np.asarray(to_device(array, "cpu"))
