"""Read model files, and write ``model.onnx`` with one external data file that bears its own SHA-256 as name.

The rename of ``model.onnx`` is the commit point: before it the old file and its data are untouched, after it the new
ones are complete. A graph can therefore never be paired with another graph's weights. The graph carries its own SHA-256
in its metadata: small weights lie in it, and no parser notices a flipped bit in them.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import onnx
import onnx.checker
import onnx_ir as ir

from qbb_export.errors import QbbError
from qbb_export.files import file_sha256, sync_file, sync_folder, write_whole

# Protocol buffers cannot hold more.
_MAX_GRAPH_BYTES = 2**31
# Smaller initializers stay in the graph, where shape inference and constant folding see them.
EXTERNAL_FROM_BYTES = 4096
# ONNX Runtime maps page-aligned data in place instead of copying it.
PAGE = 4096
_DATA_NAME = re.compile(r"\.([0-9a-f]{64})\.data")
# Entry of the graph's metadata: SHA-256 of the file with 64 zeros in the digest's place.
SEAL_KEY = "qbb.sha256"
_NO_SEAL = "0" * 64

OnTensor = Callable[[int, int], None]


def read_graph(path: Path, *, sealed: bool = False) -> ir.Model:
    """Read an .onnx file's graph. Weights in external files are mapped only when they are asked for.

    Args:
        path: an .onnx file.
        sealed: compare the file with the SHA-256 in its own metadata, where there is one.

    Raises:
        QbbError: no such file, not an ONNX model, not what was written, or external data that is missing, too short or
            outside the folder.
    """
    if not path.is_file():
        raise QbbError("no such file", where=path, expected="an .onnx file", got=_kind(path))
    if path.suffix.lower() == ".ort":  # ONNX Runtime would read it with another parser than ours
        raise QbbError("wrong suffix", where=path, expected="an .onnx file", got=path.suffix)
    if path.stat().st_size >= _MAX_GRAPH_BYTES:
        raise QbbError("graph is too large", where=path, expected="< 2 GiB", got=f"{path.stat().st_size} bytes")
    try:
        content = path.read_bytes()
        proto = onnx.load_model_from_string(content)
        if not proto.HasField("graph") or not proto.opset_import:
            raise ValueError("no graph in it")
        if sealed:
            _check_seal(content, proto, path)
        model = ir.from_proto(proto)
        for graph in model.graphs():
            ir.external_data.set_base_dir(graph, path.parent)
        external = list(external_tensors(model))
    except QbbError:
        raise
    except Exception as error:  # every parser has its own exception types
        raise QbbError("not an ONNX model", where=path, got=f"{type(error).__name__}: {error}") from error
    for tensor in external:
        _check_external(tensor, path)
    return model


def run_checker(path: Path, *, full: bool) -> None:
    """Run ONNX's own checker on a file.

    Args:
        path: an .onnx file.
        full: with shape inference, which refuses some models of other makes that ONNX Runtime takes.

    Raises:
        QbbError: it refuses the model.
    """
    try:
        onnx.checker.check_model(path, full_check=full)
    except Exception as error:  # ValidationError is no subclass of one that Python has
        raise QbbError("ONNX's checker refuses the model", where=path, got=error) from error


def external_tensors(model: ir.Model) -> Iterator[ir.ExternalTensor]:
    """Tensors kept outside the graph's file: initializers and attributes, subgraphs and functions included."""
    for graph in model.graphs():
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                yield value.const_value
    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        for node in graph.all_nodes():
            for attribute in node.attributes.values():
                if not attribute.is_ref() and isinstance(attribute.value, ir.ExternalTensor):
                    yield attribute.value


def _check_external(tensor: ir.ExternalTensor, path: Path) -> None:
    """Accept bare file names beside the model only.

    *Why:* a path that leaves the folder would let a model read any file of the user (CVE-2022-25882, CVE-2024-27318
    and CVE-2026-27489 were of that kind).
    """
    location = str(tensor.location)
    where = f"{path}, tensor '{tensor.name}'"
    target = path.parent / location
    bare = not set(location) & set("/\\\0") and location not in ("", ".", "..")
    # realpath and not resolve, which raises where links go in a circle.
    if not bare or Path(os.path.realpath(target)).parent != path.parent.resolve():
        raise QbbError(
            "external data leaves the model's folder", where=where, expected="a file beside it", got=location
        )
    if not target.is_file():  # opens nothing: a fifo would wait for ever
        raise QbbError("external data is missing", where=where, expected=f"a file {target.name}", got=_kind(target))
    # A hard link is the file itself: nothing tells one that an archive planted, to have a foreign file read, from a
    # harmless one. ONNX's checker refuses both; so do we, before a byte is read.
    links = target.stat().st_nlink
    if links > 1:
        raise QbbError(
            "external data has several names", where=where, expected=f"a copy of {location}", got=f"{links} hard links"
        )
    if tensor.dtype == ir.DataType.UNDEFINED:
        raise QbbError("external data has no type", where=where)
    offset, length = tensor.offset or 0, tensor.length or 0
    available = target.stat().st_size
    if offset < 0 or length < 0 or offset + max(length, tensor.nbytes) > available:
        raise QbbError(
            "external data is too short",
            where=where,
            expected=f"{offset + max(length, tensor.nbytes)} bytes",
            got=f"{available} bytes in {location}",
        )


