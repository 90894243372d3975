"""``include/qbb/ops.h`` through ctypes: whole sweeps in seconds, without ONNX Runtime in between."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import numpy as np

from qbb_export.custom_ops import library_info, library_path
from tests.kernels.layers import Layer

DTYPES = {np.dtype(np.float32): 1, np.dtype(np.float16): 10, np.dtype(np.uint32): 12}
OK, INVALID, UNSUPPORTED = 0, 1, 2


class Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("dims", ctypes.POINTER(ctypes.c_int64)),
        ("rank", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
    ]


class Matrix(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("K", "N", "bases", "group_size", "layout", "format")] + [
        (name, Tensor) for name in ("planes", "scales", "offset", "bias")
    ]


class Failed(Exception):
    """A status other than QBB_OK, with its text."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


@functools.cache
def library() -> ctypes.CDLL:
    lib = ctypes.CDLL(str(library_path()))
    error = [ctypes.c_char_p, ctypes.c_size_t]
    void = ctypes.c_void_p
    lib.qbb_matrix_validate.argtypes = [ctypes.POINTER(Matrix), *error]
    lib.qbb_kernel_create.argtypes = [
        ctypes.POINTER(Matrix),
        ctypes.c_int32,
        ctypes.c_char_p,
        ctypes.POINTER(void),
        *error,
    ]
    lib.qbb_kernel_run.argtypes = [void, ctypes.c_int32, ctypes.c_int64, void, void, void, void, *error]
    lib.qbb_kernel_destroy.argtypes = [void]
    lib.qbb_kernel_isa.argtypes = [void]
    lib.qbb_kernel_isa.restype = ctypes.c_char_p
    return lib


def isas() -> list[str]:
    """Every instruction set that this CPU can run; all of them are tested."""
    return [name for name, available in library_info().isas.items() if available]


def call(function: Any, *args: Any) -> None:
    error = ctypes.create_string_buffer(512)
    status = function(*args, error, len(error))
    if status != OK:
        raise Failed(status, error.value.decode())


def tensor(array: np.ndarray) -> Tensor:
    assert array.flags.c_contiguous
    dims = (ctypes.c_int64 * array.ndim)(*array.shape)
    return Tensor(array.ctypes.data, dims, array.ndim, DTYPES[array.dtype])


def matrix(layer: Layer, **changes: int) -> Matrix:
    s = layer.spec
    attributes = {"K": s.K, "N": s.N, "bases": s.bases, "group_size": s.group_size, "layout": s.layout}
    attributes |= {"format": s.format} | changes
    tensors = (tensor(a) for a in (layer.planes, layer.scales, layer.offset, layer.bias))
    result = Matrix(*attributes.values(), *tensors)
    result.layer = layer  # keeps the arrays alive
    return result


class Kernel:
    """A kernel of the library. Keeps the arrays alive that it reads in place."""

    def __init__(self, layer: Layer, isa: str | None = None, mode: int = 0) -> None:
        self.layer = layer
        self.handle = ctypes.c_void_p()
        name = None if isa is None else isa.encode()
        call(library().qbb_kernel_create, ctypes.byref(matrix(layer)), mode, name, ctypes.byref(self.handle))

    @property
    def isa(self) -> str:
        return library().qbb_kernel_isa(self.handle).decode()

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """x [M, K] to y [M, N]; y starts as NaN, so that an output that nobody wrote shows."""
        assert x.flags.c_contiguous and x.shape[1] == self.layer.spec.K
        y = np.full((x.shape[0], self.layer.spec.N), np.nan, dtype=x.dtype)
        run = library().qbb_kernel_run
        call(run, self.handle, DTYPES[x.dtype], x.shape[0], x.ctypes.data, y.ctypes.data, None, None)
        return y

    def __del__(self) -> None:
        if getattr(self, "handle", None):
            library().qbb_kernel_destroy(self.handle)
