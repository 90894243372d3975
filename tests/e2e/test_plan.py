"""``--plan`` on small models: what it tells, against what the export then does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from qbb_export import cli
from tests.unit.models import tiny_llama

Plan = dict[str, Any]

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "max_position_embeddings": 32}


def plan_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> Plan:
    assert cli.export_main([*map(str, arguments), "--plan", "--json", "--device", "cpu"]) == 0
    plan: Plan = json.loads(capsys.readouterr().out)
    return plan


def test_numbers_add_up_and_nothing_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, output = tiny_llama(tmp_path / "hf", **SMALL), tmp_path / "m.onnx"
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    plan = plan_of(capsys, folder, "-o", output, "--group-size", "32", "--steps", "40")
    assert (plan["recipe"], plan["layers"]) == ("best", 7)
    stages, total = plan["stages"], plan["total"]
    assert total["host"] == max(stage["host"] for stage in stages) >= stages[0]["host"] > 0
    assert total["device"] == 0
    for key in ("disk", "removed", "seconds"):
        assert total[key] == pytest.approx(sum(stage[key] for stage in stages))
    assert all(stage["seconds"] > 0 for stage in stages)
    assert cli.export_main([str(folder), "-o", str(output), "--plan", "--recipe", "float"]) == 0
    assert "in all" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_disk_is_what_an_export_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Heads of files and padding to pages come on top."""
    folder, output = tiny_llama(tmp_path / "hf"), tmp_path / "m.onnx"
    arguments = (folder, "-o", output, "--group-size", "32", "--recipe", "fast")
    planned = {stage["name"]: stage["disk"] for stage in plan_of(capsys, *arguments)["stages"]}
    assert cli.export_main([*map(str, arguments), "--device", "cpu", "--no-verify"]) == 0
    layers = list((tmp_path / "m.qbb" / "layers").iterdir())
    recorded = sum(path.stat().st_size for path in layers)
    assert 0 <= recorded - planned["quantise weights"] < 2000 * len(layers)
    (data,) = tmp_path.glob("m.*.data")
    assert data.stat().st_size == pytest.approx(planned["write the file"], abs=4096 * (3 * len(layers) + 10))


def test_what_the_export_would_refuse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(tiny_llama(tmp_path / "hf", **SMALL)), "-o", str(tmp_path / "m.onnx"), "--plan"]
    assert cli.export_main([*arguments, "--recipe", "fast", "--steps", "3"]) == 2
    assert "only for recipes that learn" in capsys.readouterr().err
    assert cli.export_main([*arguments, "--include", "nothing"]) == 2
    assert "no such layer" in capsys.readouterr().err
    assert cli.export_main([*arguments[:-1], "--json"]) == 2
    assert "--plan" in capsys.readouterr().err
    assert cli.export_main([*arguments, "--device", "cuda:99"]) == 2
    assert "no such device" in capsys.readouterr().err
    (tmp_path / "m.onnx").touch()
    assert cli.export_main(arguments) == 2
    assert "--force" in capsys.readouterr().err


# Its peak by its own account: what the system tells a parent includes the parent's size at the start.
CODE = """
import sys
from pathlib import Path
from qbb_export.cli import export_main
code = export_main(sys.argv[2:])
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
Path(sys.argv[1]).write_text(status["VmHWM"].split()[0])
sys.exit(code)
"""
# The allocator keeps pages that nobody uses, and how many depends on what ran before.
FACTOR = 1.5

# One model's peak is made of its weights in training, the other's of its logits.
WEIGHTS = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "max_position_embeddings": 16}
LOGITS = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 12000}


def child(log: Path, *arguments: object) -> tuple[str, int]:
    """What an export prints, and the largest memory that it held, in bytes."""
    peak = log.with_suffix(".peak")
    command = [sys.executable, "-c", CODE, str(peak), *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
    return done.stdout, int(peak.read_text()) * 1024


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads a process's peak from /proc")
@pytest.mark.parametrize("changes", [WEIGHTS, LOGITS], ids=["weights", "logits"])
def test_memory_is_what_an_export_takes(tmp_path: Path, changes: dict[str, int]) -> None:
    """Within FACTOR, beyond what the program takes by itself; that is measured and would hide any mistake."""
    arguments = (tiny_llama(tmp_path / "hf", **changes), "-o", tmp_path / "m.onnx", "--steps", "2", "--bases", "2")
    told = json.loads(child(tmp_path / "log", *arguments, "--device", "cpu", "--plan", "--json")[0])
    base, most = told["stages"][0]["host"], told["total"]["host"]
    _, measured = child(tmp_path / "log", *arguments, "--device", "cpu", "--no-verify")
    assert most - base > base / 4, "the model is too small to tell anything"
    assert (most - base) / FACTOR < measured - base < (most - base) * FACTOR