def _kind(path: Path) -> str | None:
    """What is there in a file's place, in words."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return None
    return "a folder" if stat.S_ISDIR(mode) else "no regular file"


def _check_seal(content: bytes, proto: onnx.ModelProto, path: Path) -> None:
    digest = next((entry.value for entry in proto.metadata_props if entry.key == SEAL_KEY), None)
    if digest is None:
        return
    entry = _seal_entry(digest)
    got = hashlib.sha256(content.replace(entry, _seal_entry(_NO_SEAL))).hexdigest()
    if got != digest:
        raise QbbError(
            "file is damaged, or was changed by another program (which should drop the metadata)",
            where=path,
            expected=f"{SEAL_KEY} {digest}",
            got=got,
        )


def is_sealed(model: ir.Model) -> bool:
    """Whether a graph that was read carries its own SHA-256."""
    return SEAL_KEY in model.metadata_props


def _seal_entry(digest: str) -> bytes:
    """The metadata entry as it lies in the file."""
    entry: bytes = onnx.StringStringEntryProto(key=SEAL_KEY, value=digest).SerializeToString()
    return entry


def _graph_bytes(proto: onnx.ModelProto, *, seal: bool) -> bytes:
    """The bytes of a graph, with its own digest among them if ``seal``; another graph's digest goes."""
    others = [entry for entry in proto.metadata_props if entry.key != SEAL_KEY]
    del proto.metadata_props[:]
    proto.metadata_props.extend(others)
    if not seal:
        unsealed: bytes = proto.SerializeToString(deterministic=True)
        return unsealed
    proto.metadata_props.add(key=SEAL_KEY, value=_NO_SEAL)
    content: bytes = proto.SerializeToString(deterministic=True)
    return content.replace(_seal_entry(_NO_SEAL), _seal_entry(hashlib.sha256(content).hexdigest()))


def data_digest(name: str) -> str | None:
    """The SHA-256 in the name of a data file of ours, or None for a file of another make."""
    match = _DATA_NAME.search(name)
    return match.group(1) if match and name.endswith(match.group(0)) else None


def check_writable(path: Path, *, force: bool) -> None:
    """Refuse an output that cannot or must not be written, before any work is done.

    Raises:
        QbbError: missing or unwritable folder, a folder in the file's place, or an existing file without ``force``.
    """
    folder = path.parent
    if path.suffix != ".onnx":
        raise QbbError("output has a wrong suffix", where=path, expected="a path ending in .onnx", got=path.suffix)
    if not folder.is_dir():
        raise QbbError("output folder does not exist", where=path, expected="an existing folder", got=folder)
    if path.is_dir():
        raise QbbError("output is a folder", where=path, expected="a file name", got="a folder")
    if not os.access(folder, os.W_OK):
        raise QbbError("output folder is not writable", where=path, expected="write permission", got=folder)
    if path.exists() and not force:
        raise QbbError("output exists already (--force replaces it)", where=path)


def save(model: ir.Model, path: Path, *, on_tensor: OnTensor | None = None, seal: bool = True) -> int:
    """Write ``model`` to ``path`` and its large initializers beside it.

    Tensors are read and written one at a time. The model's initializers refer to the written file afterwards.

    Args:
        model: the finished graph.
        path: ends in ``.onnx``; an existing file is replaced.
        on_tensor: called with (tensors written, tensors in all).
        seal: put the graph's own digest into it: then no other program can change it unnoticed, not even one that
            should.

    Returns:
        Bytes written, graph and data.

    Raises:
        QbbError: the disk is full or the folder cannot be written; what was there before is left as it was. (If the
            disk fails after the rename, the new files stand, complete, and the old data beside them: a power cut may
            yet bring the old graph back.)
    """
    temporary_data = path.with_name(f"{path.name}.data.tmp")
    new_data, graph = None, b""
    # What a killed run left: onnx_ir writes in a folder beside the file.
    for leftover in path.parent.glob(f".{glob.escape(temporary_data.name)}.*"):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        ir.external_data.unload_from_model(
            model,
            path.parent,
            temporary_data.name,
            size_threshold_bytes=EXTERNAL_FROM_BYTES,
            alignment=PAGE,
            align_threshold=EXTERNAL_FROM_BYTES,
            callback=None if on_tensor is None else lambda _, info: on_tensor(info.index + 1, info.total),
        )
        data = None
        if temporary_data.exists() and temporary_data.stat().st_size:
            data = path.with_name(f"{path.stem}.{file_sha256(temporary_data)}.data")
            _point_to(model, data.name)
        graph = _graph_bytes(ir.to_proto(model), seal=seal)
        if data is not None:
            sync_file(temporary_data)
            new_data = None if data.exists() else data
            temporary_data.replace(data)
            sync_folder(path.parent)
        write_whole(path, graph)
    except BaseException as error:
        with contextlib.suppress(OSError):
            if new_data is not None and not _holds(path, graph):  # no graph refers to it
                new_data.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise QbbError(
                "cannot write the model", where=path, got=error.strerror or f"{error} (disk full?)"
            ) from error
        raise
    finally:
        with contextlib.suppress(OSError):
            temporary_data.unlink(missing_ok=True)
    for stale in path.parent.glob(f"{path.stem}.*.data"):
        if data_digest(stale.name) and stale != data and stale.name[: -len(".data") - 65] == path.stem:
            stale.unlink()
    return path.stat().st_size + (data.stat().st_size if data is not None else 0)


def _holds(path: Path, data: bytes) -> bool:
    return path.is_file() and path.read_bytes() == data


def _point_to(model: ir.Model, location: str) -> None:
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor):
                value.const_value = ir.ExternalTensor(
                    location,
                    tensor.offset,
                    tensor.length,
                    tensor.dtype,
                    shape=tensor.shape,
                    name=value.name or "",
                    base_dir=tensor.base_dir,
                )
