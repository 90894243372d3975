"""kill -9 in the middle of an export, then the same command again: the bytes of an uninterrupted run."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import onnx.parser

LAYERS, SIZE = 6, 512


def write_model(path: Path) -> Path:
    body = " ".join(f"x{i + 1} = MatMul (x{i}, layers_{i}_weight)" for i in range(LAYERS))
    text = (
        f'<ir_version: 8, opset_import: ["": 17]> g (float[m, {SIZE}] x0) => (float[m, {SIZE}] x{LAYERS}) {{ {body} }}'
    )
    proto = onnx.parser.parse_model(text)
    rng = np.random.default_rng(0)
    for i in range(LAYERS):
        weights = rng.standard_normal((SIZE, SIZE), dtype=np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(weights, f"layers_{i}_weight"))
    onnx.save(proto, path)
    return path


def start(source: Path, output: Path) -> subprocess.Popen[bytes]:
    code = "import sys; from qbb_export.cli import export_main; sys.exit(export_main(sys.argv[1:]))"
    arguments = [sys.executable, "-c", code, str(source), "-o", str(output), "--no-verify"]
    return subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen[bytes]) -> None:
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors.decode()


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_killed_exports_resume_to_the_same_bytes(tmp_path: Path) -> None:
    source = write_model(tmp_path / "in.onnx")
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    finish(start(source, tmp_path / "whole" / "m.onnx"))
    output = tmp_path / "killed" / "m.onnx"
    for wanted in (1, 2, 4):  # layers that are finished when the blow falls
        process = start(source, output)
        while len(list(output.with_suffix(".qbb").glob("layers/*.safetensors"))) < wanted and process.poll() is None:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "the run ended before it could be killed"
        assert not output.exists()
    finish(start(source, output))
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
