"""One process, or several that work on one model (``torchrun``, ``accelerate launch``)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

Item = TypeVar("Item")


@dataclass(frozen=True)
class Ranks:
    """Which of the processes this one is."""

    rank: int = 0
    size: int = 1

    @staticmethod
    def of_environment() -> Ranks:
        """From the variables that torchrun and accelerate set; joins the process group."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return Ranks()
        if not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        return Ranks(dist.get_rank(), dist.get_world_size())

    @property
    def first(self) -> bool:
        """Whether this process writes what only one may write."""
        return self.rank == 0

    def device(self, wanted: str) -> str:
        """``wanted``, or of several GPUs the one of this process's number on its machine."""
        if self.size > 1 and wanted == "cuda":
            wanted = f"cuda:{os.environ.get('LOCAL_RANK', self.rank)}"
            torch.cuda.set_device(wanted)
        return wanted

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            dist.barrier()

    def gather_batches(self, mine: npt.NDArray[Any], batches: int, batch: int) -> npt.NDArray[Any]:
        """All rows ``[n, …]`` in order, where process r made the batches r, r + size, … of ``batch`` rows each."""
        if self.size == 1:
            return mine
        parts: list[Any] = [None] * self.size
        dist.all_gather_object(parts, mine)
        return np.concatenate([parts[b % self.size][b // self.size * batch :][:batch] for b in range(batches)])

    def share(self, items: Sequence[Item], sizes: Sequence[int]) -> list[Item]:
        """This process's part of the work: the largest items first, each to whoever has least so far."""
        loads = [0] * self.size
        mine: list[int] = []
        for i in sorted(range(len(items)), key=lambda i: (-sizes[i], i)):
            who = loads.index(min(loads))
            loads[who] += sizes[i]
            if who == self.rank:
                mine.append(i)
        return [items[i] for i in sorted(mine)]


ALONE: Final = Ranks()
