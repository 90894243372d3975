"""What the float model and its copy give, and how far apart they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final
from weakref import WeakSet

import torch
from torch import nn
from torch.nn import functional

from qbb_export.distill.settings import DistillSettings

# Models found to give neither tokens' logits nor a last hidden state.
_CLASSIFIERS: Final[WeakSet[nn.Module]] = WeakSet()


@dataclass(frozen=True)
class Outputs:
    """What one model makes of a batch.

    Args:
        logits: ``[batch, sequence, tokens]`` of a language model, else None.
        hidden: ``[batch, sequence, d]``, the last hidden state of an encoder or a classifier, else None.
        blocks: outputs of the blocks, ``[batch, sequence, d]`` each; empty unless asked for.
    """

    logits: torch.Tensor | None
    hidden: torch.Tensor | None
    blocks: tuple[torch.Tensor, ...]

    def rows(self, part: slice) -> Outputs:
        """Those of some sequences of the batch."""
        return Outputs(
            None if self.logits is None else self.logits[part],
            None if self.hidden is None else self.hidden[part],
            tuple(block[part] for block in self.blocks),
        )


def text_config(model: nn.Module) -> Any:
    """The configuration of a transformers model's text part."""
    config: Any = model.config
    return config.get_text_config()


def vocabulary_size(model: nn.Module) -> int:
    """Number of token ids."""
    return int(text_config(model).vocab_size)


def writes_text(model: nn.Module) -> bool:
    """Whether a transformers model is a decoder that generates; inputs of all others are made up."""
    return bool(getattr(model, "can_generate", lambda: False)())


def predicts_tokens(model: nn.Module) -> bool:
    """Whether a transformers model has a head for tokens. Only such a model has met mask tokens often enough."""
    return getattr(model, "get_output_embeddings", lambda: None)() is not None


def run(model: nn.Module, ids: torch.Tensor, *, blocks: bool = False) -> Outputs:
    """Run a transformers model on token ids ``[batch, sequence]``."""

    def outputs(with_blocks: bool) -> Any:
        # No mask: models look into one, which waits for the GPU, and then find that nothing is masked.
        return model(input_ids=ids, output_hidden_states=with_blocks)

    result = outputs(blocks or model in _CLASSIFIERS)
    logits, hidden = getattr(result, "logits", None), getattr(result, "last_hidden_state", None)
    if hidden is None and (logits is None or logits.ndim != 3):  # its last block says more than its few classes
        if result.hidden_states is None:
            _CLASSIFIERS.add(model)
            result = outputs(True)
        logits, hidden = None, result.hidden_states[-1]
    return Outputs(logits, hidden if logits is None else None, tuple(result.hidden_states[1:]) if blocks else ())


def distance(student: Outputs, teacher: Outputs, settings: DistillSettings, ids: torch.Tensor) -> torch.Tensor:
    """The loss of a recipe for one batch: a mean over tokens, float32 scalar."""
    if student.logits is not None and teacher.logits is not None:
        loss = logits_distance(student.logits, teacher.logits, settings.loss, ids)
    else:
        assert student.hidden is not None and teacher.hidden is not None
        loss = embedding_distance(student.hidden, teacher.hidden)
    if settings.features:
        pairs = zip(student.blocks, teacher.blocks, strict=True)
        loss = loss + settings.features * torch.stack([_block_distance(s, t) for s, t in pairs]).mean()
    return loss


def _block_distance(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean squared error of ``[batch, sequence, d]``, relative to each sequence's variance.

    Sequence by sequence, so that a batch may be taken in parts.
    """
    wanted = teacher.float().flatten(1)
    return ((student.float().flatten(1) - wanted).square().mean(1) / wanted.var(1)).mean()


def logits_distance(student: torch.Tensor, teacher: torch.Tensor, kind: str, ids: torch.Tensor) -> torch.Tensor:
    """``kl``: KL(teacher || student) in nats; ``mse``: of the logits; ``ce``: of the tokens that follow."""
    if kind == "kl":
        log_s = functional.log_softmax(student.float(), dim=-1)
        log_t = functional.log_softmax(teacher.float(), dim=-1)
        return functional.kl_div(log_s.flatten(0, 1), log_t.flatten(0, 1), log_target=True, reduction="batchmean")
    if kind == "mse":
        return functional.mse_loss(student.float(), teacher.float())
    return functional.cross_entropy(student[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def embedding_distance(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """1 - cosine of the tokens' vectors, and of their mean (a sentence's embedding), added up."""
    tokens = 1.0 - functional.cosine_similarity(student.float(), teacher.float(), dim=-1)
    means = 1.0 - functional.cosine_similarity(student.float().mean(1), teacher.float().mean(1), dim=-1)
    return tokens.mean() + means.mean()
