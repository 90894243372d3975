"""What a model is opened with, and what comes of it: descriptions of inputs, options, an open PyTorch model."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qbb_export.errors import QbbError

if TYPE_CHECKING:
    import torch
    from torch import nn

_INPUT = re.compile(r"(?P<name>[\w.]+):(?P<dtype>\w+)\[(?P<dims>[^\]]*)\]")
_DTYPES = ("float32", "float16", "int64", "int32", "bool")


@dataclass(frozen=True)
class InputSpec:
    """One graph input.

    Args:
        name: as the module's ``forward`` calls it.
        dtype: one of float32, float16, int64, int32, bool.
        dims: a size, or a name for a dynamic dimension.
        high: integer inputs are tried with values in [0, high).
    """

    name: str
    dtype: str
    dims: tuple[int | str, ...]
    high: int = 2

    @classmethod
    def parse(cls, text: str) -> InputSpec:
        """Read ``NAME:DTYPE[DIMS]``, e.g. ``input_ids:int64[batch,sequence]`` or ``x:float32[batch,16]``."""
        match = _INPUT.fullmatch(text.replace(" ", ""))
        if match is None or match["dtype"] not in _DTYPES:
            raise QbbError(
                "cannot read an input description",
                where="--input",
                expected=f"NAME:DTYPE[DIMS] with DTYPE one of {', '.join(_DTYPES)}",
                got=text,
            )
        dims = tuple(int(d) if d.isdigit() else d for d in match["dims"].split(",") if d)
        return cls(match["name"], match["dtype"], dims)


@dataclass(frozen=True)
class LoadOptions:
    """How to open a file that does not say everything itself.

    Args:
        model: ``package.module:callable`` that builds the module for a state dict.
        config: Hugging Face folder whose config.json builds the module for a state dict.
        trust_pickle: allow files whose loading runs code from them.
        inputs: descriptions of the graph inputs; empty where the config tells them.
    """

    model: str | None = None
    config: Path | None = None
    trust_pickle: bool = False
    inputs: tuple[InputSpec, ...] = ()


@dataclass(frozen=True)
class TorchModel:
    """A module with its weights in memory, in the type that its file has.

    Attributes:
        module: in eval mode.
        inputs: what to call it with.
        pretrained: True for a transformers model.
        program: the exported program where MODEL was one.
        tokenizer: its tokenizer.json, if there is one.
    """

    module: nn.Module
    inputs: tuple[InputSpec, ...]
    pretrained: bool = False
    program: torch.export.ExportedProgram | None = None
    tokenizer: Path | None = None


def parameter_owners(loaded: TorchModel) -> dict[str, str]:
    """Class of the module that owns each parameter, by the parameter's name; tied ones under each of their names."""
    return {
        f"{place}.{name}" if place else name: type(module).__name__
        for place, module in loaded.module.named_modules(remove_duplicate=False)
        for name, _ in module.named_parameters(recurse=False)
    }


def embedding_name(loaded: TorchModel, parameter: str) -> str:
    """The name that the table of embeddings has as such, of a parameter that may be tied to the head."""
    own = dict(loaded.module.named_parameters(remove_duplicate=False))
    kinds = parameter_owners(loaded)
    names = [name for name, value in own.items() if value is own[parameter] and "Embedding" in kinds[name]]
    return names[0] if names else parameter
