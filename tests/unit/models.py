"""Small models that the tests build and save."""

from pathlib import Path

import torch
from torch import nn


class TwoLayers(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(40, hidden)
        self.fc2 = nn.Linear(hidden, 24, bias=hidden != 17)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(torch.relu(self.fc1(x)))


def two_layers() -> nn.Module:
    torch.manual_seed(3)
    return TwoLayers(33)


def other_layers() -> nn.Module:
    return TwoLayers(17)


def tiny_llama(folder: Path, **changes: object) -> Path:
    """A Hugging Face folder with two random Llama blocks."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(5)
    config = LlamaConfig(
        **{
            "vocab_size": 97,
            "hidden_size": 64,
            "intermediate_size": 80,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            **changes,
        }
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def tiny(family: str, folder: Path) -> tuple[Path, int]:
    """A Hugging Face folder of another architecture, and the number of nodes that its blocks' linear layers make."""
    import transformers

    torch.manual_seed(6)
    common = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    text = {**common, "vocab_size": 61, "max_position_embeddings": 64}
    models = {
        "bert": (transformers.BertModel, transformers.BertConfig(**text), 12),
        "gpt2": (
            transformers.GPT2LMHeadModel,
            transformers.GPT2Config(vocab_size=61, n_positions=64, n_embd=32, n_layer=2, n_head=4),
            8,
        ),
        "qwen2": (transformers.Qwen2ForCausalLM, transformers.Qwen2Config(**text, num_key_value_heads=2), 14),
        "gpt_neox": (transformers.GPTNeoXForCausalLM, transformers.GPTNeoXConfig(**text), 8),
        "vit": (transformers.ViTModel, transformers.ViTConfig(**common, image_size=16, patch_size=4), 12),
        "albert": (transformers.AlbertModel, transformers.AlbertConfig(**text, embedding_size=16), 12),
    }
    model_class, config, layers = models[family]
    model_class(config).save_pretrained(folder)
    return folder, layers
