"""What onnxruntime-genai's builder (0.18) makes of a model where transformers 5 does otherwise."""

from __future__ import annotations

import copy
from typing import Any, Final

from qbb_export.errors import QbbError
from qbb_export.generation.mixture import Routing

# Mixtures of experts that the builder does not know, and what they are but for the experts.
_DENSE: Final = {
    "MixtralForCausalLM": "MistralForCausalLM",
    "Qwen2MoeForCausalLM": "Qwen2ForCausalLM",
    "Qwen3MoeForCausalLM": "Qwen3ForCausalLM",
}
_PARTS: Final = {"gate", "experts"}
_SHARED: Final = {"shared_expert", "shared_expert_gate"}


def adapt_config(config: Any) -> None:
    """Change a transformers configuration in place, so that the builder makes of it what transformers does.

    1. rotary settings for each kind of layer (Gemma 3): the builder reads them under the names of transformers 4
    2. a sliding window without kinds of layers (Mistral, Phi-3): all layers slide; the builder would let none
    3. kinds of scaling: the builder reads a long-range one's under the name of transformers 4, and for YaRN wants
       numbers that transformers has defaults for
    4. the epsilon of a LayerNorm (Phi): the builder knows that of an RMS norm only, and takes 1e-6 where there is none
    5. mixtures of experts: the builder makes the model of the same kind without, and asks us for the mixtures
    6. OLMo's norms have 1e-5 in the code, not in the configuration; see also :func:`subtracts_mean`

    An export is compared with PyTorch before it is finished, so a difference that is not listed here does not pass.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    if "full_attention" in rope:  # rule 1
        config.rope_parameters = dict(rope["full_attention"])
        config.rope_theta = rope["full_attention"]["rope_theta"]
        config.rope_local_base_freq = rope["sliding_attention"]["rope_theta"]
    if rope.get("rope_type") == "longrope":  # rule 3
        config.rope_parameters = {"type": "longrope"} | config.rope_parameters
    if rope.get("rope_type") == "yarn":
        config.rope_parameters = {"beta_fast": 32.0, "beta_slow": 1.0} | config.rope_parameters
    if getattr(config, "sliding_window", None) and getattr(config, "layer_types", None) is None:  # rule 2
        config.layer_types = ["sliding_attention"] * config.num_hidden_layers
    if not hasattr(config, "rms_norm_eps") and hasattr(config, "layer_norm_eps"):  # rule 4
        config.rms_norm_eps = config.layer_norm_eps
    if config.architectures and config.architectures[0] in _DENSE:  # rule 5
        config.architectures = [_DENSE[config.architectures[0]]]
        config.num_local_experts = config.num_experts = 0
        config.moe_intermediate_size = config.intermediate_size  # layers without a mixture have this one
    if getattr(config, "model_type", None) == "olmo":  # rule 6
        config.rms_norm_eps = 1e-5


def subtracts_mean(norm: Any) -> bool:
    """Whether a norm with a ``weight`` is a LayerNorm, found out by trying it: the builder takes all for RMS norms."""
    import torch

    x = torch.linspace(-1, 2, norm.weight.shape[-1], dtype=norm.weight.dtype, device=norm.weight.device)
    with torch.no_grad():
        return torch.allclose(norm(x), norm(x + 1), rtol=0.05, atol=0.05)


def routing_of(block: Any, place: str) -> Routing:
    """How a mixture chooses, found out by trying its router.

    Args:
        block: of transformers, with :class:`~qbb_export.experts.Experts`.
        place: its name, for the message.

    Raises:
        QbbError: it has other parts, routes in another way, or has another activation.
    """
    import torch

    from qbb_export.experts import Experts

    names = {name for name, _ in block.named_children()}
    if names not in (_PARTS, _PARTS | _SHARED) or not isinstance(block.experts, Experts):
        raise _other(place, f"a mixture with {', '.join(sorted(names - _PARTS))}")
    router, experts = copy.deepcopy(block.gate).float(), block.experts  # in few bits equal products would be many
    act_fn: Any = experts[0].act_fn
    values = torch.linspace(-4, 4, 65)
    if not torch.allclose(act_fn(values), torch.nn.functional.silu(values), rtol=0, atol=1e-6):
        raise _other(place, f"experts with {type(act_fn).__name__}")
    weight = router.weight.detach()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, weight.shape[1], generator=generator).to(weight.device)
    with torch.no_grad():
        _, weights, index = router(x)
        chances = torch.nn.functional.linear(x, weight).softmax(dim=-1)
    k = index.shape[-1]
    top = chances.topk(k, dim=-1)
    for normalized in (True, False):
        expected = top.values / top.values.sum(dim=-1, keepdim=True) if normalized else top.values
        same = torch.allclose(weights, expected, rtol=1e-5, atol=1e-6)
        if same and torch.equal(index, top.indices):
            return Routing(len(experts), k, normalized)
    raise _other(place, f"{type(router).__name__}, which is no softmax followed by a choice of the largest")


def _other(place: str, got: str) -> QbbError:
    expected = "softmax, the largest, SiLU; or -o FILE.onnx"
    return QbbError("mixture of experts cannot be exported with a KV cache", where=place, expected=expected, got=got)
