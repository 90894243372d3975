"""The weights of a quantised checkpoint as floats."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import ml_dtypes  # noqa: F401  with it numpy knows bfloat16, and safetensors can hand it out; onnx depends on it
import numpy as np
import numpy.typing as npt
from safetensors import safe_open

from qbb_export.checkpoint.files import read_json, tensor_files
from qbb_export.checkpoint.packing import AWQ_ORDER, unpack_awq, unpack_stream, words_per_period
from qbb_export.checkpoint.scheme import Scheme, read_scheme
from qbb_export.errors import QbbError
from qbb_export.format import WORD_BITS

Array = npt.NDArray[Any]

# What a quantised layer has in place of its weight.
PARTS: Final = ("qweight", "qzeros", "scales", "g_idx")
# out_features that become floats at once, whole words; it bounds the memory and changes no result.
BLOCK: Final = 1024


class QuantizedCheckpoint:
    """The tensors of a GPTQ or AWQ folder by the names of the parameters they stand for. Make it with :meth:`open`.

    Files are mapped, and read when a tensor is asked for.
    """

    def __init__(self, folder: Path, scheme: Scheme, files: Mapping[str, Path]) -> None:
        self.folder = folder
        self.scheme = scheme
        self._files = files  # by tensor

    @classmethod
    def open(cls, folder: Path) -> QuantizedCheckpoint:
        """Read config.json and the list of tensors.

        Args:
            folder: with config.json and safetensors files, one or several with an index.

        Raises:
            QbbError: a file is missing or damaged, or the quantisation is of a kind that this does not read.
        """
        scheme = read_scheme(read_json(folder / "config.json"), folder / "config.json")
        return cls(folder, scheme, tensor_files(folder))

    def names(self) -> tuple[str, ...]:
        """Parameters, sorted: of quantised layers ``....weight``, of all others as the tensor is called."""
        hidden = {f"{layer}.{part}" for layer in self._layers() for part in PARTS}
        return tuple(sorted({f"{layer}.weight" for layer in self._layers()} | (self._files.keys() - hidden)))

    def weight(self, name: str) -> npt.NDArray[np.float32]:
        """A parameter as float32.

        Args:
            name: one of :meth:`names`, e.g. ``"model.layers.0.self_attn.q_proj.weight"``.

        Returns:
            ``[out_features, in_features]`` for a quantised layer, exact where scales are float16; any other tensor in
            the shape it has.

        Raises:
            QbbError: no such parameter, or a tensor is missing, of a wrong type or shape, or damaged.
        """
        if name in self._files:
            return self._tensor(name).astype(np.float32)
        layer = name.removesuffix(".weight")
        if layer == name or f"{layer}.qweight" not in self._files:
            raise QbbError("no such parameter in the checkpoint", where=self.folder, got=name)
        return self._gptq(layer) if self.scheme.method == "gptq" else self._awq(layer)

    def _layers(self) -> set[str]:
        return {name.removesuffix(".qweight") for name in self._files if name.endswith(".qweight")}

    def _gptq(self, layer: str) -> npt.NDArray[np.float32]:
        bits = self.scheme.bits
        packed = self._words(f"{layer}.qweight", None)
        scales = self._scales(layer, packed.shape[1])
        groups, N = scales.shape
        K = packed.shape[0] * WORD_BITS // bits
        if packed.shape[0] * WORD_BITS % bits or N * bits % WORD_BITS:
            raise QbbError(
                "wrong shape of qweight",
                where=f"{self.folder}, {layer}",
                expected=f"whole words of {bits}-bit values",
                got=list(packed.shape),
            )
        group = self._input_groups(layer, K, groups)
        zeros = self._gptq_zeros(layer, (groups, N * bits // WORD_BITS))
        return _dequantize(lambda a, b: unpack_stream(packed[:, a:b], bits, 0), zeros, scales, group)

    def _gptq_zeros(self, layer: str, shape: tuple[int, int]) -> Array:
        """Zero points ``[G, out]``."""
        scheme, words = self.scheme, self._words(f"{layer}.qzeros", shape)
        # A symmetric layer has one zero point. Files differ in how they store it: some say that they are of the first
        # format and are not (vllm-project/vllm, pull request 38966). So its definition is more reliable.
        period = words.reshape(-1, words_per_period(scheme.bits))
        if scheme.symmetric and (period == period[0]).all():
            return np.full((shape[0], shape[1] * WORD_BITS // scheme.bits), 1 << (scheme.bits - 1), dtype=np.int32)
        if not scheme.one_too_low:
            return unpack_stream(words, scheme.bits, 1)
        if scheme.bits == 3 and scheme.by_gptqmodel:
            # Its releases differ in what they store (ModelCloud/GPTQModel, pull request 2763).
            raise QbbError(
                "3-bit zero points of the format gptq cannot be told apart",
                where=f"{self.folder}, {layer}",
                expected="format gptq_v2, or a symmetric layer",
            )
        if scheme.bits == 3:
            return (unpack_stream(words, 3, 1) + 1) & 7
        # GPTQModel takes one off all values of a word in one subtraction, which borrows from the next value where one
        # is 0; adding them back in one addition undoes that.
        ones = sum(1 << place for place in range(0, WORD_BITS, scheme.bits))
        return unpack_stream(words + np.uint32(ones), scheme.bits, 1)

    def _awq(self, layer: str) -> npt.NDArray[np.float32]:
        packed = self._words(f"{layer}.qweight", None)
        scales = self._scales(layer, packed.shape[1] * len(AWQ_ORDER))
        group = self._input_groups(layer, packed.shape[0], scales.shape[0])
        zeros = unpack_awq(self._words(f"{layer}.qzeros", (scales.shape[0], packed.shape[1])))
        per_word = len(AWQ_ORDER)
        return _dequantize(lambda a, b: unpack_awq(packed[:, a // per_word : b // per_word]), zeros, scales, group)

    def _scales(self, layer: str, N: int) -> npt.NDArray[np.float32]:
        scales = self._tensor(f"{layer}.scales")
        if scales.ndim != 2 or scales.shape[0] < 1 or scales.shape[1] != N or scales.dtype.kind in "iub":
            raise self._wrong(f"{layer}.scales", f"floats [groups, {N}]", scales)
        return scales.astype(np.float32)

    def _input_groups(self, layer: str, K: int, groups: int) -> npt.NDArray[np.int64]:
        """The group of each input, int64 ``[K]``."""
        size = K if self.scheme.group_size == -1 else self.scheme.group_size
        if groups != math.ceil(K / size):
            raise QbbError(
                "wrong number of groups",
                where=f"{self.folder}, {layer}",
                expected=f"{math.ceil(K / size)} ({K} inputs, group_size {self.scheme.group_size})",
                got=groups,
            )
        plain = np.arange(K) // size
        name = f"{layer}.g_idx"
        if self.scheme.method == "awq" or name not in self._files:
            return plain
        index = self._tensor(name)
        if index.shape != (K,) or index.dtype != np.int32:
            raise self._wrong(name, f"int32 [{K}]", index)
        if not index.any():  # some tools leave zeros where there is no act-order
            return plain
        if index.min() < 0 or index.max() >= groups:
            raise QbbError(
                "group out of range",
                where=f"{self.folder}, {name}",
                expected=f"0..{groups - 1}",
                got=f"{index.min()}..{index.max()}",
            )
        return index.astype(np.int64)

    def _words(self, name: str, shape: tuple[int, int] | None) -> npt.NDArray[np.uint32]:
        """Packed values; ``shape`` None takes any matrix."""
        words = self._tensor(name)
        if words.dtype != np.int32 or words.ndim != 2 or 0 in words.shape or shape not in (None, words.shape):
            raise self._wrong(name, "an int32 matrix" if shape is None else f"int32 {list(shape)}", words)
        return words.view(np.uint32)

    def _tensor(self, name: str) -> Array:
        if name not in self._files:
            raise QbbError("tensor is missing", where=self.folder, expected=name)
        file = self._files[name]
        try:
            with safe_open(file, framework="numpy") as tensors:
                return np.asarray(tensors.get_tensor(name))
        except Exception as error:  # types that numpy lacks raise several kinds
            raise QbbError("cannot read a tensor", where=f"{file}, {name}", got=error) from error

    def _wrong(self, name: str, expected: str, got: Array) -> QbbError:
        place = f"{self._files[name]}, {name}"
        return QbbError("wrong tensor", where=place, expected=expected, got=f"{got.dtype} {list(got.shape)}")


def _dequantize(
    codes: Callable[[int, int], Array], zeros: Array, scales: Array, group: npt.NDArray[np.int64]
) -> npt.NDArray[np.float32]:
    """``scales * (codes - zeros)`` as float32 ``[out, in]``; ``codes(a, b)`` gives ``[in, b - a]`` of ``[in, out]``."""
    N, K = scales.shape[1], len(group)
    weight = np.empty((N, K), dtype=np.float32)
    for start in range(0, N, BLOCK):
        stop = start + BLOCK
        steps = (codes(start, stop) - zeros[:, start:stop][group]).astype(np.float32)
        weight[start:stop] = (steps * scales[:, start:stop][group]).T
    return weight
