"""The files of a checkpoint: which tensor lies in which."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open

from qbb_export.errors import QbbError
from qbb_export.pretrained import check_safetensors


def read_json(file: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        QbbError: the file is missing, cannot be read, or holds something else.
    """
    try:
        value = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:  # also what is no UTF-8
        raise QbbError("cannot read", where=file, expected="a JSON file", got=error) from error
    if not isinstance(value, dict):
        raise QbbError("cannot read", where=file, expected="a JSON object", got=type(value).__name__)
    return value


def tensor_files(folder: Path) -> dict[str, Path]:
    """The file of each tensor in a folder, whole and with every tensor that an index promises.

    Where several files would do, the one called model.safetensors(.index.json) counts, as it does for transformers.

    Raises:
        QbbError: a file is missing or damaged, or it is not clear which one to read.
    """
    indexes, files = (_candidates(folder, suffix) for suffix in (".safetensors.index.json", ".safetensors"))
    if len(indexes) > 1 or (not indexes and len(files) != 1):
        raise QbbError(
            "cannot tell which files to read",
            where=folder,
            expected="one .safetensors file, or one .safetensors.index.json",
            got=[file.name for file in indexes or files] or "none",
        )
    if not indexes:
        return dict.fromkeys(_keys(files[0]), files[0])
    listed = read_json(indexes[0]).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
        raise QbbError("damaged index", where=indexes[0], expected="weight_map")
    present: dict[str, set[str]] = {}
    for name in sorted(set(listed.values())):
        # A path that leaves the folder could name any file of the user.
        if Path(name).name != name or "\\" in name or not (folder / name).is_file():
            raise QbbError("file of the index is missing", where=indexes[0], expected="a file beside it", got=name)
        present[name] = _keys(folder / name)
    for tensor, name in listed.items():
        if tensor not in present[name]:
            raise QbbError("tensor is missing", where=folder / name, expected=tensor)
    return {tensor: folder / name for tensor, name in listed.items()}


def _candidates(folder: Path, suffix: str) -> list[Path]:
    standard = folder / f"model{suffix}"
    return [standard] if standard.is_file() else sorted(folder.glob(f"*{suffix}"))


def _keys(file: Path) -> set[str]:
    check_safetensors(file)
    with safe_open(file, framework="numpy") as tensors:
        return set(tensors.keys())
