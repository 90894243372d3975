"""``MODEL.qbb/``: the finished layers of a run, so that an interrupted one goes on where it stopped.

    MODEL.qbb/
        manifest.json                    format, recipe, settings and version of the tool that wrote last
        lock                             held while a process works on the record
        layers/<name>-<hash>.safetensors one quantized matrix: words, scales and, if any, offset
        stages/<stage>/                  the same, of the earlier stages of a recipe
        distill/<name>.safetensors       the written text; the state of a training run that is under way
        distill/log.jsonl                how the training went

A file appears under its name only when it is complete (temporary file, fsync, rename, fsync of the folder), and
nothing in it depends on time or place: the same run writes the same bytes. A layer counts as done if its file is
whole (a digest says so) and was made from the same weights with the same settings (its key says so).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from qbb_export import __version__
from qbb_export.errors import QbbError
from qbb_export.files import write_whole
from qbb_export.format import LAYOUT_ROWS, Spec
from qbb_export.quantize import Quantized, QuantizeSettings, quantize
from qbb_export.quantize.rows import as_rows, row_blocks, to_host

try:
    import fcntl
except ImportError:  # pragma: no cover - Windows: no lock; two runs on one record are the user's to avoid there
    fcntl = None  # type: ignore[assignment]

RECORD_FORMAT: Final = 1

# Part of every key. Raise it when a change to the recipes changes what they return, so that old layers are redone.
REVISION: Final = 5

# The only key of the safetensors metadata: with several, their order in the file would vary from run to run.
METADATA_KEY: Final = "qbb"
READABLE: Final = 80  # characters of a layer's name that its file name keeps
DAMAGE: Final = (SafetensorError, ArithmeticError, LookupError, TypeError, ValueError, QbbError)


def layer_key(weights: Any, settings: QuantizeSettings, recipe: str) -> str:
    """SHA-256 of all that a quantized layer depends on: its weights as float32, settings and recipe.

    Args:
        weights: float ``[N, K]`` or :class:`~qbb_export.quantize.WeightRows`, read a block of rows at a time.
        settings: of this layer.
        recipe: name of the recipe.
    """
    source = as_rows(weights)
    head = {"recipe": recipe, "revision": REVISION, "settings": settings.as_dict(), "shape": list(source.shape)}
    digest = hashlib.sha256(_json(head))
    for _, _, _, block in row_blocks(source):
        digest.update(np.ascontiguousarray(to_host(block), dtype="<f4").data)
    return digest.hexdigest()


def file_name(layer: str) -> str:
    """A file name for any layer name: its readable part and a hash, safe and unique on any file system."""
    readable = re.sub(r"[^A-Za-z0-9._-]", "_", layer).lstrip("._-")[:READABLE]
    mark = hashlib.sha256(layer.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return f"{readable}-{mark}.safetensors" if readable else f"{mark}.safetensors"


class Record:
    """The record of one run. Make it with :meth:`open`; reading goes on working after :meth:`close`."""

    def __init__(self, folder: Path, lock: int | None, layers: Path | None = None) -> None:
        self.folder = folder
        self._layers = folder / "layers" if layers is None else layers
        self._lock = lock

    @classmethod
    def open(cls, folder: Path, *, recipe: str, settings: QuantizeSettings | None = None) -> Record:
        """Create a record, or go on with the one that is there; until closed, no other process can.

        A record made with another recipe or other settings is taken over: its layers are redone one by one where
        their own key differs. Temporary files of a killed run are removed.

        Args:
            folder: ``MODEL.qbb``.
            recipe: for the manifest.
            settings: for the manifest: those of all layers without settings of their own.

        Raises:
            QbbError: the folder is in use, is not a record, is of a newer format, or cannot be written.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _check_is_record(folder)
            record = cls(folder, _take_lock(folder))
        except OSError as error:
            raise QbbError("cannot open the record", where=folder, got=error) from error
        try:
            (folder / "layers").mkdir(exist_ok=True)
            for leftover in folder.rglob("*.tmp"):
                leftover.unlink()
            manifest = {
                "format": RECORD_FORMAT,
                "recipe": recipe,
                "settings": None if settings is None else settings.as_dict(),
                "version": __version__,
            }
            write_whole(folder / "manifest.json", _json(manifest) + b"\n")
        except BaseException as error:
            record.close()
            if isinstance(error, OSError):
                raise QbbError("cannot write the record", where=folder, got=error) from error
            raise
        return record

    @classmethod
    def join(cls, folder: Path) -> Record:
        """The record that another process of the same run holds the lock of."""
        return cls(folder, None)

    def stage(self, name: str) -> Record:
        """The layers as an earlier stage of the recipe left them, in a folder of their own; under the same lock."""
        folder = self.folder / "stages" / name
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise QbbError("cannot write the record", where=folder, got=error) from error
        return Record(self.folder, None, folder)

    def branch(self, name: str) -> Record:
        """A record inside this one, for a run that another one starts from; under the same lock."""
        folder = self.folder / "branches" / name
        try:
            (folder / "layers").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise QbbError("cannot write the record", where=folder, got=error) from error
        return Record(folder, None)

    def quantized(
        self,
        name: str,
        weights: Any,
        settings: QuantizeSettings,
        recipe: str,
        on_rows: Callable[[int, int], None] | None = None,
    ) -> Quantized:
        """The layer from the record, or quantized now and put there.

        Arguments and errors are those of :func:`qbb_export.quantize.quantize` and :meth:`put`.
        """
        key = layer_key(weights, settings, recipe)
        layer = self.get(name, key)
        if layer is None:
            layer = quantize(weights, settings, recipe, name=name, on_rows=on_rows)
            self.put(name, key, layer)
        return layer

    def get(self, name: str, key: str) -> Quantized | None:
        """A finished layer; None if there is none, it is damaged, or it was made from something else.

        Raises:
            QbbError: the file is there but cannot be read.
        """
        try:
            return self._read(name, key)
        except DAMAGE:
            return None
        except FileNotFoundError:
            return None
        except OSError as error:
            raise QbbError("cannot read the record", where=self._path(name), got=error) from error

    def load(self, name: str) -> Quantized:
        """A layer that must be there, whatever it was made from.

        Raises:
            QbbError: it is missing, damaged or cannot be read.
        """
        try:
            return self._read(name, None)
        except (*DAMAGE, OSError) as error:
            raise QbbError("layer is missing or damaged", where=self._path(name), got=error) from error

    def put(self, name: str, key: str, layer: Quantized) -> None:
        """Keep a finished layer; a kill at any moment leaves the old file or the new one.

        Raises:
            QbbError: it cannot be written; what was there before is untouched.
        """
        tensors: dict[str, npt.NDArray[Any]] = {"words": layer.words, "scales": layer.scales}
        if layer.offset is not None:
            tensors["offset"] = layer.offset
        spec = layer.spec
        head: dict[str, Any] = {
            "K": spec.K,
            "N": spec.N,
            "bases": spec.bases,
            "errors": list(layer.errors),
            "group_size": spec.group_size,
            "key": key,
            "name": name,
        }
        head["digest"] = _digest(head, tensors)
        try:
            write_whole(self._path(name), _packed(tensors, head))
        except OSError as error:
            raise QbbError("cannot write the record", where=self._path(name), got=error) from error

    def put_tensors(self, name: str, key: str, tensors: Mapping[str, npt.NDArray[Any]]) -> None:
        """Keep arrays of any kind under ``distill/``; as atomic as :meth:`put`.

        Raises:
            QbbError: they cannot be written.
        """
        path = self.folder / "distill" / f"{name}.safetensors"
        head: dict[str, Any] = {"key": key, "name": name}
        head["digest"] = _digest(head, tensors)
        try:
            path.parent.mkdir(exist_ok=True)
            write_whole(path, _packed(tensors, head))
        except OSError as error:
            raise QbbError("cannot write the record", where=path, got=error) from error

    def get_tensors(self, name: str, key: str) -> dict[str, npt.NDArray[Any]] | None:
        """What :meth:`put_tensors` kept; None if there is nothing, it is damaged, or was made from something else."""
        path = self.folder / "distill" / f"{name}.safetensors"
        try:
            data = path.read_bytes()
            size = int.from_bytes(data[:8], "little")
            head = json.loads(json.loads(data[8 : 8 + size])["__metadata__"][METADATA_KEY])
            tensors = load_tensors(data)
            whole = head.pop("digest") == _digest(head, tensors)
        except (*DAMAGE, FileNotFoundError):
            return None
        except OSError as error:
            raise QbbError("cannot read the record", where=path, got=error) from error
        return tensors if whole and head == {"key": key, "name": name} else None

    def drop_tensors(self, name: str) -> None:
        """Remove what is not needed any more."""
        (self.folder / "distill" / f"{name}.safetensors").unlink(missing_ok=True)

    def put_text(self, name: str, text: str) -> None:
        """Keep a text file under ``distill/``."""
        path = self.folder / "distill" / name
        try:
            path.parent.mkdir(exist_ok=True)
            write_whole(path, text.encode())
        except OSError as error:
            raise QbbError("cannot write the record", where=path, got=error) from error

    def close(self) -> None:
        """Let other processes work on the record. Closing twice does nothing."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Record:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _path(self, name: str) -> Path:
        return self._layers / file_name(name)

    def _read(self, name: str, key: str | None) -> Quantized:
        """Read and check a layer; anything wrong is one of DAMAGE or an OSError."""
        data = self._path(name).read_bytes()
        size = int.from_bytes(data[:8], "little")
        head = json.loads(json.loads(data[8 : 8 + size])["__metadata__"][METADATA_KEY])
        if head["name"] != name or (key is not None and head["key"] != key):
            raise QbbError("made from something else")
        tensors = load_tensors(data)
        if head.pop("digest") != _digest(head, tensors):
            raise QbbError("digest differs")
        spec = Spec(head["K"], head["N"], head["bases"], head["group_size"], LAYOUT_ROWS)
        return Quantized(spec, tensors["words"], tensors["scales"], tensors.get("offset"), tuple(head["errors"]))


def _json(value: Mapping[str, Any]) -> bytes:
    """ASCII JSON that depends on the values only."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode("ascii")


