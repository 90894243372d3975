"""The sweep over a whole model: block by block, each layer with its inputs as the quantised blocks before it give them.

Nothing about an architecture is assumed but that its matrices are used through modules: a hook sees what goes in.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import array_api_compat.torch as xp
import numpy as np
import torch
from torch import nn

from qbb_export.distill.objective import run
from qbb_export.distill.ranks import ALONE, Ranks
from qbb_export.distill.settings import SweepSettings
from qbb_export.distill.student import Target, block_of, to_codes, to_quantized
from qbb_export.distill.text import Tokens, precision
from qbb_export.quantize import Quantized
from qbb_export.quantize.recipes import as_stored
from qbb_export.quantize.sweep import Codes, damped, descend, keep_better, refit_levels, sweep

_TOKENS_AT_ONCE = 1 << 14


class _Enough(Exception):
    """Raised inside a forward pass once everything wanted has been seen."""


class SweptModel:
    """A copy of the model whose blocks are replaced one by one by their quantised selves.

    Args:
        teacher: the float model; not changed.
        targets: all matrices to quantise.
        text: sequences that the layers' inputs are taken from, arrays ``[sequences, length]``.
    """

    def __init__(self, teacher: nn.Module, targets: Sequence[Target], text: Sequence[Tokens]) -> None:
        self._teacher = teacher
        self._model = copy.deepcopy(teacher).float().requires_grad_(False)
        self._text = [part[i : i + n] for part in text for n in (_rows(part),) for i in range(0, len(part), n)]
        self._owners = {t.name: _owner(self._model, t.parameter) for t in targets}
        self.groups = self._by_block(targets)

    def _by_block(self, targets: Sequence[Target]) -> list[list[Target]]:
        """Targets by block, in the order in which the model uses them."""
        seen: list[str] = []
        hooks = [self._owners[t.name].register_forward_pre_hook(lambda *_, n=t.name: seen.append(n)) for t in targets]
        try:
            self._forward(self._text[0][:1, :2])
        finally:
            for hook in hooks:
                hook.remove()
        rank = {name: i for i, name in reversed(list(enumerate(seen)))}
        groups: dict[str, list[Target]] = {}
        for target in sorted(targets, key=lambda t: rank.get(t.name, len(seen))):
            groups.setdefault(block_of(target.parameter), []).append(target)
        return list(groups.values())

    def _forward(self, ids: Tokens) -> None:
        device = next(self._model.parameters()).device
        with torch.no_grad(), precision(device), contextlib.suppress(_Enough):
            run(self._model, torch.from_numpy(ids).to(device))

    def hessians(self, group: Sequence[Target]) -> list[tuple[list[Target], torch.Tensor]]:
        """Mean of ``x xᵀ`` over the inputs of a block's layers, float32 ``[K, K]``; one for all with the same input.

        It is empty for a layer that no sample reached (an expert, say).
        """
        sums: dict[str, torch.Tensor] = {}
        same_as: dict[str, str] = {}
        counts: dict[str, int] = {}
        last: list[Any] = [None, None]  # the input seen last and the layer that it went to
        wanted = {t.name for t in group}
        left: set[str] = set()

        def see(name: str, inputs: tuple[Any, ...]) -> None:
            x = inputs[0]
            if not x.numel():  # an expert that none of these samples goes to
                pass
            elif last[0] is x and same_as.get(name, last[1]) == last[1]:
                same_as[name] = last[1]
            else:
                rows = x.detach().flatten(0, -2).float()
                with torch.autocast(rows.device.type, enabled=False):
                    product = rows.T @ rows
                sums[name] = product if name not in sums else sums[name] + product
                counts[name] = counts.get(name, 0) + len(rows)
                last[0], last[1] = x, name
            left.discard(name)
            if not left:
                raise _Enough

        hooks = [
            self._owners[name].register_forward_pre_hook(lambda _, inputs, n=name: see(n, inputs))
            for name in sorted(wanted)
        ]
        try:
            for ids in self._text:
                left |= wanted
                last[:] = [None, None]
                self._forward(ids)
        finally:
            for hook in hooks:
                hook.remove()
        sharing: dict[str, list[Target]] = {}
        for target in group:
            sharing.setdefault(same_as.get(target.name, target.name), []).append(target)
        return [
            (members, sums[name] / max(1, counts[name]) if name in sums else torch.zeros(0))
            for name, members in sharing.items()
        ]

    def replace(self, target: Target, layer: Quantized) -> None:
        """Put a quantised matrix in its place."""
        target.put(self._model, layer)

    def weight(self, target: Target) -> torch.Tensor:
        """The float matrix ``[N, K]``."""
        return target.weight(self._teacher)


def _rows(part: Tokens) -> int:
    return max(1, _TOKENS_AT_ONCE // int(part.shape[1]))


def _owner(model: nn.Module, parameter: str) -> nn.Module:
    return model.get_submodule(parameter.rpartition(".")[0])


@contextlib.contextmanager
def _full_float32() -> Iterator[None]:
    """No TensorFloat-32: its 10 bits are too few for sums over thousands of columns."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def sweep_layers(
    weights: Sequence[torch.Tensor], hessian: torch.Tensor, starts: Sequence[Quantized], settings: SweepSettings
) -> list[Quantized]:
    """Sweep matrices with the same input from the levels that they start with; see ``quantize.sweep``.

    Their rows have nothing to do with each other, so they are worked on as one tall matrix.

    Args:
        weights: float32 ``[N, K]`` each.
        hessian: float32 ``[K, K]`` on the same device; empty where no sample came by: then the layers stay as they are.
        starts: quantised forms of the matrices; all alike but for N.
        settings: of the sweep.

    Returns:
        Row by row the better one of start and result in the metric of H (with ``uniform``, plain GPTQ's result).
    """
    if hessian.numel() == 0:
        return list(starts)
    with _full_float32(), torch.no_grad():
        H = damped(xp, hessian, settings.damping)
        weight = torch.cat(list(weights))
        first = _stack([to_codes(start, weight.device) for start in starts])
        state = sweep(weight, H, first, act_order=settings.act_order)
        if not settings.uniform:
            state = keep_better(weight, H, first, state)
            for _ in range(settings.rounds):
                state = keep_better(weight, H, state, refit_levels(weight, H, state))
                state = keep_better(weight, H, state, descend(weight, H, state))
            # The codes have the last word, given the scales as they are stored.
            scales = as_stored(xp, state.scales, str(starts[0].scales.dtype))
            stored = Codes(state.codes, scales, state.offset, state.group_size)
            stored = keep_better(weight, H, stored, descend(weight, H, stored))
            state = keep_better(weight, H, first, stored)
        parts = _unstack(state, [start.spec.N for start in starts])
        return [to_quantized(*items) for items in zip(parts, starts, weights, strict=True)]


