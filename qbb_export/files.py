"""Files that are either whole or not there."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import mmap
import os
import sys
from collections.abc import Iterator
from pathlib import Path


def write_whole(path: Path, data: bytes) -> None:
    """Replace a file in one step, and see to it that this survives a power cut.

    A kill at any moment leaves the old file or the new one, and perhaps ``<name>.tmp`` beside it.

    Raises:
        OSError: it cannot be written; what was there before is untouched.
    """
    with written_with(path, data):
        pass


@contextlib.contextmanager
def written_with(path: Path, data: bytes) -> Iterator[None]:
    """As :func:`write_whole`, but the file gets its name after the body, if that succeeds; its room is taken before.

    Raises:
        OSError: it cannot be written, before the body, or cannot get its name, after it.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync_folder(path.parent)


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def page_out(address: int, size: int) -> None:
    """Tell the system that memory will not be needed soon: pages of a mapped file then leave this process.

    It changes no contents, whatever the memory is. Does nothing where the system has no such call (Linux 5.4 has).
    """
    if sys.platform != "linux":
        return
    page, page_out_advice = mmap.PAGESIZE, 21
    start = -(-address // page) * page
    length = (address + size) // page * page - start
    if length > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), page_out_advice)


def sync_file(path: Path) -> None:
    """Bring a file's bytes to the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Bring renames in a folder to the disk."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
