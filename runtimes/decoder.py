"""Token by token in plain ONNX Runtime: a decoder's cache stays in place, and every run reads and extends it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from qbb_export.errors import QbbError

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

Array = npt.NDArray[Any]
Ids = npt.NDArray[np.int64]

# How inputs and outputs that hold the cache begin.
PAST: Final = "past_key_values."
PRESENT: Final = "present."
_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


def empty_cache(session: InferenceSession, batch: int, length: int = 0) -> dict[str, Array]:
    """Inputs ``past_key_values.*`` of a decoder, zeros ``[batch, heads, length, head_size]``; none without one."""
    return {
        value.name: np.zeros((batch, value.shape[1], length, value.shape[3]), _TYPES[value.type])
        for value in session.get_inputs()
        if value.name.startswith(PAST)
    }


class Decoder:
    """A sequence under way. Past and present are one buffer, so that a step costs no copy of the cache.

    Args:
        session: of a folder's ``model.onnx`` on a CPU, see ``ort.session``.
        length: tokens that the cache has room for.
        batch: sequences.
    """

    def __init__(self, session: InferenceSession, length: int, batch: int = 1) -> None:
        self._session = session
        self._cache = empty_cache(session, batch, length)
        self._inputs = {value.name: value.type for value in session.get_inputs()}
        self._room, self._batch = length, batch
        self.tokens = 0

    def step(self, ids: Ids) -> Array:
        """Logits ``[batch, tokens, vocabulary]`` of new tokens int64 ``[batch, tokens]``.

        Raises:
            QbbError: the cache is full, or ONNX Runtime cannot run them.
        """
        total = self.tokens + ids.shape[1]
        if total > self._room:
            raise QbbError("no room for more tokens", where="cache", expected=f"<= {self._room}", got=total)
        binding = self._session.io_binding()
        feeds = {"input_ids": ids, "attention_mask": np.ones((self._batch, total), np.int64)}
        if "position_ids" in self._inputs:
            feeds["position_ids"] = np.tile(np.arange(self.tokens, total), (self._batch, 1))
        try:
            for name, array in feeds.items():
                binding.bind_cpu_input(name, np.ascontiguousarray(array))
            for name, buffer in self._cache.items():
                place = ("cpu", 0, buffer.dtype.type, buffer.shape, buffer.ctypes.data)
                binding.bind_input(name, *place)
                binding.bind_output(PRESENT + name.removeprefix(PAST), *place)
            binding.bind_output("logits", "cpu")
            self._session.run_with_iobinding(binding)
            logits: Array = binding.get_outputs()[-1].numpy()
        except Exception as error:  # onnxruntime's exceptions share no base class
            raise QbbError(f"ONNX Runtime cannot run {ids.shape[1]} tokens", where="decoder", got=error) from error
        self.tokens = total
        return logits
