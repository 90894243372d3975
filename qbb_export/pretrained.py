"""Open transformers models by folder or hub id."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qbb_export.errors import QbbError
from qbb_export.source import InputSpec, LoadOptions, TorchModel


def check_safetensors(file: Path) -> None:
    """Refuse a file whose header does not fit its size.

    Raises:
        QbbError: it is damaged, cut short or no safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy"):
            pass
    except (SafetensorError, OSError) as error:
        raise QbbError("damaged safetensors file", where=file, got=str(error)) from error


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No bars and retries on the terminal: what goes wrong is told in one line at the end."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    levels = [(log, log.get_verbosity()) for log in (logging, hub_logging)]
    bars = logging.is_progress_bar_enabled()
    for log, _ in levels:
        log.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        for log, level in levels:
            log.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def load_pretrained(source: str, options: LoadOptions, state_dict: Mapping[str, Any] | None = None) -> TorchModel:
    """A transformers model by folder or hub id; ``state_dict`` replaces the weights of the folder."""
    import transformers

    folder = Path(source)
    for file in sorted(folder.glob("*.safetensors")) if folder.is_dir() and state_dict is None else ():
        check_safetensors(file)
    try:
        with _quiet_transformers():
            config = transformers.AutoConfig.from_pretrained(source)
            if getattr(config, "is_encoder_decoder", False):
                raise QbbError(
                    "encoder-decoder models are not supported", where=source, expected="an encoder or a decoder"
                )
            module, info = _open(config, source, state_dict)
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


def _open(config: Any, source: str, state_dict: Mapping[str, Any] | None) -> tuple[Any, dict[str, Any]]:
    """The model with the experts of mixtures as linear layers, and what transformers has to say about the weights."""
    from qbb_export.experts import apart, split_experts, stacks_experts

    def read(model_class: Any) -> tuple[Any, dict[str, Any]]:
        module, info = model_class.from_pretrained(
            source if state_dict is None else None,
            config=config,
            state_dict=None if state_dict is None else dict(state_dict),
            dtype="auto",
            output_loading_info=True,
        )
        return module, info

    model_class = _model_class(config)
    if stacks_experts(config.model_type):
        with apart(model_class) as split_class:
            module, info = read(split_class)
        module.__class__ = model_class
        if not any(".experts." in key for key in info["missing_keys"]):
            return module, info
    module, info = read(model_class)  # no mixture, or one whose experts are together in the file
    split_experts(module)
    return module, info


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
