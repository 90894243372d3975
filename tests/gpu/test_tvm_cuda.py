"""TVM's CUDA kernels on a GPU, against float64 and ONNX Runtime.

Compiles with TVM and nvcc, or takes what ``tvm_modules.py`` compiled elsewhere (QBB_TVM_MODULES); then TVM's runtime
alone is enough (TVM_USE_RUNTIME_LIB=1).
"""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from qbb_export import format as fmt  # noqa: E402
from tests.kernels.layers import make_layer  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not torch.cuda.is_available():
        pytest.fail("needs an NVIDIA GPU and a CUDA build of PyTorch")
    import tvm_gpu

    tvm_gpu.load_runtime()
    if "QBB_TVM_MODULES" in os.environ:
        return Path(os.environ["QBB_TVM_MODULES"])
    from tests.gpu.tvm_modules import compile_modules

    folder = tmp_path_factory.mktemp("modules")
    compile_modules(folder)
    return folder


def test_products(modules: Path) -> None:
    """Within the promised bound, and the same bytes twice."""
    import tvm_gpu

    for found in tvm_gpu.check(modules):
        assert found["of_bound"] <= 1 and found["repeats"], found


def test_exact_sums(modules: Path) -> None:
    """Small whole numbers and powers of two: every sum is exact, so every bit is right."""
    import tvm_gpu

    for K, N, bases, group, offset in tvm_gpu.EXACT:
        rng = np.random.default_rng(N)
        options = {"dtype": np.float16, "offset": offset, "powers_of_two": True}
        layer = make_layer(rng, K, N, bases, group, **options)  # type: ignore[arg-type]
        run, weights = tvm_gpu.function_of(modules, layer.spec, offset, "tvm"), tvm_gpu.constants(layer)
        for rows in (1, 2, 5, 17):
            x = rng.integers(-8, 9, (rows, K)).astype(np.float32)
            y = torch.full((rows, N), float("nan"), device="cuda")
            run(torch.from_numpy(x).cuda(), *weights, y)
            assert (y.double().cpu().numpy() == layer.exact(x)).all(), (layer.spec, rows)


def test_graph_capture(modules: Path) -> None:
    """A CUDA graph replays the launch on what X holds then."""
    import tvm_gpu
    from gpu import captured

    K, N, bases, group, offset = tvm_gpu.EXACT[5]
    layer = make_layer(np.random.default_rng(0), K, N, bases, group, dtype=np.float16, offset=offset)
    assert layer.spec == fmt.Spec(K, N, bases, group, fmt.LAYOUT_TILED)
    run, weights = tvm_gpu.function_of(modules, layer.spec, offset, "tvm"), tvm_gpu.constants(layer)
    x, y = torch.randn(1, K, device="cuda"), torch.zeros(1, N, device="cuda")
    replay = captured([partial(run, x, *weights, y)])
    x.copy_(torch.randn_like(x))
    replay()
    torch.cuda.synchronize()
    exact = x.cpu().numpy()
    error = np.abs(y.cpu().numpy() - layer.exact(exact))
    assert (error <= 2 * K * 2.0**-23 * layer.terms(exact)).all()


@pytest.mark.parametrize("spec", [fmt.Spec(K, K, 2, 128, fmt.LAYOUT_TILED) for K in (512, 4096, 8192)])
def test_kernels_wait_for_each_other(modules: Path, spec: fmt.Spec) -> None:
    """A kernel starts while the one before it runs, and reads what that one writes; two buffers are used in turn."""
    import tvm_gpu
    from gpu import captured

    numbers = (spec.K, spec.N, spec.bases, spec.group_size)
    layer = make_layer(np.random.default_rng(1), *numbers, dtype=np.float16, offset=False)
    layer.scales[...] = 2.0**-6  # sums stay about as large as they are
    run, weights = tvm_gpu.function_of(modules, spec, False, "tvm"), tvm_gpu.constants(layer)
    for rows in (1, 2, 8, 20):
        start = torch.randn(rows, spec.K, device="cuda")
        ends = []
        for alone in (True, False):
            buffers = [start.clone(), torch.full_like(start, float("nan"))]
            calls = [partial(run, buffers[i % 2], *weights, buffers[1 - i % 2]) for i in range(10)]
            if alone:
                for call in calls:
                    call()
                    torch.cuda.synchronize()
            else:
                replay = captured(calls)
                for _ in range(20):
                    buffers[0].copy_(start)
                    replay()
                torch.cuda.synchronize()
            ends.append(buffers[0])
        assert torch.isfinite(ends[0]).all() and torch.equal(*ends), rows


def test_language_model(modules: Path) -> None:
    """Everything else in it is dlight's."""
    from qbb_export.runtimes.tvm import load
    from tests.gpu.tvm_modules import EXPECTED, MODEL

    compiled = load(modules / MODEL)
    for shape, expected in np.load(modules / EXPECTED).items():
        batch, length = map(int, shape.split("x"))
        ids = np.random.default_rng(length).integers(0, 97, (batch, length))
        (found,) = compiled.run({"input_ids": ids, "attention_mask": np.ones_like(ids)}).values()
        assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max(), shape
