"""Rows of a float weight, read from wherever the weight lies, a block at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from qbb_export.errors import QbbError
from qbb_export.passes.linears import Linear
from qbb_export.quantize import MatrixRows


class InitializerRows:
    """A layer's weight as ``quantize.WeightRows``: rows of [out_features, in_features] in float32, made when asked for.

    The initializer may be mapped from a file, hold [in_features, out_features], or be float16; no copy of the whole is
    made for any of these.

    Args:
        linear: the layer.
        device: ``"cpu"`` gives numpy arrays, anything else PyTorch tensors on that device.

    Raises:
        QbbError: the data cannot be read.
    """

    def __init__(self, linear: Linear, device: str = "cpu") -> None:
        tensor = linear.weight.const_value
        if tensor is None:
            raise QbbError("weight has no data", where=linear.name)
        try:
            self._source = MatrixRows(tensor.numpy(), transposed=not linear.transposed)
        except (OSError, ValueError) as error:
            raise QbbError("cannot read the weight", where=linear.name, got=error) from error
        self._tensor = tensor
        self._device = device

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self._source.shape

    def rows(self, start: int, stop: int) -> Any:
        """Rows ``start`` to ``stop``, float32 ``[stop - start, in_features]``."""
        block = np.ascontiguousarray(self._source.rows(start, stop), dtype=np.float32)
        if self._device == "cpu":
            return block
        from qbb_export.module import to_device

        return to_device(block, self._device)

    def close(self) -> None:
        """Unmap the file, so that its pages do not count as ours."""
        self._source = MatrixRows(np.empty((0, 0), dtype=np.float32))
        if isinstance(self._tensor, ir.ExternalTensor):
            self._tensor.release()
