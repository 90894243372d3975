"""The folder of a language model: written whole or not at all, and checked before it is used.

DIR/
model.onnx, model.<SHA-256>.data   graph and weights
genai_config.json                  how onnxruntime-genai runs it
tokenizer.json, …                  as the model has them
libqbb_ops.so                      the operator library; absent in a portable folder
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from qbb_export.custom_ops import library_info
from qbb_export.errors import QbbError
from qbb_export.files import file_sha256, write_whole

CONFIG: Final = "genai_config.json"
MODEL: Final = "model.onnx"
TOKENIZER: Final = "tokenizer.json"


def write_companions(scratch: Path, config: Mapping[str, Any], files: Mapping[str, bytes], *, portable: bool) -> None:
    """Everything beside the graph.

    Args:
        scratch: the folder.
        config: ``genai_config.json``; the operator library is added to it.
        files: tokenizer files, by name.
        portable: leave the library out; the function body in the file does its work.

    Raises:
        QbbError: the folder cannot be written, or there is no library.
    """
    config = json.loads(json.dumps(config))
    try:
        for name, data in files.items():
            write_whole(scratch / name, data)
        if not portable:
            library = library_info().path
            # onnxruntime-genai opens a library inside the model's folder only; links out of it are refused.
            shutil.copyfile(library, scratch / library.name)
            config["model"]["decoder"]["session_options"]["custom_ops_library"] = library.name
        write_whole(scratch / CONFIG, json.dumps(config, indent=2).encode() + b"\n")
    except OSError as error:
        raise QbbError("cannot write the folder", where=scratch, got=error.strerror or error) from error


def read_config(folder: Path) -> dict[str, Any]:
    """``genai_config.json`` of a folder that is complete.

    Raises:
        QbbError: no such folder, a file is missing (a run was killed, or a copy is not complete), or the configuration
            cannot be read.
    """
    if not folder.is_dir():
        raise QbbError("no such folder", where=folder, expected="a folder that qbb-export wrote")
    if not (folder / CONFIG).is_file():
        raise QbbError("not a folder of a language model, or half-written", where=folder, expected=f"{CONFIG} in it")
    try:
        config: dict[str, Any] = json.loads((folder / CONFIG).read_bytes())
        decoder = config["model"]["decoder"]
        names = [decoder["filename"], decoder.get("session_options", {}).get("custom_ops_library")]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise QbbError("configuration is damaged", where=folder / CONFIG, got=error) from error
    if not (folder / TOKENIZER).is_file():
        raise QbbError("no tokenizer", where=folder, expected=f"{TOKENIZER} in it")
    for name in names:
        if name is not None and (not isinstance(name, str) or Path(name).name != name):
            raise QbbError("not a file in the folder", where=folder / CONFIG, expected="a bare file name", got=name)
        if name is not None and not (folder / name).is_file():
            raise QbbError("folder is half-written", where=folder, expected=f"{name} in it")
    return config


def foreign_code(folder: Path, config: Mapping[str, Any]) -> str | None:
    """What onnxruntime-genai would load besides the model when it opens a folder, in words; None for nothing.

    *Why:* it loads the library that the configuration names, and providers have options that name more. Only a copy of
    the installed library and the options that we write are known to be harmless.
    """
    options = dict(config["model"]["decoder"].get("session_options", {}))
    library = options.pop("custom_ops_library", None)
    if library is not None and file_sha256(folder / str(library)) != file_sha256(library_info().path):
        return f"{library} is not the installed library"
    providers = options.pop("provider_options", [])
    options.pop("log_id", None)
    names = {name for entry in providers for name in entry} if isinstance(providers, list) else {"?"}
    if options or not names <= {"cuda"} or set(config["model"]) & {"vision", "embedding", "speech", "encoder"}:
        return "the configuration has options that qbb-export does not write"
    return None


def onnx_file(source: str | Path) -> Path | None:
    """The graph of MODEL where it is an ``.onnx`` file or a folder that we wrote; None for any other.

    Raises:
        QbbError: the folder is not complete.
    """
    path = Path(source)
    if path.suffix == ".onnx":
        return path
    ours = (path / CONFIG).is_file() or ((path / MODEL).is_file() and not (path / "config.json").is_file())
    if ours:
        return path / str(read_config(path)["model"]["decoder"]["filename"])
    return None
