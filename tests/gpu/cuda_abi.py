"""The CUDA half of ``include/qbb/ops.h`` through ctypes, with PyTorch for device memory."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import numpy as np
import pytest
import torch

from tests.kernels import abi
from tests.kernels.layers import Layer

DTYPES = {torch.float32: 1, torch.float16: 10, torch.bfloat16: 16}


@functools.cache
def library() -> ctypes.CDLL:
    lib = abi.library()
    error = [ctypes.c_char_p, ctypes.c_size_t]
    void = ctypes.c_void_p
    lib.qbb_cuda_kernel_create.argtypes = [
        ctypes.POINTER(abi.Matrix),
        ctypes.c_int32,
        ctypes.c_char_p,
        ctypes.POINTER(void),
        *error,
    ]
    lib.qbb_cuda_kernel_run.argtypes = [void, ctypes.c_int32, ctypes.c_int64, void, void, void, *error]
    lib.qbb_cuda_kernel_destroy.argtypes = [void]
    return lib


def need_cuda() -> None:
    """Tests that are asked for fail where they cannot run."""
    if not torch.cuda.is_available() or not abi.library().qbb_cuda_compiled():
        pytest.fail("make test-gpu needs an NVIDIA GPU, a CUDA build of PyTorch and a library built where nvcc is")


class CudaKernel:
    """A kernel with its weights on the GPU."""

    def __init__(self, layer: Layer, mode: int = 0, arch: str | None = None) -> None:
        self.layer = layer
        matrix = abi.matrix(layer)
        self._tensors = []
        for name, array in zip(
            ("planes", "scales", "offset", "bias"), (layer.planes, layer.scales, layer.offset, layer.bias), strict=True
        ):
            self._tensors.append(torch.from_numpy(np.ascontiguousarray(array).view(np.uint8)).cuda())
            getattr(matrix, name).data = self._tensors[-1].data_ptr()
        self.handle = ctypes.c_void_p()
        wanted = None if arch is None else arch.encode()
        abi.call(library().qbb_cuda_kernel_create, ctypes.byref(matrix), mode, wanted, ctypes.byref(self.handle))

    def into(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Start y = op(x) on PyTorch's current stream."""
        stream: Any = torch.cuda.current_stream().cuda_stream
        run = library().qbb_cuda_kernel_run
        abi.call(run, self.handle, DTYPES[x.dtype], len(x), x.data_ptr(), y.data_ptr(), stream)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [M, K] to y [M, N]; y starts as NaN, so that an output that nobody wrote shows."""
        y = torch.full((len(x), self.layer.spec.N), float("nan"), dtype=x.dtype, device="cuda")
        self.into(x.contiguous(), y)
        return y

    def __del__(self) -> None:
        if getattr(self, "handle", None):
            library().qbb_cuda_kernel_destroy(self.handle)