def _digest(head: Mapping[str, Any], tensors: Mapping[str, npt.NDArray[Any]]) -> str:
    """SHA-256 of everything that a layer's file says."""
    digest = hashlib.sha256(_json(head))
    for name in sorted(tensors):
        array = tensors[name]
        digest.update(_json({"name": name, "dtype": array.dtype.str, "shape": list(array.shape)}))
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _check_is_record(folder: Path) -> None:
    """Refuse to write into a folder that something else lives in."""
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
        version = manifest["format"]
    except FileNotFoundError:
        # A run killed in its first moments leaves no manifest, but nothing foreign either.
        foreign = sorted(p.name for p in folder.iterdir() if p.name not in ("lock", "layers", "manifest.json.tmp"))
        if foreign:
            raise QbbError("folder exists and is not a record", where=folder, got=foreign[0]) from None
        return
    except (LookupError, TypeError, ValueError):
        raise QbbError("manifest.json is damaged (delete the folder to start anew)", where=folder) from None
    if version != RECORD_FORMAT:
        raise QbbError("record of another format", where=folder, expected=RECORD_FORMAT, got=version)


def _take_lock(folder: Path) -> int | None:
    """An open descriptor that holds the lock; the system lets go of it however the process ends."""
    if fcntl is None:
        return None
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise QbbError("record is in use by another process", where=folder) from None
    return lock


