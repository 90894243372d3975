"""Pure functions on one weight matrix: W to binary bases and scales, and back.

``quantize`` works through the array API, so numpy arrays and torch tensors (on a CPU or a GPU) take the same path;
nothing here imports torch, reads or writes files, prints, or chooses a device.
"""

from __future__ import annotations

from qbb_export.quantize.matrix import quantize
from qbb_export.quantize.quantized import Quantized, dequantize
from qbb_export.quantize.recipes import RECIPES
from qbb_export.quantize.rows import MatrixRows, WeightRows
from qbb_export.quantize.settings import QuantizeSettings, RefineSettings

__all__ = [
    "RECIPES",
    "MatrixRows",
    "QuantizeSettings",
    "Quantized",
    "RefineSettings",
    "WeightRows",
    "dequantize",
    "quantize",
]
