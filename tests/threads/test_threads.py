"""Any number of threads and sessions: the same bytes, no growth (R10, R11). Short ones: tests/kernels/test_ort.py."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from qbb_export.format import MODES
from tests.faults.forked import files
from tests.faults.models import chain
from tests.kernels.layers import make_layer, make_node_model
from tests.kernels.test_ort import open_session, run

pytestmark = pytest.mark.soak


@pytest.mark.parametrize("mode", range(len(MODES)))
def test_one_to_sixteen_threads(mode: int) -> None:
    """R10: 20 runs with each number of threads, few and many rows, float32 and float16."""
    rng = np.random.default_rng(mode)
    layer = make_layer(rng, 1100, 700, 3, 128, dtype=np.float16)
    for dtype in (np.float32, np.float16):
        model = make_node_model(layer, dtype=dtype)
        model.graph.node[0].attribute.add(name="mode", type=2, i=mode)
        for rows in (1, 7, 70):
            x = rng.normal(size=(rows, 1100)).astype(dtype)
            alone = run(open_session(model, 1), x).tobytes()
            for threads in range(1, 17):
                session = open_session(model, threads)
                assert all(run(session, x).tobytes() == alone for _ in range(20)), (rows, threads)


def test_quantising_twice(tmp_path: Path) -> None:
    """R10: two processes with other hashes and other numbers of threads; all files, the record included."""
    source = chain(tmp_path / "in.onnx", 6, 512)
    code = "import sys; from qbb_export.cli import export_main; sys.exit(export_main(sys.argv[1:]))"
    for number in (1, 2):
        output = tmp_path / str(number) / "m.onnx"
        output.parent.mkdir()
        environment = {**os.environ, "PYTHONHASHSEED": str(number), "OMP_NUM_THREADS": str(number)}
        subprocess.run([sys.executable, "-c", code, source, "-o", output], env=environment, check=True)
    assert files(tmp_path / "1") == files(tmp_path / "2")


@pytest.mark.parametrize("mode", range(len(MODES)))
def test_eight_threads(mode: int) -> None:
    """R11: 500 runs of each of 8 threads on one session, then 8 threads on 8 sessions."""
    rng = np.random.default_rng(5)
    model = make_node_model(make_layer(rng, 200, 300, 3, 64))
    model.graph.node[0].attribute.add(name="mode", type=2, i=mode)
    inputs = [rng.normal(size=(m, 200)).astype(np.float32) for m in (1, 2, 3, 5, 8, 17, 33, 45)]
    sessions = [open_session(model, 2) for _ in range(8)]
    alone = [run(sessions[0], x).tobytes() for x in inputs]

    def runs(thread: int, count: int, several: bool) -> int:
        same = 0
        for i in range(count):
            which = (thread + i) % 8
            same += run(sessions[which if several else 0], inputs[which]).tobytes() == alone[which]
        return same

    with ThreadPoolExecutor(8) as pool:
        for several in (False, True):
            assert list(pool.map(lambda thread, s=several: runs(thread, 500, s), range(8))) == [500] * 8


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("layout", [0, 1])
def test_two_hundred_sessions(layout: int) -> None:
    """R11: a leak of one of the 300 KB of weights a session, or of a kernel, would show."""
    rng = np.random.default_rng(6)
    model = make_node_model(make_layer(rng, 1024, 768, 3, 128, layout=layout))
    x = rng.normal(size=(2, 1024)).astype(np.float32)
    want = run(open_session(model), x).tobytes()

    def live(count: int) -> None:
        for _ in range(count):
            assert run(open_session(model), x).tobytes() == want
        gc.collect()

    live(50)  # until what is kept for reuse is there
    before = resident()
    live(200)
    grown = resident() - before
    print(f"200 sessions: {grown / 1e6:.2f} MB")
    assert grown < 5e6
