"""The mode of a node and the session's override, in real ONNX Runtime sessions."""

from __future__ import annotations

import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper
from onnx.reference import ReferenceEvaluator

from qbb_export.artifact import read_graph, save
from qbb_export.custom_ops import library_path
from qbb_export.errors import QbbError
from qbb_export.format import MODES
from qbb_export.passes.function_body import AttachFunctionBody
from qbb_export.passes.verify import VerifyBinaryBasis
from qbb_export.runtimes.ort import session
from tests.kernels import abi
from tests.kernels.layers import Layer, least_many, make_layer, make_node, make_node_model


def layer() -> Layer:
    return make_layer(np.random.default_rng(0), 300, 40, 3, 96)


def model(mode: object | None) -> onnx.ModelProto:
    node = make_node(layer())
    if mode is not None:
        node.attribute.append(helper.make_attribute("mode", mode))
    return make_node_model(layer(), node=node)


def open_session(proto: onnx.ModelProto, override: str | None = None, threads: int = 1) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # refusals are expected here
    if override is not None:
        options.add_session_config_entry("qbb.mode", override)
    options.register_custom_ops_library(str(library_path()))
    return ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("rows", [3, least_many(3), 40])
@pytest.mark.parametrize("override", [None, *MODES])
@pytest.mark.parametrize("mode", [None, 0, 1, 2])
def test_override_wins(mode: int | None, override: str | None, rows: int) -> None:
    x = np.random.default_rng(1).normal(size=(rows, 300)).astype(np.float32)
    want = abi.Kernel(layer(), None, (mode or 0) if override is None else MODES.index(override))(x)
    (got,) = open_session(model(mode), override).run(None, {"X": x})
    assert got.tobytes() == want.tobytes()


def test_sessions_of_different_modes_side_by_side() -> None:
    x = np.random.default_rng(1).normal(size=(2, 300)).astype(np.float32)
    sessions = {mode: open_session(model(None), mode) for mode in MODES}
    again = {mode: open_session(model(None), mode) for mode in reversed(MODES)}
    for mode in MODES:
        want = abi.Kernel(layer(), None, MODES.index(mode))(x).tobytes()
        assert sessions[mode].run(None, {"X": x})[0].tobytes() == want
        assert again[mode].run(None, {"X": x})[0].tobytes() == want


def test_unknown_override_is_refused() -> None:
    message = "unknown session config entry qbb.mode; expected exact, int8 or int16; got int4"
    with pytest.raises(Exception, match=re.escape(message)):
        open_session(model(None), "int4")


@pytest.mark.parametrize("mode", [-1, 3, 2**40, -(2**62)])
def test_unknown_mode_is_refused(mode: int) -> None:
    with pytest.raises(Exception, match=r"'linear': unknown mode; expected 0 \(exact\), 1 \(int8\) or 2 \(int16\)"):
        open_session(model(mode))


def with_body(mode: object, path: Path) -> Path:
    source = path / "source.onnx"
    onnx.save(model(mode), source)
    graph = read_graph(source)
    AttachFunctionBody()(graph)
    save(graph, path / "m.onnx")
    return path / "m.onnx"


def test_function_body_runs_with_the_attribute(tmp_path: Path) -> None:
    """Stock ONNX Runtime and the reference evaluator do not mind it; they have one mode."""
    path = with_body(1, tmp_path)
    VerifyBinaryBasis()(read_graph(path))
    x = np.random.default_rng(1).normal(size=(3, 300)).astype(np.float32)
    exact = layer().exact(x)
    bound = 2 * 300 * 2.0**-23 * layer().terms(x)
    for y in (
        ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"X": x})[0],
        ReferenceEvaluator(str(path)).run(None, {"X": x})[0],
        session(path, mode="exact").run(None, {"X": x})[0],
    ):
        assert np.all(np.abs(y - exact) <= bound)
    assert np.max(np.abs(session(path).run(None, {"X": x})[0] - exact) / bound) > 1
    onnx.checker.check_model(str(path), full_check=True)


@pytest.mark.parametrize("mode", [3, -1, 1.0, "int8"])
def test_gate_refuses_other_modes(mode: object, tmp_path: Path) -> None:
    with pytest.raises(QbbError, match=r"node 'linear': unknown mode; expected 0..2 \(exact, int8, int16\); got"):
        session(with_body(mode, tmp_path))


def test_session_refuses_an_unknown_name(tmp_path: Path) -> None:
    with pytest.raises(QbbError, match="unknown mode; expected exact or int8 or int16; got fast"):
        session(with_body(0, tmp_path), mode="fast")


@pytest.mark.parametrize("mode", MODES[1:])
def test_bytes_do_not_depend_on_threads_or_time(mode: str) -> None:
    big = make_layer(np.random.default_rng(2), 1024, 700, 3, 128)
    rng = np.random.default_rng(3)
    for rows in (1, 5, 40):
        x = rng.normal(size=(rows, 1024)).astype(np.float32)
        want = abi.Kernel(big, None, MODES.index(mode))(x).tobytes()
        for threads in (1, 2, 3, 8, 16):
            opened = open_session(make_node_model(big), mode, threads)
            for _ in range(20 if threads == 8 else 3):
                assert opened.run(None, {"X": x})[0].tobytes() == want, (rows, threads)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system does not tell resident memory")
@pytest.mark.parametrize("mode", MODES)
def test_runs_and_sessions_leave_no_memory_behind(mode: str) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    big = make_node_model(make_layer(np.random.default_rng(2), 1024, 256, 3, 128))
    x = np.ones((40, 1024), np.float32)

    def use(times: int) -> None:
        for rows in (1, 8, 40):
            for _ in range(times):
                opened = open_session(big, mode, 2)
                for _ in range(5):
                    opened.run(None, {"X": x[:rows]})

    use(20)  # what allocators keep for later
    before = resident()
    use(70)
    assert resident() - before < 5 << 20


@pytest.mark.parametrize("count", [1, 8])
def test_sessions_on_many_threads(count: int) -> None:
    """Each run has memory of its own for what it makes of X."""
    sessions = [open_session(make_node_model(layer()), "int8", 2) for _ in range(count)]
    rng = np.random.default_rng(4)
    inputs = [rng.normal(size=(rows, 300)).astype(np.float32) for rows in (1, 2, 13, 14, 50, 3)]
    want = [abi.Kernel(layer(), None, 1)(x).tobytes() for x in inputs]

    def job(i: int) -> bool:
        return sessions[i % count].run(None, {"X": inputs[i % 6]})[0].tobytes() == want[i % 6]

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(job, range(600)))
