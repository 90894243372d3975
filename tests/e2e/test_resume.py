"""kill -9 in the middle of an export, then the same command again: the bytes of an uninterrupted run.

As often as promised: tests/faults/test_kill.py.
"""

import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.faults.forked import files
from tests.faults.models import chain

LAYERS, SIZE = 6, 512


def start(source: Path, output: Path) -> subprocess.Popen[bytes]:
    code = "import sys; from qbb_export.cli import export_main; sys.exit(export_main(sys.argv[1:]))"
    arguments = [sys.executable, "-c", code, str(source), "-o", str(output), "--no-verify"]
    return subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen[bytes]) -> None:
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors.decode()


def test_killed_exports_resume_to_the_same_bytes(tmp_path: Path) -> None:
    source = chain(tmp_path / "in.onnx", LAYERS, SIZE)
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
