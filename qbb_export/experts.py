"""Mixtures of experts with linear layers for each expert, instead of one parameter that holds all experts.

*Why:* everything else works on matrices, and checkpoints hold matrices: put together, they no longer lie in the file
but in memory. A layer's name is ``model.layers.0.mlp.experts.3.gate_proj``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import nn

# What the experts of transformers are, where they differ from the plain kind (``use_experts_implementation``).
_PLAIN: Final = {
    "has_gate": True, "has_bias": False, "has_post_expert_norm": False, "is_transposed": False, "is_concatenated": True,
}  # fmt: skip
# What transformers makes of a checkpoint's matrices, and what we call them.
_STACKED: Final = {
    ("gate_up_proj", "MergeModulelist", "Concatenate"): ("gate_proj", "up_proj"),
    ("down_proj", "MergeModulelist"): ("down_proj",),
}


class Expert(nn.Module):
    """``down(act(gate) · up)``.

    Args:
        gate_up: ``[2·I, H]``, the rows of gate, then those of up.
        down: ``[H, I]``.
        act_fn: of the gate.
    """

    def __init__(self, gate_up: torch.Tensor, down: torch.Tensor, act_fn: Any) -> None:
        super().__init__()
        gate, up = gate_up.chunk(2)
        self.gate_proj, self.up_proj, self.down_proj, self.act_fn = _linear(gate), _linear(up), _linear(down), act_fn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[tokens, H]`` to ``[tokens, H]``."""
        y: torch.Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return y


def _linear(weight: torch.Tensor) -> nn.Linear:
    """A layer around a weight that is not copied."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


class Experts(nn.ModuleList):
    """All experts of a block; takes the place of a module of transformers.

    Every expert is called, if with no tokens: so each process of several does the same, and a traced graph has them
    all, each with a number of rows that is known at run time only.
    """

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Sum over each token's experts.

        Args:
            hidden_states: ``[tokens, H]``.
            top_k_index: int64 ``[tokens, k]``, the experts of each token, no one twice.
            top_k_weights: ``[tokens, k]``.
        """
        total = torch.zeros_like(hidden_states)
        for number, expert in enumerate(self):
            chosen = top_k_index == number
            tokens = chosen.any(dim=-1).nonzero().squeeze(-1)
            weights = (top_k_weights * chosen).sum(dim=-1)
            y = expert(hidden_states[tokens]) * weights[tokens].unsqueeze(-1)
            total = total.index_add(0, tokens, y.to(total.dtype))
        return total


def split_experts(model: nn.Module) -> None:
    """Put :class:`Experts` in the place of every plain mixture of a transformers model, in place.

    The new weights view the old ones. Other kinds of experts (with biases, gate and up interleaved, clamped) stay.
    """
    for place, module in list(model.named_modules()):
        if not _is_plain(module):
            continue
        gate_up, down = module.gate_up_proj.detach(), module.down_proj.detach()
        experts = Experts(Expert(*pair, module.act_fn) for pair in zip(gate_up, down, strict=True))
        model.set_submodule(place, experts.train(module.training))


def _is_plain(module: nn.Module) -> bool:
    from transformers.integrations.moe import _default_apply_gate

    return (
        {name for name, _ in module.named_parameters()} == {"gate_up_proj", "down_proj"}
        and all(getattr(module, name, None) is value for name, value in _PLAIN.items())
        and getattr(type(module), "_apply_gate", None) is _default_apply_gate
        and hasattr(module, "act_fn")
    )


def stacks_experts(model_type: str) -> bool:
    """Whether transformers puts the experts of a checkpoint together when it reads one."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    return any(_names(transform) for transform in get_checkpoint_conversion_mapping(model_type) or ())


@contextmanager
def apart(model_class: type[nn.Module]) -> Iterator[type[nn.Module]]:
    """A class that opens a checkpoint as the given one does, but leaves its experts apart: they stay in the file.

    Its models are to be given back their own class.
    """
    from transformers import modeling_utils

    def build(self: Any, *args: Any, **options: Any) -> None:
        model_class.__init__(self, *args, **options)
        split_experts(self)  # without data still

    def conversions(*args: Any, **options: Any) -> list[Any]:
        return [new for old in original(*args, **options) for new in _renamings(old)]

    library: Any = modeling_utils
    original = library.get_model_conversion_mapping
    library.get_model_conversion_mapping = conversions
    try:
        yield type(model_class.__name__, (model_class,), {"__init__": build, "__module__": model_class.__module__})
    finally:
        library.get_model_conversion_mapping = original


def _names(transform: Any) -> tuple[str, ...]:
    """What our layers are called that transformers would put together here; nothing for any other transform."""
    if not hasattr(transform, "operations") or len(transform.target_patterns) != 1:
        return ()
    steps = [type(step).__name__ for step in transform.operations]
    kind = transform.target_patterns[0].rpartition("experts.")[2]
    return _STACKED.get((kind, *steps), ())


def _renamings(transform: Any) -> list[Any]:
    """Renamings of single matrices in the place of a transform that puts them together."""
    from transformers.core_model_loading import WeightRenaming

    names = _names(transform)
    if len(names) != len(transform.source_patterns):
        return [transform]
    renamings = []
    for source, name in zip(transform.source_patterns, names, strict=True):
        start, _, old = source.partition(".*.")
        new = WeightRenaming(rf"{start}.(\d+).{old}", rf"{start}.\1.{name}.weight")
        new.scope_prefix, new.base_model_prefix = transform.scope_prefix, transform.base_model_prefix
        renamings.append(new)
    return renamings
