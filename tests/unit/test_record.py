"""The record: damage is found, foreign results are not taken, a kill at any moment does no harm."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qbb_export import record as record_module
from qbb_export.errors import QbbError
from qbb_export.quantize import MatrixRows, Quantized, QuantizeSettings, quantize
from qbb_export.record import Record, file_name, layer_key

SETTINGS = QuantizeSettings(2, 32, offset=True, rounds=1, shakes=0)


def weights(seed: int = 0, shape: tuple[int, int] = (4, 70)) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def equal(a: Quantized, b: Quantized) -> bool:
    same = a.spec == b.spec and a.errors == b.errors and a.scales.dtype == b.scales.dtype
    same = same and np.array_equal(a.words, b.words) and np.array_equal(a.scales, b.scales)
    if a.offset is None or b.offset is None:
        return same and a.offset is b.offset
    return same and np.array_equal(a.offset, b.offset)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("scale_dtype", ["float16", "float32"])
def test_what_is_put_is_got(tmp_path: Path, offset: bool, scale_dtype: str) -> None:
    chosen = replace(SETTINGS, offset=offset, scale_dtype=scale_dtype)
    layer = quantize(weights(), chosen)
    key = layer_key(weights(), chosen, "fast")
    with Record.open(tmp_path / "m.qbb", recipe="fast", settings=chosen) as record:
        assert record.get("fc", key) is None
        record.put("fc", key, layer)
        got = record.get("fc", key)
    assert got is not None and equal(got, layer)
    assert equal(record.load("fc"), layer)  # reading needs no lock


def test_key_tells_weights_settings_and_recipe_apart() -> None:
    w = weights()
    key = layer_key(w, SETTINGS, "fast")
    assert key == layer_key(MatrixRows(np.ascontiguousarray(w.T), transposed=True), SETTINGS, "fast")
    changed = w.copy()
    changed[3, 69] = np.nextafter(changed[3, 69], np.float32(9))
    others = {
        layer_key(changed, SETTINGS, "fast"),
        layer_key(w.reshape(70, 4), SETTINGS, "fast"),
        layer_key(w, replace(SETTINGS, rounds=2), "fast"),
        layer_key(w, SETTINGS, "greedy"),
    }
    assert len(others | {key}) == 5


def test_key_does_not_depend_on_the_block_size(monkeypatch: pytest.MonkeyPatch) -> None:
    key = layer_key(weights(), SETTINGS, "fast")
    monkeypatch.setattr("qbb_export.quantize.rows.BLOCK", 70)
    assert layer_key(weights(), SETTINGS, "fast") == key


def test_quantized_works_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def counting(*args: Any, **kwargs: Any) -> Quantized:
        calls.append(kwargs["name"])
        return quantize(*args, **kwargs)

    monkeypatch.setattr(record_module, "quantize", counting)
    for _ in range(2):
        with Record.open(tmp_path / "m.qbb", recipe="fast") as record:
            first = record.quantized("a", weights(), SETTINGS, "fast")
            assert equal(first, record.quantized("a", weights(), SETTINGS, "fast"))
    assert calls == ["a"]
    with Record.open(tmp_path / "m.qbb", recipe="fast") as record:
        record.quantized("a", weights(1), SETTINGS, "fast")  # other weights
        record.quantized("a", weights(1), replace(SETTINGS, bases=3), "fast")  # other settings
    assert calls == ["a"] * 3


def test_every_flipped_byte_and_every_truncation_is_found(tmp_path: Path) -> None:
    key = layer_key(weights(), SETTINGS, "fast")
    with Record.open(tmp_path / "m.qbb", recipe="fast") as record:
        layer = record.quantized("fc", weights(), SETTINGS, "fast")
        path = record.folder / "layers" / file_name("fc")
        good = path.read_bytes()
        undetected = []
        for position in range(len(good)):
            bad = bytearray(good)
            bad[position] ^= 1 << (position % 8)
            path.write_bytes(bad)
            got = record.get("fc", key)
            if got is not None and not equal(got, layer):
                undetected.append(position)
        for size in range(0, len(good), 7):
            path.write_bytes(good[:size])
            assert record.get("fc", key) is None
        assert undetected == []
        with pytest.raises(QbbError, match="missing or damaged"):
            record.load("fc")
        # A damaged layer is simply redone.
        assert equal(record.quantized("fc", weights(), SETTINGS, "fast"), layer)
        assert path.read_bytes() == good


def test_a_flip_among_the_values_is_never_taken(tmp_path: Path) -> None:
    key = layer_key(weights(), SETTINGS, "fast")
    with Record.open(tmp_path / "m.qbb", recipe="fast") as record:
        record.quantized("fc", weights(), SETTINGS, "fast")
        path = record.folder / "layers" / file_name("fc")
        good = path.read_bytes()
        for position in range(8 + int.from_bytes(good[:8], "little"), len(good)):
            bad = bytearray(good)
            bad[position] ^= 1
            path.write_bytes(bad)
            assert record.get("fc", key) is None


def test_a_file_under_another_layers_name_is_not_taken(tmp_path: Path) -> None:
    key = layer_key(weights(), SETTINGS, "fast")
    with Record.open(tmp_path / "m.qbb", recipe="fast") as record:
        record.quantized("a", weights(), SETTINGS, "fast")
        layers = record.folder / "layers"
        (layers / file_name("a")).rename(layers / file_name("b"))
        assert record.get("b", key) is None


def test_file_names_are_safe_and_unique() -> None:
    names = [
        "a",
        "A",
        "a.b",
        "a/b",
        "a\\b",
        "a:b",
        "../../etc/passwd",
        "",
        ".",
        "..",
        "-x",
        "CON",
        "é",
        "e\u0301",
        "a\0b",
        "\ud800",
    ]
    names += ["x" * 300, "x" * 301, "layers.0.weight", "/model/layers.0/MatMul"]
    made = [file_name(n) for n in names]
    assert len({m.lower() for m in made}) == len(names)
    assert all(len(m) <= 120 and m.isascii() and not set(m) & set("/\\:\0 ") and m[0] not in ".-" for m in made)


def test_two_processes_cannot_share_a_record(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from qbb_export.record import Record; from qbb_export.errors import QbbError\n"
        "try: Record.open(Path(sys.argv[1]), recipe='fast')\n"
        "except QbbError as e: print(e); sys.exit(2)"
    )
    with Record.open(tmp_path / "m.qbb", recipe="fast"):
        done = subprocess.run([sys.executable, "-c", code, tmp_path / "m.qbb"], capture_output=True, text=True)
        assert done.returncode == 2 and done.stdout == f"{tmp_path / 'm.qbb'}: record is in use by another process\n"
    assert subprocess.run([sys.executable, "-c", code, tmp_path / "m.qbb"]).returncode == 0


def test_what_is_no_record_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(QbbError, match=r"exists and is not a record; got thesis\.txt"):
        Record.open(tmp_path, recipe="fast")
    assert files(tmp_path) == {"thesis.txt": b"precious"}
    with pytest.raises(QbbError, match="cannot open the record"):
        Record.open(tmp_path / "thesis.txt", recipe="fast")


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ("{", "manifest.json is damaged"),
        ("[]", "manifest.json is damaged"),
        ('{"format": 2}', "another format; expected 1; got 2"),
    ],
)
def test_foreign_manifests_are_refused(tmp_path: Path, manifest: str, message: str) -> None:
    (tmp_path / "manifest.json").write_text(manifest)
    with pytest.raises(QbbError, match=message):
        Record.open(tmp_path, recipe="fast")
    assert (tmp_path / "manifest.json").read_text() == manifest


def test_manifest_says_how_and_not_where_or_when(tmp_path: Path) -> None:
    for name in ("a.qbb", "b.qbb"):
        with Record.open(tmp_path / name, recipe="fast", settings=SETTINGS) as record:
            record.quantized("fc", weights(), SETTINGS, "fast")
    assert files(tmp_path / "a.qbb") == files(tmp_path / "b.qbb")
    manifest = json.loads((tmp_path / "a.qbb" / "manifest.json").read_text())
    assert manifest["recipe"] == "fast" and manifest["settings"]["bases"] == 2
    assert set(manifest) == {"format", "recipe", "settings", "version"}


def test_leftovers_are_swept(tmp_path: Path) -> None:
    with Record.open(tmp_path / "m.qbb", recipe="fast") as record:
        pass
    before = files(record.folder)
    (record.folder / "manifest.json.tmp").write_text("x")
    (record.folder / "layers" / "a.safetensors.tmp").write_text("x")
    Record.open(record.folder, recipe="fast").close()
    assert files(record.folder) == before


def test_a_failing_disk_keeps_the_old_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Record.open(tmp_path / "m.qbb", recipe="fast") as record:
        old = record.quantized("fc", weights(), SETTINGS, "fast")
        before = files(record.folder)

        def full(descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(QbbError, match=r"cannot write the record; got .*No space left"):
            record.quantized("fc", weights(1), SETTINGS, "fast")
        assert files(record.folder) == before and equal(record.load("fc"), old)


RUN = """
import sys, numpy as np
from pathlib import Path
from qbb_export.quantize import QuantizeSettings
from qbb_export.record import Record
with Record.open(Path(sys.argv[1]), recipe="fast") as record:
    for i in range(24):
        w = np.random.default_rng(i).standard_normal((16, 256)).astype(np.float32)
        record.quantized(f"layer.{i}", w, QuantizeSettings(3, 64, rounds=2, shakes=1), "fast")
        print(i, flush=True)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no kill -9 on this system")
def test_killed_runs_resume_to_the_same_bytes(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", RUN, tmp_path / "whole.qbb"], check=True, stdout=subprocess.DEVNULL)
    expected = files(tmp_path / "whole.qbb")
    assert len(expected) == 24 + 2
    killed, resumed = 0, []
    for attempt in range(6):
        process = subprocess.Popen([sys.executable, "-c", RUN, tmp_path / "cut.qbb"], stdout=subprocess.PIPE)
        assert process.stdout is not None
        for _ in range(4):  # a few layers further each time, then at no particular moment
            process.stdout.readline()
        time.sleep(0.003 * attempt)
        process.kill()
        killed += process.wait() == -signal.SIGKILL
        process.stdout.close()
        now = files(tmp_path / "cut.qbb")
        complete = {name: data for name, data in now.items() if not name.endswith(".tmp")}
        assert complete.items() <= expected.items()
        resumed.append(len(complete))
    assert killed >= 1
    subprocess.run([sys.executable, "-c", RUN, tmp_path / "cut.qbb"], check=True, stdout=subprocess.DEVNULL)
    assert files(tmp_path / "cut.qbb") == expected
