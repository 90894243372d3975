"""One process, or several that work on one model, as ``torchrun`` and ``accelerate launch`` start them.

Everything here that passes something on is a meeting: all processes have to come to it, in the same order. So what
depends on a clock or on files is decided by the first one (:meth:`Ranks.agree`). A process that fails ends; the
launcher then ends the others.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final, NoReturn, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from qbb_export.errors import QbbError

Item = TypeVar("Item")

# Nobody waits longer for another process; the slowest stage of a large model between two meetings takes minutes.
_PATIENCE: Final = timedelta(hours=2)


@dataclass(frozen=True)
class Ranks:
    """Which of the processes this one is."""

    rank: int = 0
    size: int = 1

    @staticmethod
    def of_environment(device: str = "cpu") -> Ranks:
        """From the variables that the launcher sets; joins the process group.

        Args:
            device: the one of this process.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return Ranks()
        import torch.distributed as dist

        backend = "gloo"
        if torch.device(device).type == "cuda":
            torch.cuda.set_device(device)
            backend = "cpu:gloo,cuda:nccl"
        if not dist.is_initialized():
            dist.init_process_group(backend, timeout=_PATIENCE)
        return Ranks(dist.get_rank(), dist.get_world_size())

    @staticmethod
    def device(wanted: str) -> str:
        """``wanted``; of several processes' GPUs the one with this process's number on its machine.

        Raises:
            QbbError: several processes are told to use the same GPU.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) == 1 or not wanted.startswith("cuda"):
            return wanted
        if wanted != "cuda":
            raise QbbError("each process takes a GPU of its own", where="--device", expected="cuda", got=wanted)
        return f"cuda:{os.environ.get('LOCAL_RANK', os.environ.get('RANK', '0'))}"

    @property
    def first(self) -> bool:
        """Whether this process writes what only one may write."""
        return self.rank == 0

    def leave(self) -> None:
        """Leave the process group, all together; nothing can be passed on any more."""
        if self.size > 1:
            import torch.distributed as dist

            self.wait()
            dist.destroy_process_group()

    def wait(self) -> None:
        """Until all processes are here."""
        self.gather(None)

    def agree(self, value: Item) -> Item:
        """What the first process says."""
        if self.size == 1:
            return value
        import torch.distributed as dist

        said = [value]
        dist.broadcast_object_list(said, src=0, device=torch.device("cpu"))
        return said[0]

    def gather(self, value: Item) -> list[Item]:
        """What all processes say, in their order."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        said: list[Any] = [None] * self.size
        dist.all_gather_object(said, value)
        return said

    def total(self, value: float) -> float:
        """The sum over all processes; the same number in each."""
        return sum(self.gather(value))

    def gather_batches(self, mine: npt.NDArray[Any], batches: int, batch: int) -> npt.NDArray[Any]:
        """All rows ``[n, …]`` in order, where process r made the batches r, r + size, … of ``batch`` rows each."""
        parts = self.gather(mine)
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

    def rows(self, count: int) -> tuple[npt.NDArray[np.int64], int]:
        """This process's rows of ``count``, and how many of them count.

        All processes get equally many, so that they stay in step; where that does not work out, the last row is
        repeated, and the repetitions do not count.
        """
        each = -(-count // self.size)
        wanted = np.arange(self.rank * each, (self.rank + 1) * each)
        return np.minimum(wanted, count - 1), int((wanted < count).sum())

    def sharded(self, model: nn.Module, device: str) -> nn.Module:
        """A model spread over the processes (FSDP2), in place: it moves to the device block by block.

        Its parameters become DTensors sharded along their first dimension; a block is put together while it is used.
        This is for learning only: text is written, and layers are swept, by a whole model in each process. Nor is what
        a step keeps for its way back spread: dense matrices and codes, about 3 bytes a weight, and activations.
        """
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")  # we change no output
        mesh = init_device_mesh(torch.device(device).type, (self.size,))
        for block in _own_blocks(model):
            fully_shard(block, mesh=mesh)
        whole_model = _Whole(model)
        fully_shard(whole_model, mesh=mesh, reshard_after_forward=True)
        return whole_model


class _Whole(nn.Module):
    """Around a model: FSDP changes the class of what it wraps, and transformers looks its models' classes up."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.config = model.config

    def forward(self, **inputs: torch.Tensor) -> Any:
        """The model's."""
        return self.model(**inputs)


def _own_blocks(model: nn.Module) -> list[nn.Module]:
    """The outermost members of module lists that share no parameter with anything outside of them."""
    users: dict[nn.Parameter, int] = {}
    blocks: dict[nn.Module, None] = {}
    inside: set[nn.Module] = set()
    for module in model.modules():  # an outer list comes before those inside it
        if type(module) is nn.ModuleList and module not in inside:
            blocks |= dict.fromkeys(module)
            inside |= {inner for block in module for inner in block.modules()}
    for part in (*blocks, *(module for module in model.modules() if module not in inside)):
        for parameter in part.parameters(recurse=part in blocks):
            users[parameter] = users.get(parameter, 0) + 1
    return [block for block in blocks if all(users[parameter] == 1 for parameter in block.parameters())]


def end_process(code: int) -> NoReturn:
    """End one of several processes without taking the interpreter apart.

    Gloo's threads may then still hold tensors of the last meeting, and abort the process when they let go of them
    (https://github.com/pytorch/pytorch/pull/179291): a finished run would be told as a failed one.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that may be spread over the processes, in one piece."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def spread_like(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The inverse of :func:`whole`: on the device of ``like``, and spread in the same way."""
    tensor = tensor.to(like.device)
    mesh = getattr(like, "device_mesh", None)
    if mesh is None:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    # No source: every process holds all of it already.
    return distribute_tensor(tensor, mesh, like.placements, src_data_rank=None)  # type: ignore[attr-defined]


ALONE: Final = Ranks()
