"""What the recipe does to real models: figures that must not get worse."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from qbb_export.quantize import QuantizeSettings, dequantize, quantize

SENTENCES = Path(__file__).resolve().parents[1] / "data" / "sentences.txt"


def quantize_linears(model: torch.nn.Module, prefix: str, settings: QuantizeSettings) -> int:
    """Replace the weights of all linears below ``prefix`` by what their quantized form stands for; how many."""
    layers = [m for n, m in model.named_modules() if n.startswith(prefix) and isinstance(m, torch.nn.Linear)]
    for layer in layers:
        layer.weight.data = torch.from_numpy(dequantize(quantize(layer.weight.detach().float().numpy(), settings)))
    return len(layers)


@pytest.mark.slow
@pytest.mark.parametrize(("bases", "offset", "least"), [(4, False, 0.972), (4, True, 0.976), (3, True, 0.90)])
@torch.no_grad()
def test_sentence_embeddings(minilm_dir: Path, bases: int, offset: bool, least: float) -> None:
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(minilm_dir, dtype=torch.float32).eval()
    tokens = AutoTokenizer.from_pretrained(minilm_dir)(
        SENTENCES.read_text(encoding="utf-8").splitlines(), padding=True, truncation=True, return_tensors="pt"
    )
    mask = tokens["attention_mask"][..., None]

    def embeddings() -> torch.Tensor:
        hidden = model(**tokens).last_hidden_state
        return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    float_embeddings = embeddings()
    assert len(float_embeddings) >= 100
    assert quantize_linears(model, "encoder.layer", QuantizeSettings(bases, 64, offset)) == 36
    assert float((embeddings() * float_embeddings).sum(-1).mean()) >= least


@pytest.mark.slow
@pytest.mark.parametrize(("bases", "most"), [(4, 27.2), (3, 31.5)])
@torch.no_grad()
def test_perplexity_on_held_out_books(shared: Path, bases: int, most: float) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = shared / "models" / "gutenberg-llama-28m"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = (shared / "data" / "gutenberg_heldout.txt").read_text(encoding="utf-8")
    text = text.replace("\n\0\n", tokenizer.eos_token)  # a NUL line ends a document
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    windows = ids[: len(ids) // 1024 * 1024].view(-1, 1024)
    assert len(windows) == 156
    assert quantize_linears(model, "model.layers", QuantizeSettings(bases, 128)) == 56
    loss = 0.0
    for window in windows.split(4):
        logits = model(window, use_cache=False).logits[:, :-1]
        loss += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten(), reduction="sum"))
    assert math.exp(loss / (156 * 1023)) <= most
