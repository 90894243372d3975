"""R1: damaged files never take a process down. R3: no damage to weights goes unseen.

`make test` takes a sample; `make soak` takes everything (QBB_SOAK_SEED repeats a run).
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from qbb_export.artifact import external_tensors, read_graph
from qbb_export.errors import QbbError
from qbb_export.runtimes import gate
from tests.corrupt import bases, pool
from tests.corrupt.damage import KINDS

# How many of each kind, by model; None: all there are.
EVERYTHING: dict[str, dict[str, int | None]] = {
    "small": {"truncation": None, "bit": None, "bytes": 20_000, "structure": 3_000},
    "larger": {"truncation": 1_000, "bit": 4_000, "bytes": 10_000, "structure": 3_000},
}
SAMPLE = {
    "small": {"truncation": 60, "bit": 250, "bytes": 250, "structure": 200},
    "larger": {"truncation": 20, "bit": 100, "bytes": 150, "structure": 150},
}


def numbers_of(kind: str, size: int, count: int | None, seed: int) -> list[int]:
    """Which truncations and bits to take, spread at random; of the others the first."""
    places = {"truncation": size, "bit": 8 * size}.get(kind)
    if places is None:
        assert count is not None
        return list(range(count))
    if count is None:
        return list(range(places))
    return sorted(np.random.default_rng(seed).choice(places, count, replace=False).tolist())


def corrupt(
    folder: Path,
    plan: dict[str, Any],
    seed: int,
    tell: Callable[[str, int, int], None] = lambda *_: None,
    workers: int = 1,
) -> dict[str, pool.Tally]:
    tallies = {}
    for name, counts in plan.items():
        source = bases.write(name, folder)
        for kind in KINDS:
            numbers = numbers_of(kind, source.stat().st_size, counts[kind], seed)
            what = f"{name}, {kind}"

            def report(done: int, what: str = what, total: int = len(numbers)) -> None:
                tell(what, done, total)

            tallies[what] = pool.run(source, kind, numbers, seed, report, workers)
            tell(f"{what}: {tallies[what].summary()}", len(numbers), len(numbers))
    return tallies


def check(tallies: dict[str, pool.Tally]) -> None:
    for what, tally in tallies.items():
        assert not tally.failures(), (what, tally.failures()[:10])
        assert tally.total == sum(tally.outcomes.values())
        if what.endswith(("truncation", "bit")):
            assert not tally.changed, (what, "undetected", tally.changed[:10])


def test_a_sample_of_damaged_files(tmp_path: Path) -> None:
    tallies = corrupt(tmp_path, SAMPLE, seed=2026)
    check(tallies)
    # The sample is of no use if nothing gets past the gate.
    outcomes = {outcome for tally in tallies.values() for outcome in tally.outcomes}
    assert outcomes >= {"refused by the gate", "refused by ONNX Runtime", "ran"}


def test_the_small_model_is_small(tmp_path: Path) -> None:
    assert bases.write("small", tmp_path).stat().st_size <= 4096


def test_signals_hangs_and_strange_errors_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness against a kernel library that misbehaves, or else it would prove nothing."""
    from tests.unit.test_check import library_that

    source = bases.write("small", tmp_path)
    last_bit = 8 * source.stat().st_size - 1
    monkeypatch.setattr(pool, "HANG_SECONDS", 5.0)
    metadata = source.read_bytes().index(b"qbb.sha256") * 8
    for body, attribute in (("raise(SIGSEGV);", "signals"), ("for (;;) pause();", "hangs")):
        library_that(tmp_path, body, monkeypatch)
        tally = pool.run(source, "bit", [last_bit, metadata], 0)  # the first is refused by the gate
        assert tally.total == 2 and [number for number, _ in getattr(tally, attribute)] == [metadata], tally
        assert len(tally.failures()) == 1


@pytest.mark.soak
def test_every_damaged_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seed = int(os.environ.get("QBB_SOAK_SEED") or secrets.randbits(32))
    columns = (TextColumn("{task.description:<20}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with capsys.disabled(), Progress(*columns, refresh_per_second=2) as progress:
        progress.console.print(f"\nseed {seed} (QBB_SOAK_SEED={seed} repeats this run)")
        task = progress.add_task("")

        def tell(what: str, done: int, total: int) -> None:
            progress.update(task, description=what, completed=done, total=total)
            if not progress.console.is_terminal and done * 10 // total > (done - 1) * 10 // total:  # a log: every tenth
                print(f"{what}: {done} of {total}", flush=True)

        workers = int(os.environ.get("QBB_SOAK_WORKERS") or os.cpu_count() or 1)
        tallies = corrupt(tmp_path, EVERYTHING, seed, tell, workers)
        progress.console.print(table(tallies))
    assert sum(tally.total for tally in tallies.values()) >= 42_000
    check(tallies)


def table(tallies: dict[str, pool.Tally]) -> Table:
    result = Table("damage", title="Damaged files, opened without the digests; then read with them")
    columns = ("inputs", "gate", "ORT", "at run", "ran", "signals", "hangs", "untyped", "seen", "same model", "unseen")
    for column in columns:
        result.add_column(column, justify="right")
    for what, tally in tallies.items():
        o = tally.outcomes
        cells = [tally.total, o["refused by the gate"], o["refused by ONNX Runtime"], o["refused when run"]]
        cells += [o["ran"] + o["opened"], len(tally.signals), len(tally.hangs), len(tally.untyped) + len(tally.unclear)]
        cells += [tally.detected, tally.same, len(tally.changed)]
        result.add_row(what, *map(str, cells))
    return result


FLIPS = 1_000


def test_flipped_bits_in_weights_are_all_seen(tmp_path: Path) -> None:
    """R3: in the data file, and in the small tensors that lie in the graph."""
    path = bases.write("larger", tmp_path)
    (data,) = {Path(tensor.path) for tensor in external_tensors(read_graph(path))}
    graph = path.read_bytes()
    places = [(data, place) for place in range(data.stat().st_size)]
    for tensor in onnx.load_model_from_string(graph).graph.initializer:
        if tensor.raw_data:
            start = graph.index(tensor.raw_data)
            places += [(path, place) for place in range(start, start + len(tensor.raw_data))]
    in_graph = sum(file == path for file, _ in places)
    assert in_graph > 100
    rng = np.random.default_rng(3)
    # Half of the flips each, so that the few bytes in the graph get their share.
    chosen = [*rng.integers(len(places) - in_graph, size=FLIPS // 2)]
    chosen += [*rng.integers(len(places) - in_graph, len(places), size=FLIPS // 2)]
    for index in chosen:
        file, place = places[index]
        bit = 1 << int(rng.integers(8))
        with file.open("r+b") as changed:
            changed.seek(place)
            (old,) = changed.read(1)
            changed.seek(place)
            changed.write(bytes([old ^ bit]))
            changed.flush()
            with pytest.raises(QbbError, match=r"(is|are) damaged"):
                gate.check(path)
            changed.seek(place)
            changed.write(bytes([old]))
    gate.check(path)
