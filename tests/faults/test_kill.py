"""kill -9 at any moment: an output is the old or the new one, and the same command goes on to the same bytes (R5)."""

from __future__ import annotations

import os
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from qbb_export.runtimes.gate import check
from tests.faults.forked import WARM, WARM_TORCH, Commands, differing, files
from tests.faults.models import chain
from tests.faults.test_disk import ALL, LLAMA, Place, arm, onnx_place, shim

__all__ = ["onnx_place", "shim"]  # fixtures

REMOVE = 32  # see shim.c
LAYERS = 26  # one of them is left as it is, by default


def moments() -> random.Random:
    """Random moments; QBB_SOAK_SEED repeats a run."""
    seed = int(os.environ.get("QBB_SOAK_SEED") or random.SystemRandom().randrange(1 << 32))
    print(f"QBB_SOAK_SEED={seed}")
    return random.Random(seed)


def old_or_new(folder: Path, name: str, old: dict[str, bytes], new: dict[str, bytes]) -> str:
    """Which of two .onnx files lies there; whichever it is, it has to be whole."""
    graph = (folder / name).read_bytes()
    which = {old[name]: "old", new[name]: "new"}[graph]
    check(folder / name)  # reads all of the data, and compares it with the digest in its name
    return which


def every_call(place: Place, stride: int) -> None:
    kinds = ALL | REMOVE
    total = place.calls(kinds)
    outcomes: Counter[str] = Counter()
    for nth in range(0, total, stride):
        ended = place.commands.run(*place.command, before=arm(place.folder, kinds, nth, 0, all_after=False))
        assert ended.code == -9, ended
        outcomes[old_or_new(place.folder, "m.onnx", place.old, place.new)] += 1
        ended = place.commands.run(*place.command)
        assert ended.code == 0, ended
        assert not differing(files(place.folder), place.new), nth
        place.restore()
    print(f"{total} calls: {dict(outcomes)}")
    assert set(outcomes) == {"old", "new"}


def test_killed_in_any_call(onnx_place: Place) -> None:
    every_call(onnx_place, stride=4)


@pytest.mark.soak
def test_killed_in_every_call(onnx_place: Place) -> None:
    every_call(onnx_place, stride=1)


def timed(action: Callable[[], object]) -> float:
    began = time.monotonic()
    action()
    return time.monotonic() - began


@pytest.mark.soak
def test_a_hundred_kills_while_quantising(tmp_path: Path) -> None:
    """Each in a folder of its own, and then the same command again."""
    rng = moments()
    source = chain(tmp_path / "in.onnx", LAYERS, 256)
    late = f"run({['qbb-export', str(source), '-o', str(tmp_path / 'm.onnx'), '--no-verify', '--recipe', 'greedy']})"
    with Commands(tmp_path, f"{WARM}\n{late}") as commands:

        def export(folder: Path) -> list[object]:
            folder.mkdir(exist_ok=True)
            return ["qbb-export", source, "-o", folder / "m.onnx", "--no-verify", "--bases", "2"]

        command = export(tmp_path / "whole")
        duration = timed(lambda: commands.run(*command))
        wanted = files(tmp_path / "whole")
        layers = sum(name.startswith("m.qbb/layers/") for name in wanted)
        assert layers >= 24
        hit: list[int] = []
        while len(hit) < 100:
            folder = tmp_path / "killed"
            command = export(folder)
            commands.start(*command)
            time.sleep(rng.uniform(0, duration))
            if commands.kill() and not (folder / "m.onnx").exists():
                hit.append(len(list(folder.glob("m.qbb/layers/*.safetensors"))))
                ended = commands.run(*command)
                assert ended.code == 0, ended
                assert differing(files(folder), wanted) == []
                if len(hit) % 10 == 0:
                    print(f"{len(hit)} kills, all resumed to the same bytes", flush=True)
            shutil.rmtree(folder)
        print(f"100 of 100; finished layers at the kill: {sorted(hit)} of {layers}")
        assert sum(0 < count < layers for count in hit) >= 50


@pytest.mark.soak
def test_a_hundred_kills_while_saving(tmp_path: Path) -> None:
    """Over an existing model; the layers of the new one are in the record, so that the run soon writes."""
    rng = moments()
    folder = tmp_path / "out"
    source = chain(tmp_path / "in.onnx", LAYERS, 512)
    command = ["qbb-export", source, "-o", folder / "m.onnx", "--no-verify", "--force", "--recipe", "rtn"]
    with Commands(tmp_path, WARM, PYTHONHASHSEED="1") as commands:
        place = Place(commands, folder, [*command, "--bases", "3"], [*command, "--bases", "2"])
        # Both with the record of the new one.
        place.old |= {name: data for name, data in place.new.items() if ".qbb/" in name}
        place.restore()

        def half_written() -> bool:
            return any(folder.glob("*m.onnx.*tmp*"))

        def wait_for_writing() -> None:
            while not half_written():
                time.sleep(0.0005)

        commands.start(*place.command)
        wait_for_writing()
        window = timed(lambda: commands.end())
        place.restore()
        outcomes: Counter[str] = Counter()
        while outcomes.total() < 100:
            commands.start(*place.command)
            wait_for_writing()
            time.sleep(rng.uniform(0, window))
            if commands.kill():
                left = "half-written data" if half_written() else "nothing half-written"
                outcomes[f"{old_or_new(folder, 'm.onnx', place.old, place.new)}, {left}"] += 1
                ended = commands.run(*place.command)
                assert ended.code == 0, ended
                assert differing(files(folder), place.new) == []
                if outcomes.total() % 10 == 0:
                    print(f"{outcomes.total()} kills, never mixed: {dict(outcomes)}", flush=True)
            place.restore()
        print(f"100 of 100 within {window:.3f} s of writing: {dict(outcomes)}")


@pytest.mark.soak
def test_twenty_kills_of_an_export_into_a_folder(tmp_path: Path) -> None:
    """A folder that generates, over an earlier one: kernels, tokenizer, configuration and graph go together."""
    pytest.importorskip("torch")
    from tests.unit.models import byte_tokenizer, tiny_llama

    rng = moments()
    model = tiny_llama(tmp_path / "model", vocab_size=280)
    byte_tokenizer(model)
    output = tmp_path / "all" / "out"
    command = ["qbb-export", model, "-o", output, "--no-verify", "--force", "--recipe", "best", "--group-size", "32"]
    with Commands(tmp_path, WARM_TORCH + LLAMA) as commands:
        place = Place(commands, tmp_path / "all", [*command, "--bases", "3"], [*command, "--bases", "2"])
        duration = timed(lambda: commands.run(*place.command))
        place.restore()

        def folder_of(of: dict[str, bytes]) -> dict[str, bytes]:
            return {name: data for name, data in of.items() if name.startswith("out/")}

        outcomes: Counter[str] = Counter()
        while outcomes.total() < 20:
            commands.start(*place.command)
            # Half of them in the last fifth, where the folder is written and gets its name.
            time.sleep(rng.uniform(0.8 if outcomes.total() % 2 else 0.0, 1.0) * duration)
            if commands.kill():
                now = folder_of(files(place.folder))
                whole = [w for w, of in (("old", place.old), ("new", place.new)) if not differing(now, folder_of(of))]
                assert whole, f"mixed: {sorted(now)}"
                outcomes[whole[0]] += 1
                ended = commands.run(*place.command)
                assert ended.code == 0, ended
                assert differing(files(place.folder), place.new) == []
                print(f"{outcomes.total()} kills, old or new, resumed to the same bytes: {dict(outcomes)}", flush=True)
            place.restore()
