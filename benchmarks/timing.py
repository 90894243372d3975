"""What all CPU benchmarks share: facts about the machine, contenders taking turns, medians of undisturbed turns."""

from __future__ import annotations

import mmap
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qbb_export.custom_ops import library_info

# A contender that is slow gets fewer turns: about so many seconds for all of them, but three at least.
SECONDS = 1.0
FEWEST_TURNS = 3
# Where the system does not say how large its last-level cache is.
ASSUMED_CACHE = 32 << 20
_SUFFIXES = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def last_level_cache(threads: int) -> int | None:
    """Bytes of last-level cache that so many threads can have, one each where there are several; None: unknown."""
    caches: dict[str, tuple[int, int]] = {}
    for cpu in os.sched_getaffinity(0):
        for index in Path(f"/sys/devices/system/cpu/cpu{cpu}/cache").glob("index*"):
            try:
                level, kind, size, sharers = (
                    (index / name).read_text(encoding="ascii").strip()
                    for name in ("level", "type", "size", "shared_cpu_list")
                )
                if kind != "Instruction":
                    scale = _SUFFIXES.get(size[-1:], 1)
                    caches[f"{level}: {sharers}"] = int(level), int(size.rstrip("KMG")) * scale
            except (OSError, ValueError):
                continue  # some virtual machines leave files out
    last = max((level for level, _ in caches.values()), default=0)
    sizes = sorted((size for level, size in caches.values() if level == last), reverse=True)
    return sum(sizes[:threads]) or None


def isa() -> str:
    """The instruction set that our kernels take: what QBB_ISA forces, else the best one."""
    best = next(name for name, available in library_info().isas.items() if available)
    return os.environ.get("QBB_ISA") or best


def processor() -> str:
    """The processor's name, as far as the system says."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


@dataclass(frozen=True)
class Turn:
    """One timed call.

    Attributes:
        seconds: wall time.
        share: processor time over wall time over threads; well below 1 where somebody else had the processor.
    """

    seconds: float
    share: float


def timed(call: Callable[[], object], threads: int) -> Turn:
    """Run once."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return Turn(wall, cpu / wall / threads)


def undisturbed(turns: Sequence[Turn]) -> list[float]:
    """Seconds of the turns that had the processors for 90 % of the time, and of the best quarter if those are fewer."""
    best = sorted(turns, key=lambda turn: -turn.share)
    good = sum(turn.share >= 0.9 for turn in turns)
    return [turn.seconds for turn in best[: max(good, -(-len(turns) // 4))]]


def median(turns: Sequence[Turn]) -> float:
    """The figure: median seconds of the undisturbed turns."""
    return statistics.median(undisturbed(turns))


def turns_for(seconds: float, most: int) -> int:
    """How many turns a call of such length gets."""
    return min(most, max(FEWEST_TURNS, int(SECONDS / max(seconds, 1e-9))))


def alternate(calls: Sequence[Callable[[], object]], turns: Sequence[int], threads: int) -> list[list[Turn]]:
    """Call all in rounds, in a new order each round; who has fewer turns sits out rounds, evenly.

    All have been called before: what a first call does is not measured.
    """
    rng = np.random.default_rng(0)
    rounds = max(turns)
    results: list[list[Turn]] = [[] for _ in calls]
    for r in range(rounds):
        for i in rng.permutation(len(calls)):
            if r * turns[i] // rounds != (r + 1) * turns[i] // rounds:
                results[i].append(timed(calls[i], threads))
    return results


class Reader:
    """Reads memory as fast as numpy can, on so many threads: what all other speeds are held against.

    The maximum over int32 goes as fast as a loop of 64-byte loads in C++ (both measured in turns; ``bitwise_or`` is a
    fifth slower), and numpy lets other threads run meanwhile.

    Args:
        memory: int32, larger than the last-level cache.
        threads: each reads its own part.
    """

    def __init__(self, memory: np.ndarray, threads: int) -> None:
        self.bytes = memory.nbytes
        self._parts = np.array_split(memory, threads)
        self._pool = ThreadPoolExecutor(threads)
        self()  # threads start, pages are mapped

    def __call__(self) -> None:
        if len(self._parts) == 1:
            self._parts[0].max()
        else:
            list(self._pool.map(np.max, self._parts))


def file_memory(path: Path, size: int) -> np.ndarray:
    """The first ``size`` bytes of a file, mapped, as int32."""
    return np.memmap(path, np.int32, "r", shape=(size // 4,))


def huge_page_memory(size: int) -> np.ndarray:
    """Memory of our own, in huge pages where the system has them, as int32."""
    memory = mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    array = np.frombuffer(memory, np.int32)
    array[:] = 1  # pages that were never written are all one page of zeros
    return array
