"""A finished folder takes the name of an old one: whole, whatever the disk does."""

import errno
from pathlib import Path

import pytest

from qbb_export import folders
from qbb_export.errors import QbbError


def two(tmp_path: Path) -> tuple[Path, Path]:
    scratch, folder = tmp_path / "out.tmp", tmp_path / "out"
    for path, text in ((scratch, "new"), (folder, "old")):
        path.mkdir()
        (path / "file").write_text(text)
    return scratch, folder


def names(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in tmp_path.iterdir())


@pytest.mark.parametrize("swaps", [True, False])
def test_a_new_folder_replaces_an_old_one(tmp_path, monkeypatch, swaps):
    """In one step where the system has one, else in two."""
    if not swaps:
        monkeypatch.setattr(folders, "_swap", lambda *_: False)
    scratch, folder = two(tmp_path)
    (tmp_path / "out.tmp.old").mkdir()  # of a killed run
    folders.commit(scratch, folder)
    assert names(tmp_path) == ["out"] and (folder / "file").read_text() == "new"


def test_the_first_folder(tmp_path):
    scratch, folder = two(tmp_path)
    (folder / "file").unlink()
    folder.rmdir()
    folders.commit(scratch, folder)
    assert names(tmp_path) == ["out"] and (folder / "file").read_text() == "new"


def test_a_disk_that_fails_before_and_after_the_new_folder_has_its_name(tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    scratch, folder = two(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(folders, "_swap", lambda *_: False)
        rename = Path.rename
        patch.setattr(Path, "rename", lambda a, b: fail() if a == scratch else rename(a, b))
        with pytest.raises(QbbError, match="cannot write the folder; got Input/output error"):
            folders.commit(scratch, folder)
    assert (folder / "file").read_text() == "old" and names(tmp_path) == ["out"]

    scratch.mkdir()
    (scratch / "file").write_text("new")
    monkeypatch.setattr(folders, "sync_folder", fail)
    with pytest.raises(QbbError, match="cannot write the folder; got Input/output error"):
        folders.commit(scratch, folder)
    assert (folder / "file").read_text() == "new" and names(tmp_path) == ["out"]
