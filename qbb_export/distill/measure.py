"""How far a quantised model is from the float model, in float32 whatever it was trained in."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from qbb_export.distill.objective import distance, run, vocabulary_size
from qbb_export.distill.settings import DistillSettings
from qbb_export.distill.student import Target
from qbb_export.distill.text import Tokens
from qbb_export.distill.train import micro_batches, own_rows
from qbb_export.quantize import Quantized


class MeasuredModel:
    """A float32 copy of a model that takes quantised matrices in, one set after the other.

    Args:
        teacher: the float model; not changed.
        targets: the matrices.
    """

    def __init__(self, teacher: nn.Module, targets: Sequence[Target]) -> None:
        wide = all(p.dtype == torch.float32 for p in teacher.parameters())
        self._teacher = teacher if wide else copy.deepcopy(teacher).float()
        self._model = copy.deepcopy(teacher).float().requires_grad_(False)
        self._targets = list(targets)
        self._device = next(teacher.parameters()).device

    def put(self, layers: Mapping[str, Quantized] | None) -> None:
        """Take in layers by name; None: the float model's own."""
        for target in self._targets:
            if layers is not None:
                target.put(self._model, layers[target.name])
                continue
            with torch.no_grad():
                parameter = self._model.get_parameter(target.parameter)
                parameter.copy_(self._teacher.get_parameter(target.parameter))

    def distance(self, text: Sequence[Tokens]) -> float:
        """Mean over tokens, 0 or more: KL(float model || this one) in nats, or the distance of embeddings."""
        total, count, settings = 0.0, 0, DistillSettings(loss="kl")
        with torch.no_grad():
            for batch in text:
                for ids, _ in micro_batches(*own_rows(batch, self._device), vocabulary_size(self._model)):
                    found = distance(run(self._model, ids), run(self._teacher, ids), settings, ids)
                    total += float(found) * ids.numel()
                    count += ids.numel()
        return max(0.0, total / count)  # rounding may leave a hair below

    def logits(self, ids: Tokens) -> npt.NDArray[Any]:
        """float32 ``[T, V]`` for int64 ``[1, T]``; of a language model only."""
        with torch.no_grad():
            logits = run(self._model, torch.from_numpy(ids).to(self._device)).logits
        assert logits is not None
        return np.asarray(logits[0].float().cpu().numpy())
