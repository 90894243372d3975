"""Two processes do what one does: the same bytes up to the training, and that but for rounding; one of them speaks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from qbb_export.cli import export_main
from qbb_export.distill.ranks import ALONE
from tests.e2e import ranks_program
from tests.unit.models import tiny, tiny_llama

CHECKOUT = Path(__file__).resolve().parents[2]
STEPS = 10
OPTIONS = ["--recipe", "best", "--start", "gptq", "--steps", str(STEPS), "--group-size", "32", "--bases", "2"]
# An exit that waits for the other process would take the patience of the process group, hours.
LIMIT_S = 240
# Below this a file is too large for the second process; a layer's takes more.
ROOM_BYTES = 1000


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """As in the processes that torchrun starts: with more, products add in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny_llama(folder / "llama")
    for family in ("gpt2", "albert"):
        tiny(family, folder / family)
    return folder


def torchrun(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(CHECKOUT)}
    return subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True, timeout=LIMIT_S, env=environment
    )


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def losses(record: Path) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    lines = [json.loads(line) for line in (record / "distill" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["phase"] == 2] == list(range(STEPS))  # and one in phase 1
    return np.array([[line["loss"], line["validation"]] for line in lines])


def test_an_export_by_two_processes(models: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    assert export_main([str(models / "llama"), "-o", str(one / "m.onnx"), *OPTIONS]) == 0
    done = torchrun("-m", "--", "qbb_export", models / "llama", "-o", two / "m.onnx", *OPTIONS)
    assert done.returncode == 0, done.stderr  # the file was verified
    assert done.stdout.count("quantised layers") == 1
    assert done.stderr.count("writing text") == 1
    found, wanted = files(two), files(one)
    assert {name for name in found if ".data" not in name} == {name for name in wanted if ".data" not in name}
    same = [name for name in wanted if "/stages/" in name or "/branches/" in name or "text.safetensors" in name]
    parts = ("qbb/stages/start/", "qbb/stages/sweep/", "branches/gptq/layers/", "branches/gptq/stages/start/")
    for part in parts:
        assert sum(part in name for name in same) == 14, part  # else the next line would prove little
    assert [name for name in same if found[name] != wanted[name]] == []
    # Sums are rounded otherwise, so now and then a weight that lies between two levels takes the other one. Each of the
    # 55,296 weights has a share of the loss, and a level farther off makes it at most 9 times as large (three half
    # steps instead of one, squared): 1e-3 leaves room for 6 of them. The losses of two batches differ by 1e-1.
    assert np.allclose(losses(two / "m.qbb"), losses(one / "m.qbb"), rtol=1e-3, atol=0)


def test_training_in_two_processes_differs_by_rounding_only(models: Path, tmp_path: Path) -> None:
    done = torchrun(Path(ranks_program.__file__), models, tmp_path / "two.json")
    assert done.returncode == 0, done.stderr
    two = json.loads((tmp_path / "two.json").read_text())
    for family in ranks_program.CASES:
        one = np.array([ranks_program.run_case(family, models, ALONE, order) for order in range(4)])
        # The order of the rows in a batch, too, changes nothing but the order of sums: it shows what rounding does.
        rounding = np.abs(one[1:] - one[0]) / one[0]
        assert 0 < rounding.max() < 1e-4, family
        difference = np.abs(np.array(two[family]) - one[0]) / one[0]
        assert difference.max() <= 8 * rounding.max(), family
    for name in ("codes", "swap"):
        killed, whole = two[name]
        assert killed == whole, name


@pytest.mark.slow  # a third start of two processes
def test_an_error_in_one_process_ends_all(models: Path, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import os, resource, signal, sys\n"
        "from qbb_export.cli import export_main\n"
        "if os.environ['RANK'] == '1':\n"
        "    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"    resource.setrlimit(resource.RLIMIT_FSIZE, ({ROOM_BYTES}, {ROOM_BYTES}))\n"
        "sys.exit(export_main(sys.argv[1:]))\n"
    )
    output = tmp_path / "m.onnx"
    done = torchrun("--", program, models / "llama", "-o", output, *OPTIONS)
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, done.stderr
    assert "cannot write the record" in errors[0] and errors[0].endswith("in process 1")
    assert not list(tmp_path.glob("m.*onnx*")) + list(tmp_path.rglob("*.tmp"))