def _stack(parts: Sequence[Codes]) -> Codes:
    offsets = [part.offset for part in parts if part.offset is not None]
    return Codes(
        torch.cat([part.codes for part in parts]),
        torch.cat([part.scales for part in parts]),
        torch.cat(offsets) if offsets else None,
        parts[0].group_size,
    )


def _unstack(whole: Codes, heights: Sequence[int]) -> list[Codes]:
    ends = np.cumsum(heights)
    return [
        Codes(
            whole.codes[end - height : end],
            whole.scales[end - height : end],
            None if whole.offset is None else whole.offset[end - height : end],
            whole.group_size,
        )
        for height, end in zip(heights, ends, strict=True)
    ]


def sweep_all(
    model: SweptModel,
    start: Mapping[str, Quantized],
    settings: SweepSettings,
    *,
    load: Callable[[Target], Quantized | None],
    save: Callable[[Target, Quantized], None],
    tell: Callable[[int, int], None],
    ranks: Ranks = ALONE,
) -> dict[str, Quantized]:
    """Sweep all blocks in order.

    Args:
        model: made for the same targets.
        start: layers by name.
        settings: of the sweep.
        load: a finished layer from an earlier run, or None.
        save: keeps a finished layer.
        tell: called with (weights done, in all).
        ranks: processes that share the layers of a block; they all see the same inputs, and give the same bytes as one.

    Returns:
        The layers by name.
    """
    result: dict[str, Quantized] = {}
    sizes = {t.name: start[t.name].spec.N * start[t.name].spec.K for group in model.groups for t in group}
    for group in model.groups:
        found = {t.name: load(t) for t in group}
        if None in found.values():
            stacks = [(alike, H) for members, H in model.hessians(group) for alike in _alike(members, start)]
            for alike, hessian in ranks.share(stacks, [sum(sizes[t.name] for t in alike) for alike, _ in stacks]):
                weights, starts = [model.weight(t) for t in alike], [start[t.name] for t in alike]
                for target, layer in zip(alike, sweep_layers(weights, hessian, starts, settings), strict=True):
                    save(target, layer)
            ranks.wait()
            found = {t.name: load(t) for t in group}
        for target in group:
            finished = found[target.name]
            assert finished is not None
            model.replace(target, finished)
            result[target.name] = finished
        tell(sum(sizes[name] for name in result), sum(sizes.values()))
    return result


def _alike(members: Sequence[Target], start: Mapping[str, Quantized]) -> list[list[Target]]:
    """Layers that can be stacked: the same bases, groups and types."""
    groups: dict[Any, list[Target]] = {}
    for target in members:
        layer = start[target.name]
        kind = (layer.spec.bases, layer.spec.group_size, layer.scales.dtype.str, layer.offset is None)
        groups.setdefault(kind, []).append(target)
    return list(groups.values())
