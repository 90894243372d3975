"""A copy of the model whose weights are sums of binary matrices that can be trained.

Each chosen parameter is replaced through ``torch.nn.utils.parametrize``, so any module that owns a matrix will do. A
matrix has one latent weight; its codes are those of the nearest levels, hence all bases follow from it together
(independent latents per basis ruin each other).
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrize

from qbb_export.distill.ranks import whole
from qbb_export.format import pack_words, unpack_words
from qbb_export.quantize import Quantized, QuantizeSettings
from qbb_export.quantize.quantized import dequantize
from qbb_export.quantize.recipes import as_stored
from qbb_export.quantize.sweep import Codes

# How far inside its cell a latent weight starts at least, as a share of the cell. A code that the sweep has chosen
# against the weight itself would otherwise lie on the edge, and the first noise would undo it.
_MARGIN = 0.25

# The first number in a parameter's name is that of its block.
_BLOCK = re.compile(r"^(.*?\.)?\d+\.")


@dataclass(frozen=True)
class Target:
    """A matrix to quantise.

    Args:
        name: of the layer, as the record calls it.
        parameter: of the module, e.g. ``model.layers.0.mlp.up_proj.weight``.
        transposed: the parameter is stored [in_features, out_features].
        settings: its own.
    """

    name: str
    parameter: str
    transposed: bool
    settings: QuantizeSettings

    def weight(self, model: nn.Module) -> torch.Tensor:
        """float32 ``[out_features, in_features]``, a copy."""
        weight = model.get_parameter(self.parameter).detach().to(torch.float32, copy=True)
        return weight.T.contiguous() if self.transposed else weight

    def put(self, model: nn.Module, layer: Quantized) -> None:
        """Overwrite the parameter of a model by what a quantised matrix stands for."""
        dense = torch.from_numpy(dequantize(layer))
        with torch.no_grad():
            model.get_parameter(self.parameter).copy_(dense.T if self.transposed else dense)


def to_codes(layer: Quantized, device: torch.device | str) -> Codes:
    """A stored matrix as codes on a device."""
    K = layer.spec.K
    codes = np.zeros((layer.spec.N, K), dtype=np.uint8)
    for b, words in enumerate(layer.words):
        codes |= unpack_words(words, K).astype(np.uint8) << np.uint8(b)
    scales = np.ascontiguousarray(np.moveaxis(layer.scales.astype(np.float32), 0, -1))
    offset = None if layer.offset is None else torch.from_numpy(layer.offset.copy()).to(device)
    return Codes(torch.from_numpy(codes).to(device), torch.from_numpy(scales).to(device), offset, layer.spec.group_size)


def to_quantized(state: Codes, like: Quantized, weight: torch.Tensor) -> Quantized:
    """Codes as a stored matrix: scales in the type that ``like`` has, its errors and the new one."""
    codes, scales = state.codes, state.scales
    negative = scales < 0  # names the same levels with the signs turned around
    if bool(negative.any()):
        bits = (1 << torch.arange(scales.shape[-1], device=scales.device)).to(torch.uint8)
        turned = (negative.to(torch.uint8) * bits).sum(-1, dtype=torch.uint8)
        group = torch.arange(codes.shape[1], device=codes.device) // state.group_size
        codes, scales = codes ^ turned[:, group], scales.abs()
    host = codes.cpu().numpy()
    words = np.stack([pack_words((host >> b & 1).astype(np.bool_)) for b in range(scales.shape[-1])])
    stored = as_stored(np, scales.cpu().numpy(), str(like.scales.dtype)).astype(like.scales.dtype)
    result = Quantized(
        like.spec,
        words,
        np.ascontiguousarray(np.moveaxis(stored, -1, 0)),
        None if state.offset is None else state.offset.float().cpu().numpy(),
        like.errors,
    )
    exact = weight.detach().cpu().numpy().astype(np.float64)
    gap = float(np.square(dequantize(result) - exact).sum())
    norm = float(np.square(exact).sum())
    errors = (*like.errors, gap / norm if norm else 0.0)
    return Quantized(result.spec, result.words, result.scales, result.offset, errors)


class _AtLevels(torch.autograd.Function):
    """Weights at their levels, times their unit.

    The gradient passes straight through the choice of the nearest level to the latents (Bengio et al. 2013); that of a
    scale is the sum over its group of gradient times sign. Written by hand because it takes a tenth of the operations
    that autograd would make of it, and because its sums, unlike a scatter's, always add in the same order.
    """

    @staticmethod
    def forward(
        ctx: Any,
        latent: torch.Tensor | None,
        codes: torch.Tensor | None,
        scales: torch.Tensor,
        offset: torch.Tensor | None,
        unit: torch.Tensor,
    ) -> torch.Tensor:
        """Latents float or codes uint8 ``[N, G, g]``, scales ``[N, G, bases]``, offset and unit ``[N, G]``."""
        levels = levels_of(scales, offset)
        if codes is None:
            assert latent is not None
            chosen, values = nearest(latent, levels)
            codes = chosen.to(torch.uint8)
        else:
            values = levels.gather(-1, codes.long())
        ctx.save_for_backward(codes, unit)
        ctx.bases, ctx.with_offset = scales.shape[-1], offset is not None
        return values * unit.unsqueeze(-1)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """To latents, scales and offset."""
        codes, unit = ctx.saved_tensors
        gradient = gradients[0] * unit.unsqueeze(-1)
        signs = sign_table(ctx.bases, gradient.device)[codes.int()]  # [N, G, g, bases]
        scales = (gradient.unsqueeze(-2) @ signs).squeeze(-2)
        latent = gradient if ctx.needs_input_grad[0] else None
        return latent, None, scales, gradient.sum(-1) if ctx.with_offset else None, None


@functools.lru_cache
def sign_table(bases: int, device: torch.device) -> torch.Tensor:
    """The signs that each code stands for, float32 ``[2**bases, bases]``."""
    codes = torch.arange(1 << bases, device=device).unsqueeze(-1)
    return ((codes >> torch.arange(bases, device=device) & 1) * 2 - 1).float()


def levels_of(scales: torch.Tensor, offset: torch.Tensor | None) -> torch.Tensor:
    """Levels by code, ``[N, G, 2**bases]``, of scales ``[N, G, bases]`` and offset ``[N, G]``."""
    levels = (scales.unsqueeze(-2) * sign_table(scales.shape[-1], scales.device)).sum(-1)
    return levels if offset is None else levels + offset.unsqueeze(-1)


def nearest(latent: torch.Tensor, levels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (int64) and values of the levels nearest to each latent: ``[N, G, g]``, levels ``[N, G, 2**bases]``."""
    values, order = levels.sort(dim=-1, stable=True)
    middles = (values[..., 1:] + values[..., :-1]) * 0.5
    index = torch.searchsorted(middles.contiguous(), latent.contiguous())
    return order.gather(-1, index), values.gather(-1, index)


