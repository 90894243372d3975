"""Where the library with the kernels is, and what it can do.

The library is plain C: ONNX Runtime opens it by path, nothing here imports it into Python.
"""

from __future__ import annotations

import ctypes
import os
import sys
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Final

from qbb_export import format as fmt
from qbb_export.errors import QbbError

_NAMES: Final = {"win32": "qbb_ops.dll", "darwin": "libqbb_ops.dylib"}
_HOW_TO_BUILD: Final = (
    "install a wheel, or build it: cmake -S custom_ops -B build && cmake --build build, "
    "then set QBB_LIBRARY to the file"
)


class _FormatInfo(ctypes.Structure):
    """``qbb_format_info`` of ``include/qbb/ops.h``."""

    _fields_ = [
        ("format_version", ctypes.c_int32),
        ("opset_version", ctypes.c_int32),
        ("max_bases", ctypes.c_int32),
        ("num_layouts", ctypes.c_int32),
        ("word_bits", ctypes.c_int32),
        ("tile_rows", ctypes.c_int32),
    ]


@dataclass(frozen=True)
class LibraryInfo:
    """What a library says about itself.

    Args:
        path: the file.
        format_version: version of the format that it reads.
        layouts: layouts that it reads.
        isas: instruction sets that it was compiled for, best first, and whether this CPU has them.
        cuda: it has kernels for NVIDIA GPUs.
    """

    path: Path
    format_version: int
    layouts: tuple[int, ...]
    isas: dict[str, bool]
    cuda: bool


def library_path() -> Path:
    """The shared library: ``QBB_LIBRARY`` where that is set, else the one in the installed package.

    Raises:
        QbbError: there is none.
    """
    override = os.environ.get("QBB_LIBRARY")
    if override:
        path = Path(override)
        if not path.is_file():
            raise QbbError("no such file", where="QBB_LIBRARY", expected="the path of libqbb_ops", got=override)
        return path.resolve()
    name = _NAMES.get(sys.platform, "libqbb_ops.so")
    # A wheel is unpacked to disk and an editable install maps the name to its build: a path in both cases.
    path = Path(str(resources.files("qbb_export").joinpath("_lib", name)))
    if not path.is_file():
        raise QbbError("kernel library not found", where=path, expected=_HOW_TO_BUILD, got="no file")
    return path


def library_info(path: Path | None = None) -> LibraryInfo:
    """Open the library and ask it, refusing one of another format.

    Args:
        path: the file; None for :func:`library_path`.

    Raises:
        QbbError: no library, not ours, or its constants differ from those of ``qbb_export.format``.
    """
    path = library_path() if path is None else path
    try:
        library = ctypes.CDLL(str(path))
        info = _FormatInfo()
        library.qbb_get_format.argtypes = [ctypes.POINTER(_FormatInfo)]
        library.qbb_get_format.restype = None
        library.qbb_isa_name.restype = ctypes.c_char_p
        library.qbb_get_format(ctypes.byref(info))
        names = [library.qbb_isa_name(i).decode() for i in range(library.qbb_isa_count())]
        isas = {name: bool(library.qbb_isa_available(i)) for i, name in enumerate(names)}
        cuda = bool(library.qbb_cuda_compiled())
    except (OSError, AttributeError) as error:
        raise QbbError("cannot open the kernel library", where=path, expected="libqbb_ops", got=error) from error
    theirs = {name: int(getattr(info, name)) for name, *_ in _FormatInfo._fields_}
    ours = {
        "format_version": fmt.FORMAT_VERSION,
        "opset_version": fmt.OPSET_VERSION,
        "max_bases": fmt.MAX_BASES,
        "num_layouts": len(fmt.LAYOUTS),
        "word_bits": fmt.WORD_BITS,
        "tile_rows": fmt.TILE_ROWS,
    }
    if theirs != ours:
        raise QbbError("library of another format; build both from one source", where=path, expected=ours, got=theirs)
    return LibraryInfo(path, info.format_version, tuple(range(info.num_layouts)), isas, cuda)
