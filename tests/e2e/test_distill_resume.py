"""kill -9 in any stage of a recipe that learns, then the same command again: the bytes of an uninterrupted run."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.unit.models import tiny_llama

LAYERS = 14
KILLS = 20  # of the long test
LIMIT_S = 300
# Exports as it is told, each in a process of its own that is a copy of this one: PyTorch is imported, and the model
# captured, only once. The recipes are as they are but for their size, and the state of a training is kept after every
# step.
PROGRAM = """
import json, os, sys
from dataclasses import replace
from types import MappingProxyType
from qbb_export.distill import settings
def small(name, recipe):
    phases = tuple(replace(d, steps=12, batch=4) for d in recipe.distill)
    sweep = recipe.sweep and replace(recipe.sweep, sequences=16)
    text = replace(recipe.text, sequences=48, length=40, validation=8)
    return replace(recipe, text=text, sweep=sweep, distill=phases)
settings.MODEL_RECIPES = MappingProxyType({n: small(n, r) for n, r in settings.MODEL_RECIPES.items()})
import torch
from qbb_export import destination
from qbb_export.cli import export_main
from qbb_export.distill import run
from qbb_export.source import LoadOptions
run.SAVE_SECONDS = 0.0
torch.set_num_threads(1)
answers = os.fdopen(os.dup(1), "w")
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
def command(recipe, model, output):
    return export_main([model, "-o", output, "--recipe", recipe, "--group-size", "32", "--bases", "2", "--force"])
command("float", *sys.argv[1:])  # imports what an export needs
captured = destination.capture(sys.argv[1], LoadOptions())
destination.capture = lambda *_: captured
while line := sys.stdin.readline():
    child = os.fork()
    if child == 0:
        os._exit(command(*json.loads(line)))
    print(child, file=answers, flush=True)
    sys.stdin.readline()  # until then the number of a process that has ended is not given away
    print(os.waitpid(child, 0)[1], file=answers, flush=True)
"""


class Exporter:
    """Exports a small model; may be killed."""

    def __init__(self, model: Path, seed: int) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": str(seed)}
        warm = model.parent / f"warm{seed}.onnx"
        command = [sys.executable, "-c", PROGRAM, str(model), str(warm)]
        self._model, self._child = str(model), 0
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )

    def start(self, recipe: str, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self._child = self._ask(json.dumps([recipe, self._model, str(folder / "m.onnx")]))

    def kill(self) -> bool:
        """False if it had ended before."""
        os.kill(self._child, signal.SIGKILL)
        return self.end() == signal.SIGKILL

    def end(self) -> int:
        """The status it ended with, see os.waitpid."""
        return self._ask("")

    def finish(self, recipe: str, folder: Path) -> dict[str, bytes]:
        """Export to the end; all files."""
        self.start(recipe, folder)
        assert self.end() == 0
        return files(folder)

    def close(self) -> None:
        self._process.communicate(timeout=LIMIT_S)

    def _ask(self, line: str) -> int:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise AssertionError(self._process.communicate()[1])
        return int(answer)


@pytest.fixture(scope="module")
def exporters(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Exporter, Exporter]]:
    """Two, so that what goes by Python's hashes differs between them."""
    model = tiny_llama(tmp_path_factory.mktemp("model") / "llama")
    both = Exporter(model, 1), Exporter(model, 2)
    yield both
    for exporter in both:
        exporter.close()


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def count(folder: Path, part: str) -> int:
    return len(list(folder.glob(f"m.qbb/{part}/*.safetensors")))


def is_in(folder: Path, name: str) -> bool:
    return (folder / "m.qbb" / "distill" / f"{name}.safetensors").exists()


# How to see that a run is inside a stage.
BEGUN: dict[str, Callable[[Path], bool]] = {
    "start": lambda folder: count(folder, "stages/start") >= 3,
    "text": lambda folder: count(folder, "stages/start") == LAYERS,
    "sweep": lambda folder: count(folder, "stages/sweep") >= 3,
    "phase 1": lambda folder: is_in(folder, "phase-1"),
    "phase 2": lambda folder: is_in(folder, "phase-2"),
    "layers": lambda folder: count(folder, "layers") >= 3,
    "file": lambda folder: count(folder, "layers") == LAYERS and not is_in(folder, "phase-1"),
}


def stage_of(folder: Path) -> str:
    """Which stage a run was in that left this."""
    return next((stage for stage in reversed(BEGUN) if BEGUN[stage](folder)), "opening")


def same(found: dict[str, bytes], wanted: dict[str, bytes]) -> None:
    assert sorted(found) == sorted(wanted)
    assert [name for name in wanted if found[name] != wanted[name]] == []


@pytest.mark.parametrize(
    ("recipe", "stages"), [("best", ("start", "text", "sweep", "phase 1", "phase 2", "layers")), ("qbb", ("phase 1",))]
)
def test_killed_runs_resume_to_the_same_bytes(
    recipe: str, stages: tuple[str, ...], exporters: tuple[Exporter, Exporter], tmp_path: Path
) -> None:
    wanted = exporters[0].finish(recipe, tmp_path / "whole")
    killed = tmp_path / "killed"
    for stage in stages:
        exporters[1].start(recipe, killed)
        began = time.monotonic()
        while not BEGUN[stage](killed) and time.monotonic() - began < LIMIT_S:
            time.sleep(0.001)
        assert exporters[1].kill(), f"the run ended before it could be killed in {stage}"
    same(exporters[1].finish(recipe, killed), wanted)
    # As if it had been killed just before it removed what it needs no more.
    (killed / "m.qbb" / "distill" / "phase-1.safetensors").write_bytes(b"left over")
    same(exporters[1].finish(recipe, killed), wanted)


@pytest.mark.soak
def test_kills_at_random_moments(exporters: tuple[Exporter, Exporter], tmp_path: Path) -> None:
    """Each kill in a folder of its own, every other one followed by a second; then the same command to its end."""
    seed = int(os.environ.get("QBB_SEED") or random.SystemRandom().randrange(1 << 32))
    print(f"QBB_SEED={seed}")
    moments = random.Random(seed)
    wanted = exporters[0].finish("best", tmp_path / "whole")
    began = time.monotonic()
    same(exporters[1].finish("best", tmp_path / "timed"), wanted)
    duration = time.monotonic() - began
    hit: Counter[str] = Counter()
    killed, moments_hit = tmp_path / "killed", 0
    while moments_hit < KILLS:
        stages = []
        for _ in range(1 + moments_hit % 2):
            exporters[1].start("best", killed)
            time.sleep(moments.uniform(0, duration))
            if exporters[1].kill():
                stages.append(stage_of(killed))
        same(exporters[1].finish("best", killed), wanted)
        shutil.rmtree(killed)
        if stages:
            moments_hit += 1
            hit.update(stages)
            print(f"{moments_hit} of {KILLS} resumed to the same bytes; killed in {', then '.join(stages)}", flush=True)
    print(f"kills by stage: {dict(hit)}")
