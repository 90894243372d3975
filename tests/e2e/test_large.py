"""A model over 2 GB goes through, ONNX to ONNX, in little more memory than its largest layer."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest

LAYERS, SIZE = 9, 8192  # 9 x 8192 x 8192 x 4 bytes = 2.4 GB
CHILD = """
import resource, sys
from qbb_export.cli import export_main
code = export_main(sys.argv[1:])
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
sys.exit(code)
"""


def write_model(folder: Path) -> Path:
    """Linear layers in a row; weights in one external file, written without ever holding two of them."""
    rng = np.random.default_rng(0)
    body = " ".join(f"x{i + 1} = MatMul (x{i}, layers_{i}_weight)" for i in range(LAYERS))
    text = (
        f'<ir_version: 8, opset_import: ["": 17]> g (float[m, {SIZE}] x0) => (float[m, {SIZE}] x{LAYERS}) {{ {body} }}'
    )
    proto = onnx.parser.parse_model(text)
    bytes_each = 4 * SIZE * SIZE
    with (folder / "weights.bin").open("wb") as file:
        for i in range(LAYERS):
            tensor = proto.graph.initializer.add(
                name=f"layers_{i}_weight",
                data_type=onnx.TensorProto.FLOAT,
                dims=[SIZE, SIZE],
                data_location=onnx.TensorProto.EXTERNAL,
            )
            for key, value in (("location", "weights.bin"), ("offset", i * bytes_each), ("length", bytes_each)):
                tensor.external_data.add(key=key, value=str(value))
            for _ in range(16):
                file.write((rng.standard_normal((SIZE // 16, SIZE), dtype=np.float32) / SIZE**0.5).tobytes())
    (folder / "in.onnx").write_bytes(proto.SerializeToString())
    return folder / "in.onnx"


@pytest.mark.slow
def test_two_gigabytes(tmp_path: Path) -> None:
    source, output = write_model(tmp_path), tmp_path / "out.onnx"
    assert (tmp_path / "weights.bin").stat().st_size > 2**31
    arguments = [str(source), "-o", str(output), "--recipe", "greedy", "--bases", "2"]
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *arguments], capture_output=True, text=True, env={**os.environ, "COLUMNS": "100"}
    )
    assert done.returncode == 0, done.stderr
    peak = int(done.stdout.split("peak")[1])
    written = sum(p.stat().st_size for p in (output, *tmp_path.glob("out.*.data")))
    largest = 4 * SIZE * SIZE
    print(f"peak {peak / 1e6:.0f} MB, largest layer {largest / 1e6:.0f} MB, output {written / 1e6:.0f} MB")
    assert peak < 1.5 * largest + written
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 < 2**31  # this process held no model either
