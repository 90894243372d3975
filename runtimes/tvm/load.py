"""Run what ``compile`` wrote; needs TVM's runtime, not its compiler (``TVM_USE_RUNTIME_LIB=1`` loads no more)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from qbb_export.errors import QbbError
from qbb_export.files import file_sha256
from qbb_export.runtimes.tvm.targets import LIBRARY
from qbb_export.runtimes.tvm.versions import check_versions

MANIFEST: Final = "manifest.json"
MANIFEST_VERSION: Final = 1


class Compiled:
    """A compiled model, open.

    Attributes:
        manifest: what its folder says of it.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        import tvm
        from tvm.runtime.vm import VirtualMachine

        self.manifest = manifest
        self._tvm = tvm
        self._device = tvm.runtime.device(manifest["device"])
        if not self._device.exist:
            name, needs = manifest["device"], "the device, its driver, and a TVM runtime that has it"
            raise QbbError("no device for a compiled model", where=folder, expected=needs, got=f"no {name} here")
        self._machine = VirtualMachine(tvm.runtime.load_module(str(folder / LIBRARY)), self._device)

    def run(self, feeds: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """Outputs by name.

        Args:
            feeds: by name: numbers of the types and ranks that the manifest has; sizes with a name there are free, but
                one name is one size.

        Raises:
            QbbError: a missing input, or one of another type or shape.
        """
        sizes: dict[str, int] = {}
        arguments = {}
        for value in self.manifest["inputs"]:
            name = value["name"]
            if name not in feeds:
                raise QbbError("missing input", where=name, expected=f"{value['dtype']} {value['shape']}")
            array = np.asarray(feeds[name])
            fits = array.dtype == value["dtype"] and array.ndim == len(value["shape"])
            for size, wanted in zip(array.shape, value["shape"], strict=False):
                fits = fits and size == (wanted if isinstance(wanted, int) else sizes.setdefault(wanted, size))
            if not fits:
                got = f"{array.dtype} {list(array.shape)}"
                raise QbbError("bad input", where=name, expected=f"{value['dtype']} {value['shape']}", got=got)
            arguments[name] = self.tensor(array)
        return {name: tensor.numpy() for name, tensor in self.run_tensors(arguments).items()}

    def tensor(self, array: npt.NDArray[Any]) -> Any:
        """A copy of an array for :meth:`run_tensors`: TVM wants memory that numpy does not always align."""
        return self._tvm.runtime.tensor(array, self._device)

    def run_tensors(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """As :meth:`run` with TVM's tensors, which are not looked at and not copied."""
        found = self._machine["main"](*(feeds[value["name"]] for value in self.manifest["inputs"]))
        names = [value["name"] for value in self.manifest["outputs"]]
        several = [found] if len(names) == 1 and hasattr(found, "numpy") else list(found)
        return dict(zip(names, several, strict=True))


def load(folder: str | Path) -> Compiled:
    """Open a folder that ``compile`` wrote.

    Raises:
        QbbError: no such folder, a manifest of another version, a library that is not the one it was written with, or
            TVM is not installed, or there is no device of the kind it was compiled for.
    """
    folder = Path(folder)
    check_versions()
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["version"] != MANIFEST_VERSION:
            raise QbbError(
                "manifest of another version", where=folder, expected=MANIFEST_VERSION, got=manifest["version"]
            )
        library, _ = manifest["library"]["file"], manifest["device"]
        if library != LIBRARY:
            raise QbbError("not a library for this machine", where=folder, expected=LIBRARY, got=library)
        digest = file_sha256(folder / LIBRARY)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise QbbError("no compiled model", where=folder, expected=f"{MANIFEST} and {LIBRARY}", got=error) from error
    if digest != manifest["library"]["sha256"]:
        raise QbbError("the library is not the one that was compiled", where=folder / LIBRARY, got=f"sha256 {digest}")
    return Compiled(folder, manifest)
