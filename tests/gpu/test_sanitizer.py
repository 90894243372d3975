"""compute-sanitizer over every CUDA kernel: no bad access, race, missing barrier or read of what was never written."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from qbb_export.custom_ops import library_path
from tests.gpu.cuda_abi import need_cuda

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[2]
NVCC = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
SANITIZER = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    need_cuda()
    for tool in (NVCC, SANITIZER):
        if not Path(tool).is_file():
            pytest.fail(f"make test-gpu needs {Path(tool).name} of the CUDA toolkit")
    path = tmp_path_factory.mktemp("sanitizer") / "products"
    library = library_path()
    source = [str(ROOT / "tests/gpu/products.cc"), f"-I{ROOT / 'custom_ops/include'}", str(library)]
    subprocess.run(
        [NVCC, "-std=c++17", "-O1", *source, "-o", str(path), f"-Xlinker=-rpath={library.parent}"], check=True
    )
    return path


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck", "initcheck"])
def test_no_reports(program: Path, tool: str) -> None:
    command = [SANITIZER, f"--tool={tool}", "--error-exitcode=9", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0 and "done" in done.stdout, (done.stdout + done.stderr)[-4000:]
