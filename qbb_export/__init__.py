"""Quantise models into sums of binary matrices and write them as ONNX."""

from importlib.metadata import version

__version__ = version("qbb-export")