class BinaryBases(nn.Module):
    """The parametrization of one matrix.

    All numbers are relative to ``unit``, the mean distance of neighbouring levels of each group at the start, so that
    one learning rate fits every matrix of every model and any number of bases: how far a latent weight has to go to
    change its code, and what harm that does, both follow the distance of the levels. What does not train is a
    parameter, too, for then it is spread over several processes like everything else.

    Args:
        state: codes, scales and offset to start from.
        weight: the float matrix ``[N, K]``.
        transposed: give ``[K, N]``.
        train_codes: the parameter is the latent weight; otherwise it stays the float weight, and codes are fixed.
    """

    def __init__(self, state: Codes, weight: torch.Tensor, *, transposed: bool, train_codes: bool) -> None:
        super().__init__()
        self.transposed, self.group_size, self.K = transposed, state.group_size, weight.shape[1]
        self.bases = state.scales.shape[-1]
        self.bypass = False  # give the float weight instead; with fixed codes only
        grouped = self._grouped(weight.float())
        unit = 2.0 * state.scales.abs().sum(-1) / ((1 << self.bases) - 1)
        self.unit = nn.Parameter(torch.where(unit > 0, unit, torch.ones_like(unit)), requires_grad=False)
        self.scales = nn.Parameter(state.scales / self.unit.unsqueeze(-1))
        self.offset = None if state.offset is None else nn.Parameter(state.offset / self.unit)
        codes = self._grouped(state.codes)
        self.codes = None if train_codes else nn.Parameter(codes.contiguous(), requires_grad=False)
        self.start = self._latent(grouped, codes) if train_codes else weight

    def _grouped(self, values: torch.Tensor) -> torch.Tensor:
        """``[N, K]`` to ``[N, G, g]``; a shorter last group is filled with zeros."""
        pad = -self.K % self.group_size
        values = functional.pad(values, (0, pad)) if pad else values
        return values.view(values.shape[0], -1, self.group_size)

    def _flat(self, values: torch.Tensor) -> torch.Tensor:
        return values.reshape(values.shape[0], -1)[:, : self.K]

    def _latent(self, grouped: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """The float weight, moved into the cell of its code where it lies outside."""
        with torch.no_grad():
            values, order = levels_of(self.scales, self.offset).sort(dim=-1, stable=True)
            rank = order.argsort(dim=-1).gather(-1, codes.long())
            step = (values[..., -1:] - values[..., :1]) / max(1, values.shape[-1] - 1)
            edges = (values[..., 1:] + values[..., :-1]) * 0.5
            edges = torch.cat([values[..., :1] - step, edges, values[..., -1:] + step], dim=-1)
            low, high = edges.gather(-1, rank), edges.gather(-1, rank + 1)
            inside = (high - low) * _MARGIN
            relative = (grouped / self.unit.unsqueeze(-1)).clamp(low + inside, high - inside)
            return self._flat(relative).contiguous()

    def forward(self, parameter: torch.Tensor) -> torch.Tensor:
        """The weight in the parameter's orientation, float32."""
        if self.bypass:
            weight = parameter
        else:
            latent = self._grouped(parameter) if self.codes is None else None
            weight = self._flat(_AtLevels.apply(latent, self.codes, self.scales, self.offset, self.unit))  # type: ignore[no-untyped-call]
        return weight.T if self.transposed else weight

    def state(self, parameter: torch.Tensor) -> Codes:
        """What the matrix is now; ``parameter`` is the one that :meth:`forward` takes."""
        with torch.no_grad():
            unit, scales = whole(self.unit), whole(self.scales)
            offset = None if self.offset is None else whole(self.offset)
            if self.codes is not None:
                codes = whole(self.codes)
            else:
                codes = nearest(self._grouped(whole(parameter)), levels_of(scales, offset))[0].to(torch.uint8)
            offset = None if offset is None else offset * unit
            return Codes(self._flat(codes).contiguous(), scales * unit.unsqueeze(-1), offset, self.group_size)


class Student:
    """A trainable copy of a model.

    Args:
        teacher: the float model; not changed.
        targets: the matrices, by parameter.
        layers: what each starts from, by name.
        train_codes: see :class:`BinaryBases`.

    Attributes:
        model: the copy. Nothing in it but scales, offsets and latent weights has a gradient.
    """

    def __init__(
        self, teacher: nn.Module, targets: list[Target], layers: Mapping[str, Quantized], *, train_codes: bool
    ) -> None:
        self.targets = targets
        self.model = copy.deepcopy(teacher).float().requires_grad_(False)
        device = next(teacher.parameters()).device
        self._places: dict[str, tuple[nn.Module, str]] = {}
        for target in targets:
            owner_name, _, attribute = target.parameter.rpartition(".")
            weight, parameter = target.weight(teacher), self.model.get_parameter(target.parameter)
            bases = BinaryBases(
                to_codes(layers[target.name], device), weight, transposed=target.transposed, train_codes=train_codes
            )
            latent = nn.Parameter(bases.start, requires_grad=train_codes)
            del bases.start
            # A tied weight has several owners; all of them get the one latent and the one set of scales.
            for owner in [m for m in self.model.modules() if m._parameters.get(attribute) is parameter]:
                owner._parameters[attribute] = latent
                parametrize.register_parametrization(owner, attribute, bases, unsafe=True)
            self._places[target.name] = (self.model.get_submodule(owner_name), attribute)

    def matrices(self) -> Iterator[tuple[Target, BinaryBases, torch.Tensor]]:
        """Each target with its parametrization and its parameter (latent or float weight)."""
        for target in self.targets:
            owner, attribute = self._places[target.name]
            chain: Any = owner.parametrizations[attribute]  # type: ignore[index]
            yield target, chain[0], chain.original

    def parameter_groups(self, code_rate: float, scale_rate: float) -> list[dict[str, Any]]:
        """For an optimizer: latent weights, then scales and offsets."""
        found = list(self.matrices())
        latents = [parameter for _, _, parameter in found if parameter.requires_grad]
        scales = [p for _, bases, _ in found for p in bases.parameters() if p.requires_grad]
        groups = [{"params": latents, "lr": code_rate}, {"params": scales, "lr": scale_rate}]
        return [group for group in groups if group["params"]]

    def quantized(self, like: Mapping[str, Quantized], teacher: nn.Module) -> dict[str, Quantized]:
        """All matrices as they would be stored, by name."""
        return {
            target.name: to_quantized(bases.state(parameter), like[target.name], target.weight(teacher))
            for target, bases, parameter in self.matrices()
        }

    def blocks(self) -> list[list[BinaryBases]]:
        """The parametrizations of each numbered block, in order."""
        found: dict[str, list[BinaryBases]] = {}
        for target, bases, _ in self.matrices():
            found.setdefault(block_of(target.parameter), []).append(bases)
        return list(found.values())


def block_of(parameter: str) -> str:
    """``model.layers.3`` for ``model.layers.3.mlp.up_proj.weight``; the module's own name outside numbered blocks."""
    match = _BLOCK.match(parameter)
    return match[0].rstrip(".") if match else parameter.rpartition(".")[0]
