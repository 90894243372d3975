"""The gate under a coverage-guided fuzzer: seconds in `make test`, ten minutes in `make soak`."""

from __future__ import annotations

import importlib.util
import os
import re
import secrets
import subprocess
import sys
from pathlib import Path

import pytest

from qbb_export.errors import QbbError
from qbb_export.runtimes import gate

REPO = Path(__file__).resolve().parents[2]
FOUND = sorted((Path(__file__).parent / "found").glob("*"))


@pytest.mark.parametrize("path", FOUND, ids=lambda path: path.name)
def test_what_was_found_once_is_refused(path: Path, tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(path.read_bytes())
    with pytest.raises(QbbError) as caught:
        gate.check(tmp_path / "m.onnx", data=False)
    assert str(caught.value).isprintable()


def fuzz(folder: Path, seed: int, *options: str) -> str:
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("atheris is not installed (it has wheels for Linux on x86-64): the gate is NOT fuzzed")
    prefix = folder / "finding-"
    command = [sys.executable, "-m", "tests.corrupt.fuzz_gate", str(folder / "corpus")]
    command += [f"-seed={seed}", f"-artifact_prefix={prefix}", *options]
    done = subprocess.run(command, cwd=REPO, stderr=subprocess.PIPE, text=True, errors="replace")
    findings = [path.read_bytes() for path in folder.glob("finding-*")]
    tail = done.stderr[-3000:]
    assert done.returncode == 0 and not findings, f"seed {seed}: {tail}\ninputs: {findings}"
    return done.stderr


def test_a_few_seconds_of_fuzzing(tmp_path: Path) -> None:
    said = fuzz(tmp_path, 1, "-runs=1000")
    assert int(re.findall(r"Done (\d+) runs", said)[-1]) >= 1000
    assert len(list((tmp_path / "corpus").iterdir())) > 20  # something new was reached


@pytest.mark.soak
def test_ten_minutes_of_fuzzing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seed = int(os.environ.get("QBB_SOAK_SEED") or secrets.randbits(31)) % 2**31 or 1
    with capsys.disabled():
        print(f"\nfuzzing the gate for ten minutes, seed {seed}", flush=True)
    said = fuzz(tmp_path, seed, "-max_total_time=600")
    with capsys.disabled():
        print(f"{re.findall(r'Done .*', said)[-1]}; {len(list((tmp_path / 'corpus').iterdir()))} inputs kept")
