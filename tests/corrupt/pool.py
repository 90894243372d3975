"""Run damaged inputs through child processes, so that a signal or a hang is seen, counted, and costs one input."""

from __future__ import annotations

import json
import selectors
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

# Of one input; the slowest sound ones take a tenth of a second, but a machine may have much other work.
HANG_SECONDS = 120.0
# For the imports of a new child: no input is to blame.
START_SECONDS = 900.0
REPO = Path(__file__).resolve().parents[2]


@dataclass
class Tally:
    """What became of the inputs of one kind.

    ``signals``, ``hangs``, ``untyped`` and ``unclear`` have to be empty; they hold (number, what was said).
    ``changed`` are the numbers that passed all digests although the model in them is another one.
    """

    total: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    signals: list[tuple[int, str]] = field(default_factory=list)
    hangs: list[tuple[int, str]] = field(default_factory=list)
    untyped: list[tuple[int, str]] = field(default_factory=list)
    unclear: list[tuple[int, str]] = field(default_factory=list)
    detected: int = 0
    same: int = 0
    changed: list[int] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def count(self, number: int, outcome: str, text: str, detected: bool, same: bool) -> None:
        """An input that the child came back from."""
        with self.lock:
            self.total += 1
            self.outcomes[outcome] += 1
            self.detected += detected
            self.same += same
            if not detected and not same:
                self.changed.append(number)
            if outcome in ("untyped", "unclear"):
                getattr(self, outcome).append((number, text))

    def lose(self, number: int, how: list[tuple[int, str]], text: str) -> None:
        """An input that the child did not come back from."""
        with self.lock:
            self.total += 1
            how.append((number, text))

    def summary(self) -> str:
        """One line, for a log."""
        counts = {name: len(getattr(self, name)) for name in ("signals", "hangs", "untyped", "unclear", "changed")}
        return f"{dict(self.outcomes) | counts | {'detected': self.detected, 'same': self.same}}"

    def failures(self) -> list[str]:
        kinds = {"signal": self.signals, "hang": self.hangs, "untyped": self.untyped, "unclear": self.unclear}
        return [f"{name}: input {number}: {text}" for name, found in kinds.items() for number, text in found]


def run(
    source: Path,
    kind: str,
    numbers: Iterable[int],
    seed: int,
    tell: Callable[[int], None] = lambda done: None,
    workers: int = 1,
) -> Tally:
    """Damage ``source`` in each of the numbered ways and open every result.

    A child that dies or hangs is replaced, and the work goes on with the next number.

    Args:
        source: a sound file.
        kind: of damage.
        numbers: of the inputs, see ``damage.damaged``.
        seed: of the run.
        tell: called with the number of inputs that are done.
        workers: children at a time.
    """
    tally, numbers = Tally(), list(numbers)

    def work(share: list[int]) -> None:
        while share:
            share = _one_child(source, kind, share, seed, tally, tell)

    with ThreadPoolExecutor(workers) as threads:
        for done in [threads.submit(work, numbers[start::workers]) for start in range(workers)]:
            done.result()
    return tally


def _one_child(
    source: Path, kind: str, numbers: list[int], seed: int, tally: Tally, tell: Callable[[int], None]
) -> list[int]:
    """Feed one child until it ends; the numbers that it did not come to."""
    command = [sys.executable, "-m", "tests.corrupt.worker"]
    child = subprocess.Popen(
        command, cwd=REPO, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert child.stdin is not None and child.stdout is not None
    job = {"source": str(source), "kind": kind, "numbers": numbers, "seed": seed}
    child.stdin.write(json.dumps(job).encode() + b"\n")
    child.stdin.close()
    selector = selectors.DefaultSelector()
    selector.register(child.stdout, selectors.EVENT_READ)
    done, current, rest, last = 0, None, b"", time.monotonic()
    try:
        while True:
            limit = START_SECONDS if current is None and not done else HANG_SECONDS
            if not selector.select(timeout=limit) or time.monotonic() - last > limit:
                child.kill()
                child.wait()
                assert current is not None, f"the child said nothing for {limit:g} s, and not because of an input"
                tally.lose(current, tally.hangs, f"more than {HANG_SECONDS:g} s")
                break
            data = child.stdout.read1(1 << 16)  # type: ignore[attr-defined]
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                last = time.monotonic()
                number, *result = json.loads(line)
                current = number
                if result:
                    tally.count(number, *result)
                    done, current = done + 1, None
                    tell(tally.total)
            if not data:
                code = child.wait()
                if code == 0 and current is None and done == len(numbers):
                    return []
                assert current is not None, f"the child ended with {code} between two inputs"
                tally.lose(current, tally.signals, f"exit code {code}")
                break
    finally:
        selector.close()
        child.stdout.close()
        child.kill()
        child.wait()
    tell(tally.total)
    return numbers[done + 1 :]
