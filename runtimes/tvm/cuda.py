"""TVM's CUDA part where there is no GPU: machine code for GPUs elsewhere, by nvcc.

TVM's wheel makes machine code only if its CUDA runtime loads, and that wants the driver's ``libcuda.so.1``. Without one
the source would be written, and compiled wherever it is loaded. So a library that has the driver's names, and nothing
behind them, stands in for it, in this process only.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Final

import tvm
import tvm_ffi

from qbb_export.errors import QbbError

_CREATE: Final = "ffi.Module.create.cuda"  # registered by TVM's CUDA runtime
_DRIVER: Final = (  # what that runtime takes from libcuda.so.1
    *("cuDeviceGetName", "cuFuncSetAttribute", "cuGetErrorName", "cuGetErrorString", "cuLaunchKernelEx"),
    *("cuModuleGetFunction", "cuModuleLoadData", "cuModuleUnload", "cuTensorMapEncodeTiled"),
)


def use_nvcc() -> None:
    """Let TVM compile with nvcc from here on.

    Raises:
        QbbError: TVM's CUDA runtime does not load.
    """
    os.environ.setdefault("TVM_CUDA_COMPILE_MODE", "nvcc")
    # Its fast sin and cos are off by far more than a rounding for the large angles of rotary embeddings.
    os.environ.setdefault("TVM_CUDA_NVCC_NO_FAST_MATH", "1")
    if tvm_ffi.get_global_func(_CREATE, allow_missing=True) is not None:
        return
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        _load_stand_in()
    library = Path(tvm.__file__).parent / "lib/libtvm_runtime_cuda.so"
    try:
        ctypes.CDLL(str(library))
    except OSError as error:
        needs = "libcudart.so.13 of CUDA 13, in the loader's path"
        raise QbbError("TVM's CUDA runtime does not load", where=library, expected=needs, got=error) from error


def _load_stand_in() -> None:
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "driver.c", Path(folder) / "libcuda.so.1"
        source.write_text("".join(f"int {name}(void) {{ return 100; }}\n" for name in _DRIVER))  # 100: no device
        compiler = shutil.which("gcc") or "g++"
        flags = ["-shared", "-fPIC", "-Wl,-soname,libcuda.so.1"]
        subprocess.run([compiler, *flags, "-o", str(library), str(source)], check=True)
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
