"""The benchmarks run and write what they promise; how fast anything is, no test says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def run(script: str, *arguments: object) -> str:
    command = [sys.executable, BENCHMARKS / script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_cpu(tmp_path: Path) -> None:
    file, picture = tmp_path / "cpu.json", tmp_path / "cpu.svg"
    tiny = ("--shapes", "256x128,512x128", "--batch", "1,16", "--turns", 1, "--cache", 0.0625)
    text = run("cpu.py", *tiny, "--threads", "1,2", "--bases", "1,3", "--body", "--json", file, "--plot", picture)
    rows = json.loads(file.read_text())["rows"]

    cases = {(shape, batch, threads) for shape in ("256x128", "512x128") for batch in (1, 16) for threads in (1, 2)}
    ours = {("qbb", bases, mode) for bases in (1, 3) for mode in ("exact", "int8", "int16")}
    body = {("body", bases, "exact") for bases in (1, 3)}
    named = [(row["kernel"], row["bases"], row["mode"]) for row in rows if "bases" in row]
    assert len(named) == len(set(named)) * len(cases)
    assert set(named) == ours | body
    others = {(row["kernel"], row["bits"], row["mode"], row["block_size"]) for row in rows if "bits" in row}
    assert {
        ("fp32", 32, "exact", 0),
        ("MatMulNBits", 4, "exact", 128),
        ("MatMulNBits", 4, "int8", 32),
        ("MatMulNBits", 8, "int8", 128),
    } <= others
    assert {(row["shape"], row["batch"], row["threads"]) for row in rows} == cases
    for row in rows:
        assert ("bases" in row) != ("bits" in row)
        assert row["median_ms"] > 0 and row["read_gbps"] > 0 and row["turns"] == row["undisturbed"] == 1
        k, n = map(int, row["shape"].split("x"))
        bits = row["bits"] * k * n if "bits" in row else row["bases"] * n * (k + 16 * k / min(k, 128))
        if row["kernel"] == "MatMulNBits":
            bits += 32 * n * k / row["block_size"]
        assert row["gbps"] == pytest.approx(bits / 8 / row["median_ms"] / 1e6)
        assert row["share"] == pytest.approx(row["gbps"] / row["read_gbps"])

    first, *_ = text.splitlines()
    for word in ("last-level cache 0.0625 MB", "our kernels", "ONNX Runtime"):
        assert word in first
    for ratio in ("int8 3 bases / MatMulNBits 4-bit L4 b128", "fp32 / exact 3 bases"):
        assert ratio in text
    assert "<svg" in picture.read_text()

    again = tmp_path / "again.json"
    table = run("cpu.py", "--rows", file, "--json", again)
    assert again.read_bytes() == file.read_bytes()
    assert table in text


def test_tokens(tmp_path: Path) -> None:
    """A float model: how ours are opened is tested with cpu.py."""
    table = numpy_helper.from_array(np.eye(300, dtype=np.float32), "table")
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "length"])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "length", 300])
    gather = helper.make_node("Gather", ["table", "input_ids"], ["logits"])
    graph = helper.make_graph([gather], "tiny", [ids], [logits], [table])
    model = tmp_path / "tiny.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), model)

    file = tmp_path / "tokens.json"
    run("tokens.py", model, model, "--threads", 1, "--prompt", 8, "--turns", 2, "--json", file)
    rows = json.loads(file.read_text())["rows"]
    assert [(row["model"], row["mode"], row["threads"]) for row in rows] == [(str(model), "float", 1)] * 4
    assert sorted(row["tokens"] for row in rows) == [1, 1, 8, 8]
    for row in rows:
        assert row["tokens_per_second"] == pytest.approx(1e3 * row["tokens"] / row["median_ms"])


def test_ratios_and_medians(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import claims
    import timing
    from contenders import Kind
    from results import Row

    def row(kind: Kind, batch: int, ms: float, gbps: float = 1.0) -> Row:
        return Row(kind, "64x64", batch, 1, ms, gbps, 30.0, 40, 40)

    rows = [
        row(Kind("fp32", 32, block_size=0), 1, 8.0),
        row(Kind("fp32", 32, block_size=0), 128, 10.0),
        row(Kind("MatMulNBits", 4, "int8", 128, 4), 1, 0.5),
        row(Kind("MatMulNBits", 4, "int8", 32, 4), 1, 0.25),  # not what block 128 is compared with
        row(Kind("MatMulNBits", 4, "exact", 128, 0), 1, 3.5),
        row(Kind("MatMulNBits", 4, "exact", 32, 0), 1, 3.0),
        row(Kind("MatMulNBits", 2, "int8", 128, 4), 1, 0.375),
        row(Kind("MatMulNBits", 2, "lut", 128, 0), 1, 0.3125),
        row(Kind("MatMulNBits", 2, "exact", 128, 0), 1, 80.0),
        row(Kind("qbb", 2, "int8"), 1, 0.25, gbps=27.0),
        row(Kind("qbb", 2, "int8"), 2, 0.375),
        row(Kind("qbb", 2, "int8"), 4, 1.5),
        row(Kind("qbb", 2, "int8"), 8, 1.2),
        row(Kind("qbb", 2, "exact"), 1, 0.5),
        row(Kind("qbb", 3, "exact"), 1, 1.0),
        row(Kind("qbb", 3, "exact"), 128, 12.0),
    ]
    cells = {claim.text: claim.cell(rows) for claim in claims.claims(["int8"])}
    assert {text: cell for text, cell in cells.items() if cell} == {
        "int8 2 bases / MatMulNBits 4-bit L4 b128": "0.50",
        "MatMulNBits 2-bit, best / int8 2 bases": "! 1.25",
        "int8 2 bases: share of the read bandwidth": "0.90",
        "fp32 / exact 3 bases": "8.00",
        "MatMulNBits 4-bit L0 / exact 3 bases": "3.00",
        "MatMulNBits 2-bit L0 / exact 2 bases": "160.00",
        "exact 3 bases / fp32": "! 1.20",
        "int8: M rows / M single calls, worst": "! 1.50",
        "int8: fewer rows / more rows, worst": "! 1.25",
    }

    turns = [timing.Turn(3.0, 1.0), timing.Turn(1.0, 0.95), timing.Turn(2.0, 0.9), timing.Turn(9.0, 0.5)]
    assert timing.median(turns) == 2.0
    assert timing.undisturbed(turns[3:] * 7 + [timing.Turn(4.0, 0.6)]) == [4.0, 9.0]
    assert [timing.turns_for(seconds, 40) for seconds in (1e-4, 0.1, 2.0)] == [40, 10, 3]
    assert timing.turns_for(2.0, 1) == 1
