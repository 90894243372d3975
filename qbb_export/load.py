"""Open a PyTorch model from a Hugging Face folder or hub id, a state dict, or (only if trusted) a pickle."""

from __future__ import annotations

import importlib
import pickle
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qbb_export.errors import QbbError

if TYPE_CHECKING:
    import torch
    from torch import nn

_INPUT = re.compile(r"(?P<name>[\w.]+):(?P<dtype>\w+)\[(?P<dims>[^\]]*)\]")
_DTYPES = ("float32", "float16", "int64", "int32", "bool")
_CHECKPOINTS = frozenset({".pt", ".pth", ".bin", ".ckpt", ".safetensors"})


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
        return _load_pretrained(str(path), options)
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
    return _load_pretrained(source, options)


def _listing(folder: Path) -> str:
    names = sorted(p.name for p in folder.iterdir())
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "") if names else "an empty folder"


def parameter_owners(loaded: TorchModel) -> dict[str, str]:
    """Class of the module that owns each parameter, by the parameter's name; tied ones under each of their names."""
    return {
        f"{place}.{name}" if place else name: type(module).__name__
        for place, module in loaded.module.named_modules(remove_duplicate=False)
        for name, _ in module.named_parameters(recurse=False)
    }


# Hugging Face -------------------------------------------------------------------------------------------------------


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _load_pretrained(source: str, options: LoadOptions, state_dict: Mapping[str, Any] | None = None) -> TorchModel:
    """A transformers model by folder or hub id; ``state_dict`` replaces the weights of the folder."""
    import transformers

    folder = Path(source)
    for file in sorted(folder.glob("*.safetensors")) if folder.is_dir() and state_dict is None else ():
        _check_safetensors(file)
    try:
        with _quiet_transformers():
            config = transformers.AutoConfig.from_pretrained(source)
            if getattr(config, "is_encoder_decoder", False):
                raise QbbError(
                    "encoder-decoder models are not supported", where=source, expected="an encoder or a decoder"
                )
            model_class = _model_class(config)
            place = source if state_dict is None else None
            module, info = model_class.from_pretrained(
                place,
                config=config,
                state_dict=None if state_dict is None else dict(state_dict),
                dtype="auto",
                output_loading_info=True,
            )
    except QbbError:
        raise
    except Exception as error:  # transformers raises many types for files that are missing, damaged or foreign
        raise QbbError("cannot open the model", where=source, got=f"{type(error).__name__}: {error}") from error
    missing = sorted(info["missing_keys"])
    if missing and all(key.startswith("pooler.") for key in missing):
        module.pooler = None  # an encoder saved without its pooler; a random one would be worse than none
    elif missing:
        raise QbbError("weights are missing", where=source, expected=missing[0], got=f"{len(missing)} missing")
    module.config.use_cache = False  # whole sequences: the cache would be a second set of outputs
    inputs = options.inputs or _config_inputs(module, source)
    return TorchModel(module.eval(), inputs, pretrained=True, tokenizer=_tokenizer_file(source))


def _tokenizer_file(source: str) -> Path | None:
    """tokenizer.json of a folder, or of a hub id in the cache."""
    from transformers.utils.hub import cached_file

    try:
        found = cached_file(source, "tokenizer.json", _raise_exceptions_for_missing_entries=False)
    except OSError:  # no connection; the export does not depend on it
        return None
    return None if found is None else Path(found)


def _model_class(config: Any) -> Any:
    import transformers

    for architecture in config.architectures or ():
        if hasattr(transformers, architecture):
            return getattr(transformers, architecture)
    return transformers.AutoModel


def _config_inputs(module: Any, source: str) -> tuple[InputSpec, ...]:
    """Inputs as the config tells them: token ids with mask (and segments), or pixels."""
    import inspect

    config = module.config
    parameters = inspect.signature(module.forward).parameters
    if module.main_input_name == "input_ids":
        dims = ("batch", "sequence")
        inputs = [InputSpec("input_ids", "int64", dims, high=config.get_text_config().vocab_size)]
        if "attention_mask" in parameters:
            inputs.append(InputSpec("attention_mask", "int64", dims))
        if "token_type_ids" in parameters and getattr(config, "type_vocab_size", 0) > 1:
            inputs.append(InputSpec("token_type_ids", "int64", dims, high=config.type_vocab_size))
        return tuple(inputs)
    if module.main_input_name == "pixel_values" and isinstance(getattr(config, "image_size", None), int):
        size = config.image_size
        return (InputSpec("pixel_values", "float32", ("batch", config.num_channels, size, size)),)
    raise QbbError(
        "cannot tell the model's inputs from its config",
        where=source,
        expected=f"--input {module.main_input_name}:DTYPE[DIMS]",
    )


# Files --------------------------------------------------------------------------------------------------------------


def _check_safetensors(file: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy"):
            pass
    except (SafetensorError, OSError) as error:
        raise QbbError("damaged safetensors file", where=file, got=str(error)) from error


def _load_checkpoint(path: Path, options: LoadOptions) -> TorchModel:
    import torch

    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        _check_safetensors(path)
        loaded: Any = load_file(path)
    else:
        loaded = _read_pickle(path, trust=options.trust_pickle)
    if isinstance(loaded, torch.nn.Module):
        return TorchModel(loaded.eval(), _required_inputs(options, path))
    state = _state_dict(loaded, path)
    if options.config is not None:
        if not (options.config / "config.json").is_file():
            raise QbbError("no config.json", where=options.config, expected="a Hugging Face folder")
        return _load_pretrained(str(options.config), options, state_dict=state)
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
