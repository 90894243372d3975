"""What ``test_tvm_cuda.py`` loads, compiled where TVM and nvcc are:   python -m tests.gpu.tvm_modules FOLDER

The machine with the GPU then needs TVM's runtime only, and FOLDER, as QBB_TVM_MODULES.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import tvm_gpu

MODEL, EXPECTED = "model", "expected.npz"


def compile_modules(folder: Path) -> None:
    """Products of :data:`tvm_gpu.EXACT`, and a small language model with what ONNX Runtime says to some inputs."""
    from qbb_export import cli
    from qbb_export.runtimes.tvm.build import compile_model
    from qbb_export.verification import run_file
    from tests.unit.models import tiny_llama

    tvm_gpu.compile_exact(folder)
    with tempfile.TemporaryDirectory() as scratch:
        source, path = tiny_llama(Path(scratch) / "hf"), Path(scratch) / "m.onnx"
        arguments = [str(source), "-o", str(path), "--recipe", "rtn", "--bases", "3", "--group-size", "32"]
        assert cli.export_main(arguments) == 0
        compile_model(path, "cuda-sm90", folder / MODEL, force=True)
        told = {}
        for batch, length in ((1, 1), (1, 9), (3, 40)):
            ids = np.random.default_rng(length).integers(0, 97, (batch, length))
            feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
            (told[f"{batch}x{length}"],) = run_file(path, feeds, library=True).values()
        np.savez(folder / EXPECTED, **told)


if __name__ == "__main__":
    compile_modules(Path(sys.argv[1]))
