"""R16: files that point elsewhere. Nothing outside the folder is read, nothing hangs, no code runs."""

from __future__ import annotations

import json
import os
import pickle
import re
import socket
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from qbb_export.errors import QbbError
from qbb_export.generation.folder import CONFIG, read_config
from tests.corrupt import bases

SIZE = 64 * 64 * 4
CASES: dict[str, tuple[Callable[[Path], None], str]] = {}


def case(pattern: str) -> Callable[[Callable[[Path], None]], Callable[[Path], None]]:
    def add(prepare: Callable[[Path], None]) -> Callable[[Path], None]:
        CASES[prepare.__name__] = (prepare, pattern)
        return prepare

    return add


def point(folder: Path, location: str, **entries: str) -> None:
    """A model of another program whose weight lies at ``location``."""
    proto = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 20]> g (float[b, 64] x) => (float[b, 64] y) { y = MatMul (x, w) }'
    )
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[64, 64], data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, "offset": "0", "length": str(SIZE), **entries}.items():
        tensor.external_data.add(key=key, value=value)
    proto.graph.initializer.append(tensor)
    (folder / "m.onnx").write_bytes(proto.SerializeToString())


def secret(folder: Path) -> Path:
    """Outside the folder, where the model may not look: reading this waits for ever."""
    path = folder.parent / "secret"
    os.mkfifo(path)
    return path


LEAVES = r"tensor 'w': external data leaves the model's folder; expected a file beside it; got"


@case(LEAVES)
def the_folder_above(folder):
    secret(folder)
    point(folder, "../secret")


@case(LEAVES)
def the_folder_above_by_a_detour(folder):
    (folder / "sub").mkdir()
    secret(folder)
    point(folder, "sub/../../secret")


@case(LEAVES)
def an_absolute_path(folder):
    point(folder, str(secret(folder)))


@case(LEAVES)
def a_path_of_another_system(folder):
    point(folder, "..\\secret")


@case(LEAVES)
def a_symbolic_link(folder):
    (folder / "weights").symlink_to(secret(folder))
    point(folder, "weights")


@case(LEAVES)
def a_link_to_a_link(folder):
    (folder / "weights").symlink_to("other")
    (folder / "other").symlink_to(secret(folder))
    point(folder, "weights")


@case(LEAVES)
def a_linked_folder(folder):
    secret(folder)
    (folder / "sub").symlink_to(folder.parent)
    point(folder, "sub/secret")


@case(LEAVES)
def a_name_with_a_null(folder):
    point(folder, "weights\0.data")


@case(r"tensor 'w': external data is missing; expected a file weights")
def a_link_to_itself(folder):
    (folder / "weights").symlink_to("weights")
    point(folder, "weights")


@case(r"tensor 'w': external data has several names; expected a copy of weights; got 2 hard links$")
def a_hard_link(folder):
    outside = folder.parent / "secret"
    outside.write_bytes(bytes(SIZE))
    os.link(outside, folder / "weights")
    point(folder, "weights")


@case(r"tensor 'w': external data is missing; expected a file weights; got no regular file$")
def a_fifo(folder):
    os.mkfifo(folder / "weights")
    point(folder, "weights")


@case(r"tensor 'w': external data is missing; expected a file weights; got no regular file$")
def a_socket(folder):
    here = Path.cwd()
    os.chdir(folder)  # the path of a socket may have 108 characters
    socket.socket(socket.AF_UNIX).bind("weights")
    os.chdir(here)
    point(folder, "weights")


@case(r"tensor 'w': external data (is missing|leaves the model's folder)")
def a_device(folder):
    try:
        os.mknod(folder / "weights", stat.S_IFCHR | 0o666, os.makedev(1, 5))  # /dev/zero
    except PermissionError:  # only root may
        (folder / "weights").symlink_to("/dev/zero")
    point(folder, "weights")


@case(r"tensor 'w': external data is missing; expected a file weights; got a folder$")
def a_folder(folder):
    (folder / "weights").mkdir()
    point(folder, "weights")


@case(r"tensor 'w': external data is too short|not an ONNX model")
def a_negative_offset(folder):
    (folder / "weights").write_bytes(bytes(SIZE))
    point(folder, "weights", offset="-4096")


@case(r"tensor 'w': external data is too short|not an ONNX model")
def an_offset_past_the_end(folder):
    (folder / "weights").write_bytes(bytes(SIZE))
    point(folder, "weights", offset=str(2**63 - 1))


@case(r"tensor 'w': external data is too short|not an ONNX model")
def a_length_past_the_end(folder):
    (folder / "weights").write_bytes(bytes(SIZE))
    point(folder, "weights", length=str(2**62))


