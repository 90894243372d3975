"""``qbb check`` and the probe: one line whatever is wrong, and a crash stays in the child."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnx
import pytest

from qbb_export import artifact
from qbb_export.cli import main
from qbb_export.errors import QbbError
from qbb_export.generation.folder import write_companions
from qbb_export.runtimes import probe
from qbb_export.runtimes.ort import session
from tests.passes.graphs import binarized, graph

K, N = 128, 64
CONFIG = {"model": {"decoder": {"filename": "model.onnx", "session_options": {}}}}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    ours, _ = binarized(
        graph(
            f"g (float[b, {K}] x) => (float[b, {N}] y) {{ h = MatMul (x, w) y = Relu (h) }}",
            {"w": np.ones((K, N), "f4")},
        ),
        bases=8,
        group_size=32,
    )
    path = tmp_path / "model.onnx"
    artifact.save(ours, path)
    return path


def check(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    code = main(["check", *map(str, arguments)])
    said = capsys.readouterr()
    (line,) = (said.out + said.err).splitlines()
    return code, line


def test_a_sound_file(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = f"{model}: sound; 1 BinaryBasisMatMul, 1 other nodes, 1 data file(s); digests match"
    assert check(capsys, model) == (0, said)
    assert check(capsys, model, "--probe") == (0, f"{said}; opens in ONNX Runtime")


def test_a_file_without_digests(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    proto = onnx.load(model)
    del proto.metadata_props[:]
    onnx.save(proto, model, save_as_external_data=True, location="weights", size_threshold=16, convert_attribute=False)
    code, line = check(capsys, model)
    assert code == 0
    assert line.endswith("1 data file(s); no digest for model.onnx, weights: flipped bits there cannot be seen")


@pytest.mark.parametrize("options", [[], ["--probe"]])
def test_damage_is_one_line_and_exit_code_2(
    model: Path, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    (data,) = model.parent.glob("*.data")
    content = bytearray(data.read_bytes())
    content[17] ^= 4
    data.write_bytes(content)
    code, line = check(capsys, model, *options)
    assert code == 2 and line.startswith(f"error: {data}: weights are damaged; expected SHA-256")
    model.write_bytes(model.read_bytes()[:-9])
    code, line = check(capsys, model, *options)
    assert code == 2 and line.startswith(f"error: {model}: not an ONNX model")


def test_a_folder_that_generates(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = model.parent
    code, line = check(capsys, folder)
    assert code == 2 and "half-written; expected genai_config.json in it" in line
    write_companions(folder, CONFIG, {"tokenizer.json": b"{}"}, portable=False)
    code, line = check(capsys, folder)
    assert code == 0 and line.startswith(f"{folder}: sound; 1 BinaryBasisMatMul")
    (library,) = folder.glob("*.so")
    with library.open("ab") as file:
        file.write(b"!")
    code, line = check(capsys, folder)
    assert code == 2 and "folder names code; expected a copy of the installed library; got libqbb_ops.so is not" in line
    library.unlink()
    assert check(capsys, folder)[1].endswith("folder is half-written; expected libqbb_ops.so in it")


def test_a_folder_of_something_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, line = check(capsys, tmp_path)
    assert code == 2 and "no model in the folder; expected an .onnx file, or a folder that generates" in line


@pytest.mark.parametrize("options", [["--seconds", "5"], ["--probe", "--seconds", "0"]])
def test_time_limits_that_mean_nothing(model: Path, capsys: pytest.CaptureFixture[str], options: list[str]) -> None:
    code, line = check(capsys, model, *options)
    assert code == 2 and line.startswith("error: --seconds: bad time limit; expected more than 0, with --probe")


def library_that(folder: Path, body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel library that does something else as soon as it is opened: only the child opens it."""
    compiler = shutil.which("cc") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C compiler: the library that crashes cannot be built")
    source = folder / "bad.c"
    source.write_text(
        "#include <signal.h>\n#include <stdlib.h>\n#include <unistd.h>\n"
        f"__attribute__((constructor)) static void start(void) {{ {body} }}\n"
    )
    subprocess.run([compiler, "-shared", "-fPIC", "-x", "c", source, "-o", folder / "bad.so"], check=True)
    monkeypatch.setenv("QBB_LIBRARY", str(folder / "bad.so"))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise(SIGSEGV);", r"model\.onnx: opening the file crashes; expected no signal; got SIGSEGV$"),
        ('write(2, "line 1\\nlast", 11); abort();', r"opening the file crashes; .*; got SIGABRT last$"),
        ("kill(getpid(), SIGKILL);", r"opening the file crashes; .*; got SIGKILL$"),
        ("_exit(0);", r"model\.onnx: probe failed; expected exit code 0 or 2; got 0$"),
        ("_exit(2);", r"model\.onnx: probe failed; expected exit code 0 or 2; got 2$"),
        ("_exit(7);", r"model\.onnx: probe failed; expected exit code 0 or 2; got 7$"),
    ],
)
def test_a_crash_is_a_refusal(model: Path, monkeypatch: pytest.MonkeyPatch, body: str, message: str) -> None:
    library_that(model.parent, body, monkeypatch)
    with pytest.raises(QbbError, match=message):
        session(model, probe=True)


def test_a_hang_is_a_refusal(model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    library_that(model.parent, "for (;;) pause();", monkeypatch)
    code, line = check(capsys, model, "--probe", "--seconds", "2")
    assert code == 2
    assert line == f"error: {model}: probe did not end; expected an open file within 2 s; got still opening it"


def test_a_file_that_wants_all_memory_is_a_refusal(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library_that(model.parent, 'if (!malloc(6UL << 30)) { write(2, "no memory", 9); abort(); }', monkeypatch)
    with pytest.raises(QbbError, match=r"opening the file crashes; .*; got SIGABRT no memory"):
        probe.probe(model)


def test_probe_then_run(model: Path) -> None:
    opened = session(model, probe=True, mode="int8")
    assert opened.run(None, {"x": np.ones((2, K), "f4")})[0].shape == (2, N)
    with pytest.raises(QbbError, match=r"gone\.onnx: no such file"):
        session(model.with_name("gone.onnx"), probe=True)
