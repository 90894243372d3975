"""Output folders that are either whole or not there."""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
from pathlib import Path

from qbb_export.errors import QbbError
from qbb_export.files import sync_folder


def check_folder_writable(folder: Path, mark: str, *, force: bool) -> None:
    """Refuse an output folder that cannot or must not be written, before any work is done.

    Args:
        folder: the output.
        mark: file by which a folder of the same kind is known; any other folder with something in it stays.
        force: replace one of the same kind.

    Raises:
        QbbError: missing or unwritable parent, a file in its place, something else in it, or one of the same kind
            without ``force``.
    """
    parent = folder.absolute().parent
    if not parent.is_dir():
        raise QbbError("output folder's parent does not exist", where=folder, expected="an existing folder", got=parent)
    if not os.access(parent, os.W_OK):
        raise QbbError("output folder is not writable", where=folder, expected="write permission", got=parent)
    if folder.exists() and not folder.is_dir():
        raise QbbError("output is a file", where=folder, expected="a folder to make, or FILE.onnx", got="a file")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not (folder / mark).is_file():
        raise QbbError("output folder holds something else", where=folder, expected=f"{mark} in it, or no folder")
    if not force:
        raise QbbError("output exists already (--force replaces it)", where=folder)


def scratch_path(folder: Path) -> Path:
    """What a folder is called until it is complete."""
    folder = folder.absolute()
    return folder.with_name(folder.name + ".tmp")


def make_scratch(scratch: Path) -> None:
    """Make the folder, empty; what a killed run left of it goes.

    Raises:
        QbbError: it cannot be made.
    """
    try:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
    except OSError as error:
        raise QbbError("cannot write the folder", where=scratch, got=error.strerror or error) from error


def commit(scratch: Path, folder: Path) -> None:
    """Give the finished folder its name; what was there before goes.

    Raises:
        QbbError: the disk fails. Either folder has the name then, whole.
    """
    old = scratch.with_name(scratch.name + ".old")
    try:
        shutil.rmtree(old, ignore_errors=True)
        if not (folder.exists() and _swap(scratch, folder)):
            if folder.exists():
                folder.rename(old)
            scratch.rename(folder)
        sync_folder(folder.absolute().parent)
    except OSError as error:
        if old.exists() and not folder.exists():
            old.rename(folder)
        raise QbbError("cannot write the folder", where=folder, got=error.strerror or error) from error
    finally:
        if folder.exists():  # else the old one is all there is
            shutil.rmtree(old, ignore_errors=True)
            shutil.rmtree(scratch, ignore_errors=True)


def _swap(a: Path, b: Path) -> bool:
    """Let two folders swap names in one step: no kill finds the name without a folder. False where that cannot be."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return renameat2 is not None and renameat2(here, os.fsencode(a), here, os.fsencode(b), exchange) == 0
