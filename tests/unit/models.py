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


def byte_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer of 280 tokens, as onnxruntime-genai can read it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=["<end>", "<start>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        ["the cat sat on the mat and the dog sat on the cat with that other hat"] * 4, trainer
    )
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", bos_token="<start>")
    wrapped.save_pretrained(folder)


def tiny_decoder(family: str, folder: Path, **changes: object) -> tuple[Path, int]:
    """A Hugging Face folder of two random blocks with a tokenizer, and the number of its blocks' linear layers.

    Weights of norms and biases are random, too: a builder that forgets one is found out.
    """
    import transformers

    torch.manual_seed(7)
    common = {
        "vocab_size": 288, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.1,
        "bos_token_id": 1, "eos_token_id": 0, "pad_token_id": 0,
    }  # fmt: skip
    own: dict[str, tuple[str, dict[str, object], int]] = {
        "llama": ("Llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}, 14),
        "mistral": ("Mistral", {"sliding_window": 8}, 14),
        "qwen2": ("Qwen2", {}, 14),
        "qwen3": ("Qwen3", {"tie_word_embeddings": True}, 14),
        "phi": ("Phi", {"num_key_value_heads": 4, "head_dim": 32, "hidden_size": 128}, 12),
        "phi3": ("Phi3", {"original_max_position_embeddings": 128}, 8),
        "olmo": ("Olmo", {}, 14),
        "gemma": ("Gemma", {}, 14),
        "gemma2": ("Gemma2", {"query_pre_attn_scalar": 16, "sliding_window": 8}, 14),
        "gemma3": (
            "Gemma3",
            {
                "query_pre_attn_scalar": 16,
                "sliding_window": 8,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            14,
        ),
        "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}, 34),
        "qwen2_moe": (
            "Qwen2Moe",
            {
                "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "decoder_sparse_step": 2,
                "shared_expert_intermediate_size": 48,
            },
            34,
        ),
        "qwen3_moe": (
            "Qwen3Moe",
            {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "norm_topk_prob": True},
            40,
        ),
        "olmoe": ("Olmoe", {"num_experts": 4, "num_experts_per_tok": 2}, 34),
    }  # fmt: skip
    name, options, layers = own[family]
    config_class = getattr(transformers, f"{name}TextConfig" if family == "gemma3" else f"{name}Config")
    model = getattr(transformers, f"{name}ForCausalLM")(config_class(**{**common, **options, **changes}))
    for parameter in (p for p in model.parameters() if p.dim() == 1):
        nn.init.normal_(parameter, parameter.mean().item(), 0.2)
    model.save_pretrained(folder)
    byte_tokenizer(folder)
    return folder, layers