@dataclass(frozen=True)
class LayerHead:
    """What a finished layer's file says of itself, the packed bits left aside.

    Args:
        name: of the layer.
        spec: plain rows, whatever layout the model was written in.
        scale_bits: of one scale, 16 or 32.
        offset: whether groups have one.
        errors: relative squared errors as the recipe went on, last of what is stored.
    """

    name: str
    spec: Spec
    scale_bits: int
    offset: bool
    errors: tuple[float, ...]


def read_layers(folder: Path, stage: str | None = None) -> list[LayerHead]:
    """The heads of all finished layers, ``layers.2`` before ``layers.10``. Takes no lock and changes nothing.

    Args:
        folder: ``MODEL.qbb``.
        stage: as this earlier stage of the recipe left them (see :meth:`Record.stage`); default: as they are.

    Raises:
        QbbError: a file cannot be read or is damaged.
    """
    heads = []
    for path in folder.glob("layers/*.safetensors" if stage is None else f"stages/{stage}/*.safetensors"):
        try:
            heads.append(_read_head(path))
        except OSError as error:
            raise QbbError("cannot read the record", where=path, got=error) from error
        except DAMAGE as error:
            raise QbbError("layer is damaged (export again to redo it)", where=path, got=error) from error
    return sorted(heads, key=lambda head: _natural(head.name))


def _natural(name: str) -> list[str]:
    """A key that sorts numbers in names by their value."""
    return [part.zfill(12) if part.isdigit() else part for part in re.split(r"([0-9]+)", name)]


def _read_head(path: Path) -> LayerHead:
    """Read a head and check it against the tensors' shapes and the file's length; see DAMAGE."""
    with path.open("rb") as file:
        size, length = int.from_bytes(file.read(8), "little"), os.fstat(file.fileno()).st_size
        if size > length:
            raise ValueError("file is cut off")
        tensors = json.loads(file.read(size))
    head = json.loads(tensors.pop("__metadata__")[METADATA_KEY])
    spec = Spec(head["K"], head["N"], head["bases"], head["group_size"], LAYOUT_ROWS)
    shapes = {name: (tensor["dtype"], tuple(tensor["shape"])) for name, tensor in tensors.items()}
    scales = shapes["scales"][0]
    expected = {"words": ("U32", spec.planes_shape), "scales": (scales, spec.scales_shape)}
    if "offset" in shapes:
        expected["offset"] = ("F32", spec.offset_shape)
    errors = tuple(map(float, head["errors"]))
    whole = 8 + size + max(tensor["data_offsets"][1] for tensor in tensors.values()) == length
    if shapes != expected or not whole or not errors or not all(map(math.isfinite, errors)):
        raise ValueError("tensors, head and length of the file do not agree")
    if file_name(head["name"]) != path.name:
        raise ValueError("name of the file and of the layer do not agree")
    return LayerHead(head["name"], spec, {"F16": 16, "F32": 32}[scales], "offset" in shapes, errors)


def _packed(tensors: Mapping[str, npt.NDArray[Any]], head: Mapping[str, Any]) -> bytes:
    """The bytes of a safetensors file.

    Raises:
        MemoryError: too little of it. The library would end the process, so the room for its copies is asked for first.
    """
    total = sum(array.nbytes for array in tensors.values())
    np.empty(3 * total + (1 << 20), np.uint8)
    return bytes(save_tensors(dict(tensors), {METADATA_KEY: _json(head).decode("ascii")}))
