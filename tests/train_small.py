"""Small real models of several architectures, trained here in minutes, so that nothing has to be downloaded.

As a command (it prints perplexities on the rest of the text)::

    python -m tests.train_small gpt2 OUT --text FILE --steps 1000 --device cpu

They are Hugging Face folders in float32 with a byte-level BPE tokenizer of their own.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn.functional import cross_entropy

VOCABULARY = 1024
CONTEXT = 256
HIDDEN, LAYERS, HEADS = 128, 4, 4
DROPOUT, DECAY, WARM_UP = 0.1, 0.1, 0.1
BATCH, RATE = 8, 3e-3  # rows of CONTEXT tokens in a step
# Masked tokens are slow to learn from: more and smaller steps, and more of them masked than BERT's 15 %.
ENCODER_BATCH, ENCODER_RATE, ENCODER_MASKED = 2, 1e-3, 0.3
MASKED = 0.15  # when it is measured
START = "<|endoftext|>"
ENCODER_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")

# What each kind adds to the tests, beside Llama: LayerNorm, biases, learned positions and Conv1D weights; parallel
# blocks; biases at q, k and v only and fewer key/value heads; positions with an offset, ReLU.
LANGUAGE_MODELS: dict[str, Callable[[int], Any]] = {
    "gpt2": lambda start: transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=CONTEXT,
        n_embd=HIDDEN,
        n_layer=LAYERS,
        n_head=HEADS,
        embd_pdrop=DROPOUT,
        resid_pdrop=DROPOUT,
        attn_pdrop=DROPOUT,
        bos_token_id=start,
        eos_token_id=start,
    ),
    "gpt_neox": lambda start: transformers.GPTNeoXConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=CONTEXT,
        hidden_size=HIDDEN,
        intermediate_size=4 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        hidden_dropout=DROPOUT,
        attention_dropout=DROPOUT,
        use_parallel_residual=True,
        bos_token_id=start,
        eos_token_id=start,
    ),
    "qwen2": lambda start: transformers.Qwen2Config(
        vocab_size=VOCABULARY,
        max_position_embeddings=CONTEXT,
        hidden_size=HIDDEN,
        intermediate_size=3 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS // 2,
        attention_dropout=DROPOUT,
        tie_word_embeddings=True,
        bos_token_id=start,
        eos_token_id=start,
    ),
    "opt": lambda start: transformers.OPTConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=CONTEXT,
        hidden_size=HIDDEN,
        word_embed_proj_dim=HIDDEN,
        ffn_dim=4 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        dropout=DROPOUT,
        attention_dropout=DROPOUT,
        bos_token_id=start,
        eos_token_id=start,
        pad_token_id=start,
    ),
}
ENCODERS: dict[str, Callable[[int], Any]] = {
    "bert": lambda pad: transformers.BertConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=CONTEXT,
        hidden_size=HIDDEN,
        intermediate_size=4 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        pad_token_id=pad,
    ),
}


def train_language_model(kind: str, folder: Path, text: str, steps: int, seed: int = 0, device: str = "cpu") -> Any:
    """Train a decoder on next tokens and save it with its tokenizer.

    Args:
        kind: one of ``LANGUAGE_MODELS``.
        folder: is made.
        text: to train on, tokenizer and model; some 100 kB at least.
        steps: of AdamW; some 1000 for a decoder, 4000 for an encoder.
        seed: of the weights and of the order of the text.
        device: of PyTorch.

    Returns:
        The model, in eval mode.
    """
    tokenizer = _train_tokenizer(text, (START,))
    start = tokenizer.token_to_id(START)

    def loss(model: Any, rows: torch.Tensor) -> torch.Tensor:
        rows[::4, 0] = start  # sampling may begin with it, so it must have been seen
        logits = model(input_ids=rows).logits[:, :-1]
        return cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())

    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(LANGUAGE_MODELS[kind](start))
    _train(model.to(device), loss, _encode(tokenizer, text), steps, seed, BATCH, RATE)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=START, eos_token=START)
    _save(model, fast, folder)
    return model


def train_encoder(kind: str, folder: Path, text: str, steps: int, seed: int = 0, device: str = "cpu") -> Any:
    """Train an encoder on masked tokens (Devlin et al. 2019) and save it, without its head, with its tokenizer.

    Arguments are those of :func:`train_language_model`; ``kind`` is one of ``ENCODERS``.

    Returns:
        The model with its head, in eval mode.
    """
    tokenizer = _train_tokenizer(text, ENCODER_TOKENS)
    pad, _, cls, sep, mask = (tokenizer.token_to_id(token) for token in ENCODER_TOKENS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", cls), ("[SEP]", sep)]
    )

    def loss(model: Any, rows: torch.Tensor) -> torch.Tensor:
        rows[:, 0], rows[:, -1] = cls, sep
        masked, chosen = _mask(rows, mask, ENCODER_MASKED)
        return cross_entropy(model(input_ids=masked).logits[chosen].float(), rows[chosen])

    torch.manual_seed(seed)
    model = transformers.AutoModelForMaskedLM.from_config(ENCODERS[kind](pad))
    _train(model.to(device), loss, _encode(tokenizer, text), steps, seed, ENCODER_BATCH, ENCODER_RATE)
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), ENCODER_TOKENS, strict=True))
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    _save(model, fast, folder, model.base_model)
    return model


def perplexity(model: Any, ids: np.ndarray[Any, Any], window: int = CONTEXT) -> float:
    """Per token, in windows that do not overlap; the first token of each is context only."""
    total, count = 0.0, 0
    for rows in _windows(ids, window, model.device):
        logits = model(input_ids=rows).logits[:, :-1]
        total += float(cross_entropy(logits.flatten(0, 1).double(), rows[:, 1:].flatten(), reduction="sum"))
        count += rows[:, 1:].numel()
    return math.exp(total / count)


def masked_perplexity(model: Any, ids: np.ndarray[Any, Any], tokenizer: Tokenizer, window: int = CONTEXT) -> float:
    """Per masked token, with one fixed choice of them."""
    cls, sep, mask = (tokenizer.token_to_id(token) for token in ENCODER_TOKENS[2:])
    torch.manual_seed(0)
    total, count = 0.0, 0
    for rows in _windows(ids, window, model.device):
        rows[:, 0], rows[:, -1] = cls, sep
        masked, chosen = _mask(rows, mask, MASKED)
        total += float(cross_entropy(model(input_ids=masked).logits[chosen].double(), rows[chosen], reduction="sum"))
        count += int(chosen.sum())
    return math.exp(total / count)


def unigram_perplexity(train: np.ndarray[Any, Any], ids: np.ndarray[Any, Any]) -> float:
    """What the frequencies of the tokens alone give: any model that has learned something is far below."""
    counts = np.bincount(train, minlength=VOCABULARY) + 1.0
    return float(np.exp(-np.log(counts / counts.sum())[ids].mean()))


def split_text(file: Path, share: float) -> tuple[str, str]:
    """The first ``share`` of a text and the rest, parted at a line break."""
    text = file.read_text(encoding="utf-8")
    cut = text.index("\n", int(len(text) * share)) + 1
    return text[:cut], text[cut:]


def _train_tokenizer(text: str, special: tuple[str, ...]) -> Tokenizer:
    """Byte-level BPE: any text can be written with it, without an unknown token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    assert tokenizer.get_vocab_size() == VOCABULARY, "text is too short for the tokenizer"
    return tokenizer


