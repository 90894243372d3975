"""Mixtures of experts with one linear layer for each expert and matrix, instead of one parameter that holds all experts.

*Why:* everything else works on matrices. A layer's name is then ``model.layers.0.mlp.experts.3.gate_up_proj``.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import nn

# What the experts of transformers are, where they differ from the plain kind (``use_experts_implementation``).
_PLAIN: Final = {
    "has_gate": True, "has_bias": False, "has_post_expert_norm": False, "is_transposed": False, "is_concatenated": True,
}  # fmt: skip


class Expert(nn.Module):
    """``down(act(gate) · up)``, gate and up being the halves of one product.

    Args:
        gate_up: ``[2·I, H]``.
        down: ``[H, I]``.
        act_fn: of the gate.
    """

    def __init__(self, gate_up: torch.Tensor, down: torch.Tensor, act_fn: Any) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj, self.act_fn = _linear(gate_up), _linear(down), act_fn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[tokens, H]`` to ``[tokens, H]``."""
        both, half = self.gate_up_proj(x), self.down_proj.in_features
        y: torch.Tensor = self.down_proj(self.act_fn(both[:, :half]) * both[:, half:])
        return y


def _linear(weight: torch.Tensor) -> nn.Linear:
    """A layer around a weight that is not copied."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


class Experts(nn.ModuleList):
    """All experts of a block; takes the place of a module of transformers.

    Every expert is called, if with no tokens: so each process of several does the same, and a traced graph has them all.
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
    """Put :class:`Experts` in the place of every plain mixture of a transformers model.

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
