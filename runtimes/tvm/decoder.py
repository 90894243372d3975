"""Token by token with a compiled decoder: its cache goes in and comes out one step longer."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from qbb_export.errors import QbbError
from qbb_export.runtimes.tvm.load import Compiled

PAST: Final = "past_key_values."
PRESENT: Final = "present."


class Decoder:
    """A sequence under way. All sequences of a batch are equally long.

    Args:
        compiled: a folder's ``model.onnx``, compiled.
        batch: sequences.

    Raises:
        QbbError: it has no cache.
    """

    def __init__(self, compiled: Compiled, batch: int = 1) -> None:
        self._compiled, self._batch = compiled, batch
        inputs = compiled.manifest["inputs"]
        self._positions = any(value["name"] == "position_ids" for value in inputs)
        self._cache = {
            value["name"]: compiled.tensor(
                np.zeros((batch, value["shape"][1], 0, value["shape"][3]), np.dtype(value["dtype"]))
            )
            for value in inputs
            if value["name"].startswith(PAST)
        }
        if not self._cache:
            raise QbbError("not a decoder with a cache", where="manifest", expected=f"inputs {PAST}*")
        self.tokens = 0

    def step(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """Logits ``[batch, tokens, vocabulary]`` of new tokens int64 ``[batch, tokens]``."""
        total = self.tokens + ids.shape[1]
        feeds: dict[str, Any] = {"input_ids": ids, "attention_mask": np.ones((self._batch, total), np.int64)}
        if self._positions:
            feeds["position_ids"] = np.tile(np.arange(self.tokens, total), (self._batch, 1))
        tensors = {name: self._compiled.tensor(np.ascontiguousarray(array)) for name, array in feeds.items()}
        found = self._compiled.run_tensors({**tensors, **self._cache})
        self._cache = {name: found[PRESENT + name.removeprefix(PAST)] for name in self._cache}
        self.tokens = total
        logits: npt.NDArray[Any] = found["logits"].numpy()
        return logits