def _encode(tokenizer: Tokenizer, text: str) -> np.ndarray[Any, Any]:
    return np.asarray(tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int64)


def _train(
    model: Any,
    loss: Callable[[Any, torch.Tensor], torch.Tensor],
    ids: np.ndarray[Any, Any],
    steps: int,
    seed: int,
    batch: int,
    rate: float,
) -> None:
    """AdamW with warm-up and a cosine to zero on random windows of the text; matrices decay, vectors do not."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95))
    random = np.random.default_rng(seed)
    model.config.use_cache = False
    model.train()
    for step in range(steps):
        warm, done = min(1.0, (step + 1) / (WARM_UP * steps)), step / steps
        for group in optimizer.param_groups:
            group["lr"] = rate * warm * 0.5 * (1.0 + math.cos(math.pi * done))
        starts = random.integers(0, len(ids) - CONTEXT, batch)
        rows = torch.from_numpy(np.stack([ids[s : s + CONTEXT] for s in starts])).to(model.device)
        optimizer.zero_grad()
        loss(model, rows).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.config.use_cache = True
    model.eval()


def _mask(rows: torch.Tensor, mask: int, share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """BERT's masking: of the chosen tokens 80 % become the mask, 10 % a random token, 10 % stay."""
    draw = torch.rand(rows.shape, device=rows.device)
    draw[:, 0] = draw[:, -1] = 1.0  # the tokens at the ends are given
    noise = torch.randint_like(rows, len(ENCODER_TOKENS), VOCABULARY)
    masked = torch.where(draw < 0.8 * share, mask, torch.where(draw < 0.9 * share, noise, rows))
    return masked, draw < share


def _windows(ids: np.ndarray[Any, Any], window: int, device: Any) -> Iterator[torch.Tensor]:
    rows = torch.from_numpy(ids[: len(ids) // window * window].reshape(-1, window))
    with torch.no_grad():
        for block in rows.split(BATCH):
            yield block.to(device).clone()


def _save(model: Any, tokenizer: Any, folder: Path, part: Any = None) -> None:
    model.to("cpu")
    (model if part is None else part).save_pretrained(folder)
    tokenizer.model_max_length = CONTEXT
    tokenizer.save_pretrained(folder)


def main() -> None:
    """Train one model on the first part of a text and print perplexities on the rest."""
    parser = argparse.ArgumentParser(prog="python -m tests.train_small", description=main.__doc__)
    parser.add_argument("kind", choices=[*LANGUAGE_MODELS, *ENCODERS])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 file")
    parser.add_argument("--share", type=float, default=0.5, help="train on this much of the text (default: 0.5)")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="on a CPU (default: all)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.utils.logging.disable_progress_bar()
    train, heldout = split_text(options.text, options.share)
    began = time.monotonic()
    work = train_language_model if options.kind in LANGUAGE_MODELS else train_encoder
    model = work(options.kind, options.folder, train, options.steps, options.seed, options.device)
    seconds = time.monotonic() - began
    tokenizer = Tokenizer.from_file(str(options.folder / "tokenizer.json"))
    ids, rest = _encode(tokenizer, train), _encode(tokenizer, heldout)
    size = sum(p.numel() for p in model.parameters())
    print(f"{options.kind}: {size / 1e6:.2f} M parameters, {options.steps} steps in {seconds:.0f} s, {len(ids)} tokens")
    print(f"unigram perplexity, held out: {unigram_perplexity(ids, rest):.2f}")
    for name, tokens in (("trained on", ids), ("held out", rest)):
        if options.kind in LANGUAGE_MODELS:
            print(f"perplexity, {name}: {perplexity(model, tokens):.2f}")
        else:
            print(f"perplexity of masked tokens, {name}: {masked_perplexity(model, tokens, tokenizer):.2f}")


if __name__ == "__main__":
    main()
