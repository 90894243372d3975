"""Kernels become machine code without a warning for the oldest and the newest kind of GPU, where nvcc is."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NVCC = shutil.which("nvcc")

SOURCE = """
#include "cuda/batch.cuh"
#include "cuda/decode.cuh"
#include "cuda/decode_bulk.cuh"
#include "cuda/general.cuh"
using namespace qbb::cuda;
template __global__ void qbb::cuda::decode<4, 16, 2>(const Weights, const Rows);
template __global__ void qbb::cuda::decode_bulk<4, 16, 2>(const Weights, const Rows);
template __global__ void qbb::cuda::batch<Halves<false>, 4, 8>(const Weights, const Rows);
template __global__ void qbb::cuda::batch<Bytes, 4, 2>(const Weights, const Rows);
"""


@pytest.mark.skipif(NVCC is None, reason="nvcc not found: CUDA kernels are not built here")
@pytest.mark.parametrize("arch", ["75", "120"])
def test_no_warning(arch: str, tmp_path: Path) -> None:
    source = tmp_path / "kernels.cu"
    source.write_text(SOURCE, encoding="utf-8")
    flags = ["-std=c++17", "-O3", f"-arch=sm_{arch}", f"-I{ROOT / 'custom_ops'}", f"-I{ROOT / 'custom_ops/include'}"]
    command = [str(NVCC), *flags, "-Werror=all-warnings", "-cubin", "-o", str(tmp_path / "kernels.cubin"), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
