"""Loss and gradients of a batch, on one GPU as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

_WARM_UPS = 2  # runs before a recording, so that libraries have set up what they need


@dataclass(frozen=True)
class _Recording:
    """A graph with the tensors that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    ids: torch.Tensor
    loss: torch.Tensor
    gradients: list[torch.Tensor | None]

    def replay(self, ids: torch.Tensor, parameters: Sequence[nn.Parameter]) -> torch.Tensor:
        self.ids.copy_(ids)
        self.graph.replay()
        for parameter, gradient in zip(parameters, self.gradients, strict=True):
            parameter.grad = gradient
        return self.loss


class Gradients:
    """Computes the loss of a batch, with the gradients of all parameters.

    *Why a CUDA graph:* a step of a model of some hundred million weights is thousands of kernels that run for a few
    microseconds each; launched one by one, the GPU waits for most of them. A model whose forward pass waits for the
    GPU itself cannot be recorded and runs as usual.

    Args:
        compute: from ids ``[batch, sequence]`` on the device, and numbers, to the loss; adds to the parameters'
            gradients.
        parameters: those that train.
        graphs: record and replay; for a CUDA device and a single process.
    """

    def __init__(
        self,
        compute: Callable[..., torch.Tensor],
        parameters: Sequence[nn.Parameter],
        *,
        graphs: bool,
    ) -> None:
        self._compute, self._parameters = compute, parameters
        self._graphs = graphs
        self._recordings: dict[tuple[torch.Size, tuple[int, ...]], _Recording] = {}

    @property
    def recorded(self) -> int:
        """Number of graphs."""
        return len(self._recordings)

    def __call__(self, ids: torch.Tensor, *numbers: int) -> torch.Tensor:
        """The loss, a scalar that the next call may overwrite; gradients are those of this batch alone.

        Args:
            ids: ``[batch, sequence]``.
            numbers: all else that the computation depends on; each set of them has its own graph.
        """
        self._clear()
        if not self._graphs:
            return self._in_order(ids, numbers)
        key = (ids.shape, numbers)
        if key not in self._recordings:
            recording = self._record(ids, numbers)
            if recording is None:
                self._graphs = False
                self._recordings.clear()
                return self._in_order(ids, numbers)
            self._recordings[key] = recording
        return self._recordings[key].replay(ids, self._parameters)

    def _record(self, ids: torch.Tensor, numbers: tuple[int, ...]) -> _Recording | None:
        """A graph of the computation, or None if it cannot be recorded."""
        still = ids.clone()
        beside = torch.cuda.Stream(ids.device)  # type: ignore[no-untyped-call]
        beside.wait_stream(torch.cuda.current_stream(ids.device))
        with torch.cuda.stream(beside):
            for _ in range(_WARM_UPS):
                self._in_order(still, numbers)
                self._clear()
        torch.cuda.current_stream(ids.device).wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        pool = next((r.graph.pool() for r in self._recordings.values()), None)  # one is replayed at a time
        try:
            with torch.cuda.graph(graph, pool=pool, stream=beside):
                loss = self._compute(still, *numbers)
        except RuntimeError:
            torch.cuda.synchronize(ids.device)
            self._clear()
            return None
        return _Recording(graph, still, loss, [parameter.grad for parameter in self._parameters])

    def _in_order(self, ids: torch.Tensor, numbers: tuple[int, ...]) -> torch.Tensor:
        """The computation, with kernels that add in the same order on every run where all operations have such."""
        try:
            return self._compute(ids, *numbers)
        except RuntimeError as error:
            if "deterministic" not in str(error) or torch.is_deterministic_algorithms_warn_only_enabled():
                raise
        torch.use_deterministic_algorithms(True, warn_only=True)
        self._clear()
        return self._compute(ids, *numbers)

    def _clear(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None
