"""Run a transformers model in PyTorch, in float32 whatever type its file has."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from qbb_export.errors import QbbError
from qbb_export.evaluate.runners import Ids, Runner
from qbb_export.load import load_torch
from qbb_export.module import to_device
from qbb_export.source import LoadOptions


class TorchRunner(Runner):
    """A Hugging Face folder or hub id.

    Args:
        source: folder or hub id.
        device: a PyTorch device.

    Raises:
        QbbError: no such model or device, or the model does not take token ids.
    """

    def __init__(self, source: str, device: str) -> None:
        self.source = source
        self._device = device
        probe = np.zeros((1, 2), dtype=np.int64)
        to_device(probe, device)  # before the work of loading
        loaded = load_torch(source, LoadOptions())
        names = [spec.name for spec in loaded.inputs]
        if "input_ids" not in names:
            raise QbbError("not a model of text", where=source, expected="an input input_ids", got=names)
        self.vocabulary = next(spec.high for spec in loaded.inputs if spec.name == "input_ids")
        self.tokenizer = loaded.tokenizer
        # Segments are left out: a model takes missing ones as 0.
        self._with_mask = "attention_mask" in names
        self._module = loaded.module.float().to(device)
        self.language_model = False  # the probe returns all outputs
        self.language_model = "logits" in self.outputs(probe)

    def outputs(self, ids: Ids) -> dict[str, npt.NDArray[Any]]:
        """See :class:`Runner`."""
        feeds = {"input_ids": to_device(ids, self._device)}
        if self._with_mask:
            feeds["attention_mask"] = torch.ones_like(feeds["input_ids"])
        try:
            with torch.inference_mode():
                result = self._module(**feeds)
        except (RuntimeError, IndexError, ValueError) as error:  # too long for its positions, out of memory
            raise QbbError(f"PyTorch cannot run {ids.shape[1]} tokens", where=self.source, got=error) from error
        wanted = {"logits": result["logits"]} if self.language_model else result
        return {
            name: tensor.to("cpu", torch.float32).numpy()
            for name, tensor in wanted.items()
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point()
        }
