"""Finding the kernel library, and refusing one that does not fit."""

from pathlib import Path

import pytest

from qbb_export import custom_ops
from qbb_export import format as fmt
from qbb_export.errors import QbbError


def test_library_says_what_it_is():
    info = custom_ops.library_info()
    assert info.path == custom_ops.library_path()
    assert info.format_version == fmt.FORMAT_VERSION
    assert info.layouts == fmt.LAYOUTS
    assert info.isas["scalar"]


@pytest.mark.parametrize("constant", ["FORMAT_VERSION", "OPSET_VERSION", "MAX_BASES", "WORD_BITS", "TILE_ROWS"])
def test_a_library_of_another_format_is_refused(monkeypatch: pytest.MonkeyPatch, constant: str):
    monkeypatch.setattr(fmt, constant, getattr(fmt, constant) + 1)
    with pytest.raises(QbbError, match="library of another format"):
        custom_ops.library_info()


def test_what_is_no_library_of_ours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("QBB_LIBRARY", str(tmp_path / "gone.so"))
    with pytest.raises(QbbError, match="QBB_LIBRARY: no such file"):
        custom_ops.library_path()
    (tmp_path / "text.so").write_text("not a library")
    with pytest.raises(QbbError, match="cannot open the kernel library"):
        custom_ops.library_info(tmp_path / "text.so")
