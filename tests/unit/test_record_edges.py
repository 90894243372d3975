"""The rest of the record: stages, branches, arrays and text, and folders that cannot be read or written."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from qbb_export import record as record_module
from qbb_export.errors import QbbError
from qbb_export.quantize import QuantizeSettings, quantize
from qbb_export.record import Record, file_name, read_layers

SETTINGS = QuantizeSettings(1, 32, rounds=1, shakes=0)


@pytest.fixture
def record(tmp_path: Path) -> Record:
    return Record.open(tmp_path / "m.qbb", recipe="fast")


def layer(seed: int = 0):
    return quantize(np.random.default_rng(seed).standard_normal((4, 70)).astype(np.float32), SETTINGS)


def test_stages_and_branches_are_apart(record: Record) -> None:
    for number, part in enumerate((record, record.stage("start"), record.branch("study"))):
        part.put("fc", f"key {number}", layer(number))
    joined = Record.join(record.folder)
    assert joined.get("fc", "key 0") is not None and joined.get("fc", "key 1") is None
    assert joined.stage("start").get("fc", "key 1") is not None
    assert joined.branch("study").get("fc", "key 2") is not None
    assert len(read_layers(record.folder)) == len(read_layers(record.folder, "start")) == 1


def test_arrays_and_text(record: Record) -> None:
    assert record.get_tensors("state", "key") is None
    record.put_tensors("state", "key", {"a": np.arange(5), "b": np.ones((2, 2), "f4")})
    got = record.get_tensors("state", "key")
    assert got is not None and got["a"].tolist() == [0, 1, 2, 3, 4] and got["b"].shape == (2, 2)
    assert record.get_tensors("state", "another key") is None
    path = record.folder / "distill" / "state.safetensors"
    content = path.read_bytes()
    for place in range(0, len(content), 3):
        bad = bytearray(content)
        bad[place] ^= 1
        path.write_bytes(bad)
        assert record.get_tensors("state", "key") is None
    record.drop_tensors("state")
    record.drop_tensors("state")
    assert not path.exists()
    record.put_text("log.jsonl", "é\n")
    assert (record.folder / "distill" / "log.jsonl").read_bytes() == "é\n".encode()


def in_the_way(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("a file where a folder should be")


@pytest.mark.parametrize(
    ("blocked", "use", "message"),
    [
        ("stages", lambda r: r.stage("s"), "cannot write the record"),
        ("branches", lambda r: r.branch("b"), "cannot write the record"),
        ("distill", lambda r: r.put_tensors("t", "key", {"a": np.ones(1)}), "cannot write the record"),
        ("distill", lambda r: r.put_text("t", "text"), "cannot write the record"),
        ("distill", lambda r: r.get_tensors("t", "key"), "cannot read the record"),
    ],
    ids=["stage", "branch", "put_tensors", "put_text", "get_tensors"],
)
def test_a_file_in_a_folders_place(record: Record, blocked: str, use: Callable[[Record], object], message: str) -> None:
    in_the_way(record.folder / blocked)
    with pytest.raises(QbbError, match=message):
        use(record)


def test_a_folder_in_a_files_place(record: Record) -> None:
    (record.folder / "layers" / file_name("fc")).mkdir()
    with pytest.raises(QbbError, match=r"cannot read the record; got .*Is a directory"):
        record.get("fc", "key")
    with pytest.raises(QbbError, match="cannot read the record"):
        read_layers(record.folder)
    with pytest.raises(QbbError, match="cannot write the record"):
        record.put("fc", "key", layer())
    with pytest.raises(QbbError, match="layer is missing or damaged"):
        record.load("fc")


def test_a_record_that_cannot_be_begun(tmp_path: Path) -> None:
    """The lock is let go, so that the next attempt sees what is really wrong."""
    (tmp_path / "m.qbb").mkdir()
    in_the_way(tmp_path / "m.qbb" / "layers")
    for _ in range(2):
        with pytest.raises(QbbError, match=r"cannot write the record; got .*File exists"):
            Record.open(tmp_path / "m.qbb", recipe="fast")


def test_what_goes_wrong_while_opening_is_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(path: Path, data: bytes) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(record_module, "write_whole", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Record.open(tmp_path / "m.qbb", recipe="fast")
    monkeypatch.undo()
    Record.open(tmp_path / "m.qbb", recipe="fast").close()


def test_a_record_in_use(record: Record) -> None:
    with pytest.raises(QbbError, match="record is in use by another process"):
        Record.open(record.folder, recipe="fast")
    record.close()
    record.close()
    Record.open(record.folder, recipe="fast").close()


def test_heads_with_and_without_offset(record: Record) -> None:
    weights = np.random.default_rng(0).standard_normal((4, 70)).astype(np.float32)
    for offset in (False, True):
        record.put(f"fc.{offset}", "key", quantize(weights, QuantizeSettings(1, 32, offset, rounds=1, shakes=0)))
    assert {head.name: head.offset for head in read_layers(record.folder)} == {"fc.False": False, "fc.True": True}


def test_a_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_module, "fcntl", None)
    with Record.open(tmp_path / "m.qbb", recipe="fast") as first, Record.open(tmp_path / "m.qbb", recipe="fast"):
        first.put("fc", "key", layer())


def rewrite_head(path: Path, change: Callable[[dict[str, object], dict[str, object]], None]) -> None:
    """Change the header of a layer's file: its tensors and what it says of itself."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    head = json.loads(header["__metadata__"]["qbb"])
    change(header, head)
    header["__metadata__"]["qbb"] = json.dumps(head)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])


def other_type(header, head):
    header["words"]["dtype"] = "I32"


def other_scales(header, head):
    header["scales"]["dtype"] = "F64"


def other_offset(header, head):
    header["offset"]["shape"] = [1, 1]


def no_errors(header, head):
    head["errors"] = []


def not_a_number(header, head):
    head["errors"] = [float("nan")]


def other_length(header, head):
    header["scales"]["data_offsets"] = [0, 1]
    header["words"]["data_offsets"] = [0, 1]
    header["offset"]["data_offsets"] = [0, 1]


@pytest.mark.parametrize("change", [other_type, other_scales, other_offset, no_errors, not_a_number, other_length])
def test_heads_that_do_not_fit_the_file(record: Record, change: Callable[..., None]) -> None:
    weights = np.random.default_rng(0).standard_normal((4, 70)).astype(np.float32)
    record.put("fc", "key", quantize(weights, QuantizeSettings(1, 32, offset=True, rounds=1, shakes=0)))
    (path,) = (record.folder / "layers").iterdir()
    assert len(read_layers(record.folder)) == 1
    rewrite_head(path, change)
    with pytest.raises(QbbError, match=rf"{re.escape(str(path))}: layer is damaged \(export again to redo it\)"):
        read_layers(record.folder)


def test_a_head_longer_than_its_file(record: Record) -> None:
    record.put("fc", "key", layer())
    (path,) = (record.folder / "layers").iterdir()
    path.write_bytes((10**9).to_bytes(8, "little") + path.read_bytes()[8:])
    with pytest.raises(QbbError, match=r"layer is damaged .*; got file is cut off"):
        read_layers(record.folder)


def test_a_layer_under_another_name_is_no_head(record: Record) -> None:
    record.put("fc", "key", layer())
    (path,) = (record.folder / "layers").iterdir()
    path.rename(path.with_name("other.safetensors"))
    with pytest.raises(QbbError, match="name of the file and of the layer do not agree"):
        read_layers(record.folder)
