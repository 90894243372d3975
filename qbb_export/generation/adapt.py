"""What onnxruntime-genai's builder (0.18) makes of a model where transformers 5 does otherwise."""

from __future__ import annotations

from typing import Any


def adapt_config(config: Any) -> None:
    """Change a transformers configuration in place, so that the builder makes of it what transformers does.

    1. rotary settings for each kind of layer (Gemma 3): the builder reads them under the names of transformers 4
    2. a sliding window without kinds of layers (Mistral, Phi-3): all layers slide; the builder would let none
    3. kinds of scaling: the builder reads a long-range one's under the name of transformers 4, and for YaRN wants
       numbers that transformers has defaults for
    4. the epsilon of a LayerNorm (Phi): the builder knows that of an RMS norm only, and takes 1e-6 where there is none

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
