"""The operator in PyTorch: a linear layer whose weight is a sum of scaled binary matrices."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional
from torch.utils._pytree import tree_leaves

from qbb_export.errors import QbbError
from qbb_export.format import WORD_BITS
from qbb_export.quantize import Quantized

Array = npt.NDArray[Any]


class BinaryBasisLinear(nn.Module):
    """``y = x Wᵀ + bias`` with ``W[n,k] = Σ_b scales[b,n,g(k)]·sign(b,n,k) + offset[n,g(k)]``.

    The buffers hold the packed form (layout 0 of ``docs/format.md``); the dense weight lives only during ``forward``.

    Args:
        words: uint32 ``[bases, N, ceil(K/32)]`` as a torch tensor of int32 (same bits).
        scales: float16 or float32 ``[bases, N, G]``.
        offset: float32 ``[N, G]``, or None.
        bias: ``[N]``, or None.
        in_features: K.
        group_size: inputs that share a scale; K for one scale per row.
    """

    words: torch.Tensor
    scales: torch.Tensor
    offset: torch.Tensor | None
    bias: torch.Tensor | None

    def __init__(
        self,
        words: torch.Tensor,
        scales: torch.Tensor,
        offset: torch.Tensor | None,
        bias: torch.Tensor | None,
        *,
        in_features: int,
        group_size: int,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = words.shape[1]
        self.group_size = group_size
        self.register_buffer("words", words)
        self.register_buffer("scales", scales)
        self.register_buffer("offset", offset)
        self.register_buffer("bias", bias)

    def dense_weight(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The matrix W, ``[N, K]``, summed in ``dtype``."""
        shifts = torch.arange(WORD_BITS, dtype=torch.int32, device=self.words.device)
        group_of_input = torch.arange(self.in_features, device=self.words.device) // self.group_size
        if self.offset is None:
            weight = torch.zeros(self.out_features, self.in_features, dtype=dtype, device=self.words.device)
        else:
            weight = self.offset.to(dtype)[:, group_of_input]
        for words, scales in zip(self.words, self.scales, strict=True):
            bits = (words.unsqueeze(-1) >> shifts) & 1
            signs = bits.reshape(self.out_features, -1)[:, : self.in_features].to(dtype) * 2 - 1
            weight = weight + signs * scales.to(dtype)[:, group_of_input]
        return weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., K]`` to ``[..., N]`` in the type of x, summed in float32 or wider."""
        compute = torch.promote_types(x.dtype, torch.float32)
        bias = None if self.bias is None else self.bias.to(compute)
        return functional.linear(x.to(compute), self.dense_weight(compute), bias).to(x.dtype)

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bases={self.words.shape[0]}, "
            f"group_size={self.group_size}, offset={self.offset is not None}, bias={self.bias is not None}"
        )


def quantized_linear(layer: Quantized, bias: torch.Tensor | None = None) -> BinaryBasisLinear:
    """The module for one quantised matrix.

    Args:
        layer: the matrix.
        bias: ``[N]``, or None.
    """
    words = torch.from_numpy(layer.words.view("int32"))
    scales = torch.from_numpy(layer.scales)
    offset = None if layer.offset is None else torch.from_numpy(layer.offset)
    bias = None if bias is None else bias.detach()
    return BinaryBasisLinear(words, scales, offset, bias, in_features=layer.spec.K, group_size=layer.spec.group_size)


def make_student(model: nn.Module, layers: Mapping[str, Quantized], in_features_first: Container[str]) -> nn.Module:
    """Put quantised weights into a model, in place.

    Every ``nn.Linear`` below the model itself that owns a weight becomes a :class:`BinaryBasisLinear`. A weight that
    belongs to another kind of module is replaced by the dense matrix, wherever it is used.

    Args:
        model: the float model.
        layers: ``Quantized`` by parameter name, e.g. ``encoder.layer.0.output.dense.weight``.
        in_features_first: the parameters among them that are stored [in_features, out_features].

    Returns:
        The same model.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, layer in layers.items():
        owner_name, _, attribute = name.rpartition(".")
        owner = modules[owner_name]
        if owner_name and isinstance(owner, nn.Linear) and attribute == "weight":
            # One weight may have several owners (tied layers), each with a bias of its own.
            weight = owner.weight
            for place, module in list(modules.items()):
                if isinstance(module, nn.Linear) and module.weight is weight:
                    parent, _, child = place.rpartition(".")
                    setattr(modules[parent], child, quantized_linear(layer, module.bias))
        else:
            dense = quantized_linear(layer).dense_weight()
            old = owner.get_parameter(attribute)
            new = nn.Parameter((dense.T if name in in_features_first else dense).contiguous(), requires_grad=False)
            for module in modules.values():  # all that share it, in float32: the file's type may have fewer bits
                for own, value in list(module.named_parameters(recurse=False)):
                    if value is old:
                        setattr(module, own, new)
    return model


def run_module(
    module: nn.Module, feeds: Mapping[str, Array], names: list[str], *, by_name: bool = True
) -> dict[str, Array]:
    """Run a module on numpy arrays.

    Args:
        module: takes the feeds as arguments.
        feeds: floats are cast to the module's type.
        names: what to call the results, in their order.
        by_name: pass keyword arguments, else positional ones.

    Returns:
        The results; floats as float32.

    Raises:
        QbbError: the module returns more or fewer tensors than there are names.
    """
    dtype = next(filter(torch.is_floating_point, module.parameters()), torch.empty(0)).dtype
    arguments = {name: torch.from_numpy(array) for name, array in feeds.items()}
    arguments = {name: t.to(dtype) if t.is_floating_point() else t for name, t in arguments.items()}
    with torch.no_grad():
        result = module(**arguments) if by_name else module(*arguments.values())
    flat = tree_leaves(result)
    tensors = [value for value in flat if isinstance(value, torch.Tensor)]
    if len(tensors) != len(names):
        raise QbbError("module and graph differ in their outputs", expected=f"{len(names)} ({names})", got=len(tensors))
    return {
        name: (tensor.float() if tensor.is_floating_point() else tensor).numpy()
        for name, tensor in zip(names, tensors, strict=True)
    }


def best_device() -> str:
    """``"cuda"`` where PyTorch sees a GPU, else ``"cpu"``."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def to_device(array: Array, device: str) -> torch.Tensor:
    """A numpy array as a tensor on a device such as ``"cuda"``.

    Raises:
        QbbError: no such device.
    """
    try:
        return torch.from_numpy(array).to(device)
    except (RuntimeError, AssertionError) as error:  # both are raised for a missing CUDA
        raise QbbError("no such device", where="--device", expected="cpu or a PyTorch device", got=error) from error
