"""Open a PyTorch model from a Hugging Face folder or hub id, a state dict, or (only if trusted) a pickle."""

from __future__ import annotations

import importlib
import pickle
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qbb_export.errors import QbbError
from qbb_export.pretrained import check_safetensors, load_pretrained
from qbb_export.source import InputSpec, LoadOptions, TorchModel

if TYPE_CHECKING:
    import torch

_CHECKPOINTS = frozenset({".pt", ".pth", ".bin", ".ckpt", ".safetensors"})


def load_torch(source: str, options: LoadOptions) -> TorchModel:
    """Open MODEL.

    Raises:
        QbbError: it does not exist, is no model, is damaged, or needs an option that was not given.
    """
    path = Path(source)
    try:
        import torch  # noqa: F401  # the ONNX-to-ONNX way must work without
    except ImportError:
        raise QbbError("PyTorch is not installed", where=source, expected="pip install 'qbb-export[torch]'") from None
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise QbbError("not a model folder", where=path, expected="config.json in it", got=_listing(path))
        return load_pretrained(str(path), options)
    if path.is_file():
        if path.suffix == ".pt2":
            return _load_program(path, options)
        if path.suffix not in _CHECKPOINTS:
            raise QbbError(
                "not a model that can be read",
                where=path,
                expected=f"a Hugging Face folder, .onnx, .pt2 or one of {', '.join(sorted(_CHECKPOINTS))}",
                got=f"a file of {path.stat().st_size} bytes with suffix '{path.suffix}'",
            )
        return _load_checkpoint(path, options)
    looks_like_hub_id = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source) and path.suffix not in _CHECKPOINTS | {".pt2"}
    if not looks_like_hub_id:
        raise QbbError("no such file or folder", where=source)
    return load_pretrained(source, options)


def _listing(folder: Path) -> str:
    names = sorted(p.name for p in folder.iterdir())
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "") if names else "an empty folder"


def _load_checkpoint(path: Path, options: LoadOptions) -> TorchModel:
    import torch

    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        check_safetensors(path)
        loaded: Any = load_file(path)
    else:
        loaded = _read_pickle(path, trust=options.trust_pickle)
    if isinstance(loaded, torch.nn.Module):
        return TorchModel(loaded.eval(), _required_inputs(options, path))
    state = _state_dict(loaded, path)
    if options.config is not None:
        if not (options.config / "config.json").is_file():
            raise QbbError("no config.json", where=options.config, expected="a Hugging Face folder")
        return load_pretrained(str(options.config), options, state_dict=state)
    if options.model is None:
        raise QbbError(
            "a state dict holds weights but no module",
            where=path,
            expected="--config DIR (Hugging Face) or --model package.module:callable",
            got=f"{len(state)} tensors",
        )
    module = _build(options.model)
    try:
        module.load_state_dict(dict(state), strict=True)
    except RuntimeError as error:
        raise QbbError(
            "weights do not fit the module", where=f"{path} with --model {options.model}", got=error
        ) from error
    return TorchModel(module.eval(), _required_inputs(options, path))


def _read_pickle(path: Path, *, trust: bool) -> Any:
    import torch

    try:
        return torch.load(path, weights_only=True, map_location="cpu", mmap=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, OSError) as error:
        unsafe = isinstance(error, pickle.UnpicklingError) and "weights_only" in str(error).lower()
        if not unsafe:
            raise QbbError("cannot read the file", where=path, expected="a file of torch.save", got=error) from error
    if not trust:
        raise QbbError(
            "loading this file would run code from it",
            where=path,
            expected="a state dict (tensors only), or --trust-pickle if you trust whoever made it",
            got="pickled Python objects",
        )
    try:
        return torch.load(path, weights_only=False, map_location="cpu")
    except Exception as error:  # a pickle may raise anything
        raise QbbError("cannot unpickle the file", where=path, got=f"{type(error).__name__}: {error}") from error


def _state_dict(loaded: Any, path: Path) -> Mapping[str, torch.Tensor]:
    import torch

    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping) or not loaded:
        raise QbbError("not a model", where=path, expected="a module or a state dict", got=type(loaded).__name__)
    for name, value in loaded.items():
        if not isinstance(value, torch.Tensor):
            raise QbbError(
                "not a state dict", where=path, expected="tensors", got=f"{type(value).__name__} at '{name}'"
            )
    return loaded


def _build(target: str) -> Any:
    """Call ``package.module:callable``; the current folder is importable, as with ``python -m``."""
    import torch

    module_name, _, attribute = target.partition(":")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        built = getattr(importlib.import_module(module_name), attribute)()
    except Exception as error:  # whatever the user's code raises
        raise QbbError(
            "cannot build the module",
            where=f"--model {target}",
            expected="package.module:callable without arguments",
            got=f"{type(error).__name__}: {error}",
        ) from error
    if not isinstance(built, torch.nn.Module):
        raise QbbError("not a module", where=f"--model {target}", expected="torch.nn.Module", got=type(built).__name__)
    return built


def _load_program(path: Path, options: LoadOptions) -> TorchModel:
    import torch

    if not options.trust_pickle:
        raise QbbError(
            "loading an exported program may run code from it",
            where=path,
            expected="--trust-pickle if you trust whoever made it",
        )
    try:
        program = torch.export.load(path)
    except Exception as error:  # torch raises many types here
        raise QbbError("cannot read the program", where=path, got=f"{type(error).__name__}: {error}") from error
    return TorchModel(program.module(), options.inputs, program=program)


def _required_inputs(options: LoadOptions, path: Path) -> tuple[InputSpec, ...]:
    if not options.inputs:
        raise QbbError(
            "the module's inputs are unknown", where=path, expected="--input NAME:DTYPE[DIMS], e.g. x:float32[batch,16]"
        )
    return options.inputs
