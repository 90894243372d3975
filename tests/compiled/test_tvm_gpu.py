"""Kernels that TVM writes for GPUs, where there is none: CUDA's source on the CPU, each thread a fiber."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

tvm = pytest.importorskip("tvm", reason="TVM was NOT tested: pip install 'qbb-export[tvm]'")

from tests.compiled.gpu_sources import Sources, arrays, compile_product  # noqa: E402
from tests.kernels.layers import Layer, make_layer, with_garbage  # noqa: E402

ROOT = Path(__file__).parents[2]
CXX = shutil.which("g++") or shutil.which("clang++")
CUDA_HEADERS = next((p for p in Path("/usr/local").glob("cuda*/include") if (p / "cuda.h").is_file()), None)


def emulated(sources: Sources, folder: Path) -> ctypes.CDLL:
    """CUDA's source as a library for this machine."""
    (folder / "source.cuh").write_text(sources.source)
    calls = ""
    for kernel in sources.kernels:
        values = ", ".join(a if a == "M" else f"({_C_TYPES[a]}){a}" for a in kernel.arguments)
        run = f"return emulate::run(dim3(gx, gy), threads, 0, [=] {{ {kernel.name}({values}); }});"
        calls += f'extern "C" bool run_{kernel.launch.rows}({_C_ARGUMENTS}) {{ {run} }}\n'
    (folder / "all.cc").write_text(f'#include "{ROOT}/tests/compiled/cuda_source.cc"\n{calls}')
    assert CXX and CUDA_HEADERS
    include = [f"-I{p}" for p in (ROOT / "tests/native/cuda_on_cpu", CUDA_HEADERS)]
    command = [CXX, "-std=c++17", "-O1", "-w", "-fPIC", "-shared", f'-DSOURCE="{folder}/source.cuh"', *include]
    subprocess.run([*command, "-o", str(folder / "all.so"), str(folder / "all.cc")], check=True)
    return ctypes.CDLL(str(folder / "all.so"))


_C_TYPES = {"planes": "uint*", "scales": "half*", "z": "float*", "bias": "float*", "x": "float*", "y": "float*"}
_C_ARGUMENTS = ", ".join(f"void* {name}" for name in _C_TYPES) + ", int64_t M, unsigned gx, unsigned gy, int threads"


def run_emulated(library: ctypes.CDLL, sources: Sources, layer: Layer, x: np.ndarray) -> np.ndarray:
    """Y; what nobody wrote is NaN."""
    y = np.full((len(x), sources.spec.N), np.nan, np.float32)
    launch = sources.kernel(len(x)).launch
    memory = [*arrays(layer, "cuda").values(), np.ascontiguousarray(x), y]
    run = getattr(library, f"run_{launch.rows}")
    run.restype = ctypes.c_bool
    numbers = (ctypes.c_int64(len(x)), *map(ctypes.c_uint, launch.grid(sources.spec, len(x))), launch.threads)
    assert run(*(ctypes.c_void_p(array.ctypes.data) for array in memory), *numbers), "threads wait for each other"
    return y


SHAPES = [  # K, N, bases, group size, offset
    (1, 1, 1, 1, True),
    (130, 33, 3, 64, False),
    (300, 40, 2, 300, True),
    (1100, 70, 4, 256, False),
    (224, 33, 8, 96, True),
]


@pytest.mark.parametrize("shape", SHAPES)
def test_cuda_source(shape: tuple[int, int, int, int, bool], tmp_path: Path) -> None:
    if CXX is None or CUDA_HEADERS is None:
        pytest.skip("TVM's CUDA kernels were NOT tested: no C++ compiler, or no CUDA headers in /usr/local/cuda")
    K, N, bases, group, offset = shape
    rng = np.random.default_rng(K)
    layer = with_garbage(rng, make_layer(rng, K, N, bases, group, dtype=np.float16, offset=offset))
    sources = compile_product(layer, "cuda-sm90", "cuda")
    library = emulated(sources, tmp_path)
    for rows in (1, 2, 3, 8, 9, 17):
        x = rng.standard_normal((rows, K), dtype=np.float32)
        error = np.abs(run_emulated(library, sources, layer, x) - layer.exact(x))
        assert (error <= 2 * K * 2.0**-23 * layer.terms(x)).all(), (shape, rows, np.nanmax(error))