@case(r"external data leaves the model's folder; expected a file beside it; got \.\./secret$")
def a_constant_in_a_function(folder):
    secret(folder)
    point(folder, "weights")
    (folder / "weights").write_bytes(bytes(SIZE))
    proto = onnx.load(folder / "m.onnx", load_external_data=False)
    tensor = TensorProto(data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="../secret")
    constant = onnx.helper.make_node("Constant", [], ["o"], value=tensor)
    opset = onnx.helper.make_opsetid("", 20)
    proto.functions.append(onnx.helper.make_function("f", "c", [], ["o"], [constant], [opset]))
    proto.opset_import.append(onnx.helper.make_opsetid("f", 1))
    proto.graph.node.append(onnx.helper.make_node("c", [], ["other"], domain="f"))
    (folder / "m.onnx").write_bytes(proto.SerializeToString())


@case(r"ONNX's checker refuses the model; got .*'\.\./secret' points outside the directory")
def sparse_weights(folder):
    secret(folder)
    bases.write("small", folder).rename(folder / "m.onnx")
    proto = onnx.load(folder / "m.onnx")
    del proto.metadata_props[:]
    sparse = proto.graph.sparse_initializer.add(dims=[8])
    sparse.values.name, sparse.values.data_type, sparse.values.data_location = "s", 1, TensorProto.EXTERNAL
    sparse.values.dims.append(1)
    sparse.values.external_data.add(key="location", value="../secret")
    sparse.indices.data_type, sparse.indices.raw_data = TensorProto.INT64, bytes(8)
    sparse.indices.dims.append(1)
    (folder / "m.onnx").write_bytes(proto.SerializeToString())


@case(r"m\.onnx: no such file; expected an \.onnx file; got no regular file$")
def the_graph_is_a_fifo(folder):
    os.mkfifo(folder / "m.onnx")


CHECK = """
import contextlib, io, json, sys
from qbb_export.cli import main
for file in sys.argv[1:]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["check", file])
    print(json.dumps([code, out.getvalue(), err.getvalue()]), flush=True)
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[Any]]]:
    """What ``qbb check`` says of each case, from a child: what opens a fifo or /dev/zero does not come back."""
    if not hasattr(os, "mkfifo"):
        pytest.skip("no fifos on this system")
    files = {name: tmp_path_factory.mktemp(name) / "model" / "m.onnx" for name in CASES}
    for name, file in files.items():
        file.parent.mkdir()
        CASES[name][0](file.parent)
    command = [sys.executable, "-c", CHECK, *map(str, files.values())]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=300)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, f"ended with {done.returncode} at {list(CASES)[len(answers)]}"
    return {name: (file, answer) for (name, file), answer in zip(files.items(), answers, strict=True)}


@pytest.mark.parametrize("name", CASES)
def test_nothing_outside_the_folder_is_read(said: dict[str, tuple[Path, list[Any]]], name: str) -> None:
    file, (code, out, err) = said[name]
    assert code == 2 and out == ""
    assert err.startswith(f"error: {file}") and err.count("\n") == 1
    assert re.search(CASES[name][1], err.rstrip()), err


@pytest.mark.parametrize("name", ["../model.onnx", "/model.onnx", "sub/model.onnx", 7, ["model.onnx"]])
@pytest.mark.parametrize("key", ["filename", "custom_ops_library"])
def test_a_configuration_that_points_elsewhere(tmp_path: Path, key: str, name: object) -> None:
    decoder = {"filename": "model.onnx", "session_options": {}}
    (decoder if key == "filename" else decoder["session_options"])[key] = name  # type: ignore[index]
    (tmp_path / CONFIG).write_text(json.dumps({"model": {"decoder": decoder}}))
    for file in ("tokenizer.json", "model.onnx"):
        (tmp_path / file).touch()
    with pytest.raises(QbbError, match="not a file in the folder; expected a bare file name; got"):
        read_config(tmp_path)


class Evil:
    """Unpickling this creates a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return (Path.touch, (self.canary,))


@pytest.mark.parametrize("suffix", [".onnx", ".data", ".safetensors", ".qbb", ".json"])
def test_a_pickle_under_another_name_runs_nothing(tmp_path: Path, suffix: str) -> None:
    """Of PyTorch's own suffixes, tests/unit/test_load.py. Nothing here may try to unpickle whatever it gets."""
    from qbb_export.cli import main
    from qbb_export.record import Record

    canary, evil = tmp_path / "canary", pickle.dumps(Evil(tmp_path / "canary"))
    path = tmp_path / f"evil{suffix}"
    path.write_bytes(evil)
    assert main(["check", str(path)]) == 2
    if suffix == ".onnx":
        assert main(["check", "--probe", str(path)]) == 2
    with Record.open(tmp_path / "r.qbb", recipe="fast") as record:
        record.put_tensors("t", "key", {"a": np.zeros(1)})
        (tmp_path / "r.qbb" / "distill" / "t.safetensors").write_bytes(evil)
        assert record.get_tensors("t", "key") is None
    (tmp_path / "r.qbb" / "manifest.json").write_bytes(evil)
    with pytest.raises(QbbError, match="damaged"):
        Record.open(tmp_path / "r.qbb", recipe="fast")
    assert not canary.exists()
