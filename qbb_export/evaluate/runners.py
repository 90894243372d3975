"""Models that turn token ids into logits or embeddings, one class for each way to run them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qbb_export.errors import QbbError
from qbb_export.evaluate.text import tokenizer_beside
from qbb_export.generation.folder import onnx_file
from qbb_export.runtimes import ort
from qbb_export.runtimes.decoder import Decoder, empty_cache

Array = npt.NDArray[Any]
Ids = npt.NDArray[np.int64]

# What a graph may want, made from the token ids.
_FEEDS: dict[str, Callable[[Ids], Array]] = {
    "input_ids": lambda ids: ids,
    "attention_mask": np.ones_like,
    "token_type_ids": np.zeros_like,
    "position_ids": lambda ids: np.arange(ids.shape[1])[None],
}
_TYPES: dict[str, np.dtype[Any]] = {
    "tensor(int64)": np.dtype(np.int64),
    "tensor(int32)": np.dtype(np.int32),
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
}


class Runner(ABC):
    """An open model.

    Attributes:
        source: what the user called it.
        language_model: it has an output ``logits``; else it is an encoder.
        tokenizer: its tokenizer.json, if there is one.
        vocabulary: token ids must be below; None where the model does not say.
    """

    source: str
    language_model: bool
    tokenizer: Path | None
    vocabulary: int | None

    @abstractmethod
    def outputs(self, ids: Ids) -> dict[str, Array]:
        """Run on int64 ``[1, T]``: ``logits`` of a language model, all outputs of an encoder.

        Raises:
            QbbError: the model cannot be run on them.
        """

    def logits(self, ids: Ids) -> Array:
        """Float ``[T, V]`` for int64 ``[1, T]``.

        Raises:
            QbbError: the model cannot be run, or its logits have another shape.
        """
        self._check(ids)
        logits = self.outputs(ids)["logits"]
        if logits.ndim != 3 or logits.shape[:2] != ids.shape:
            expected = f"logits [1, {ids.shape[1]}, vocabulary]"
            raise QbbError("not a language model", where=self.source, expected=expected, got=list(logits.shape))
        rows: Array = logits[0]
        return rows

    def embedding(self, ids: Ids) -> Array:
        """Float64 ``[d]`` for int64 ``[1, T]``: the mean over tokens of the first float output ``[1, T, d]``, else the
        first float output ``[1, d]``.

        Raises:
            QbbError: the model cannot be run, or has no such output.
        """
        self._check(ids)
        found = {name: a for name, a in self.outputs(ids).items() if np.issubdtype(a.dtype, np.floating)}
        for array in found.values():
            if array.ndim == 3 and array.shape[:2] == ids.shape:
                return np.asarray(array[0].mean(axis=0, dtype=np.float64))
        for array in found.values():
            if array.ndim == 2 and len(array) == 1:
                return np.asarray(array[0], dtype=np.float64)
        raise QbbError(
            "not an encoder of text",
            where=self.source,
            expected="an output [batch, sequence, d] or [batch, d]",
            got={name: list(array.shape) for name, array in found.items()},
        )

    def _check(self, ids: Ids) -> None:
        if self.vocabulary is not None and ids.max() >= self.vocabulary:
            expected = f"tokens below {self.vocabulary}"
            raise QbbError(
                "tokenizer and model do not fit", where=self.source, expected=expected, got=f"token {ids.max()}"
            )


class OnnxRunner(Runner):
    """An .onnx file in ONNX Runtime on the CPU: ours, a float one, or one with operators of ONNX Runtime itself.

    Args:
        path: the file.
        library: False runs the function body instead of our kernel.
        mode: of our kernels; None: as the file says.
        options: ``onnxruntime.SessionOptions``, for the number of threads and the like.
        chunk: tokens of a run, which finds those before them in the cache; None: all tokens in one run.

    Raises:
        QbbError: ONNX Runtime cannot open it, it has inputs that cannot be made up from token ids, or no cache for
            ``chunk``.
    """

    def __init__(
        self,
        path: Path,
        *,
        library: bool = True,
        mode: str | None = None,
        options: Any = None,
        chunk: int | None = None,
    ) -> None:
        self.source, self._chunk = str(path), chunk
        self._session = ort.session(path, library=library, mode=mode, options=options)
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        names = [value.name for value in inputs]
        if "input_ids" not in names:
            raise QbbError("not a model of text", where=path, expected="an input input_ids", got=names)
        self._types = {value.name: _TYPES[value.type] for value in inputs if value.type in _TYPES}
        # A decoder exported with its cache starts with an empty one.
        self._empty = empty_cache(self._session, batch=1)
        if chunk is not None and not self._empty:
            raise QbbError("has no cache", where=path, expected="a folder of a decoder", got="--chunk")
        fed = self._types.keys() & {*_FEEDS, *self._empty}
        if fed != set(names):
            known = f"{', '.join(_FEEDS)} or past_key_values.*, of int or float"
            raise QbbError("cannot feed an input of the model", where=path, expected=known, got=sorted({*names} - fed))
        logits = next((value for value in outputs if value.name == "logits"), None)
        self.language_model = logits is not None
        self._wanted = ["logits"] if logits is not None else [value.name for value in outputs]
        size = None if logits is None or not logits.shape else logits.shape[-1]
        self.vocabulary = size if isinstance(size, int) else None
        self.tokenizer = tokenizer_beside(path)

    def outputs(self, ids: Ids) -> dict[str, Array]:
        """See :class:`Runner`."""
        if self._chunk is not None:
            decoder = Decoder(self._session, ids.shape[1])
            parts = [decoder.step(ids[:, at : at + self._chunk]) for at in range(0, ids.shape[1], self._chunk)]
            return {"logits": np.concatenate(parts, axis=1)}
        feeds = {
            name: self._empty[name] if name in self._empty else _FEEDS[name](ids).astype(dtype)
            for name, dtype in self._types.items()
        }
        try:
            results = self._session.run(self._wanted, feeds)
        except Exception as error:  # onnxruntime's exceptions share no base class
            raise QbbError(f"ONNX Runtime cannot run {ids.shape[1]} tokens", where=self.source, got=error) from error
        return dict(zip(self._wanted, results, strict=True))


def open_runner(
    source: str | Path,
    *,
    library: bool = True,
    mode: str | None = None,
    device: str = "cpu",
    chunk: int | None = None,
) -> Runner:
    """Open a model for evaluation.

    Args:
        source: an .onnx file, a folder of a decoder that we wrote, or a Hugging Face folder or hub id.
        library: for the first two; False runs the function body instead of our kernel.
        mode: for the first two: of our kernels; None: as the file says.
        device: for the others: ``"cpu"`` or a PyTorch device such as ``"cuda"``.
        chunk: for a folder of a decoder: tokens of a run; None: all in one.

    Raises:
        QbbError: it does not exist, cannot be read, or is no model of text.
    """
    path = onnx_file(source)
    if path is not None:
        # Of several models those without a cache run whole windows.
        return OnnxRunner(path, library=library, mode=mode, chunk=None if path == Path(source) else chunk)
    if Path(source).is_file():
        raise QbbError(
            "cannot be evaluated", where=source, expected="an .onnx file, or a Hugging Face folder or hub id"
        )
    try:
        from qbb_export.evaluate.torch_runner import TorchRunner
    except ImportError:
        raise QbbError("PyTorch is not installed", where=source, expected="pip install 'qbb-export[torch]'") from None
    return TorchRunner(str(source), device)
