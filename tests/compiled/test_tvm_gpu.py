"""Kernels that TVM writes for GPUs, run without one: CUDA as C++, OpenCL on PoCL, WebGPU on a software Vulkan."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

tvm = pytest.importorskip("tvm", reason="TVM was NOT tested: pip install 'qbb-export[tvm]'")

from qbb_export import format as fmt  # noqa: E402
from qbb_export.runtimes.tvm import gpu_launch  # noqa: E402
from tests.compiled import gpu_runners  # noqa: E402
from tests.compiled.gpu_sources import compile_product  # noqa: E402
from tests.kernels.layers import group_sizes, make_layer, with_garbage  # noqa: E402

# Named target, TVM's name of the kind, what is needed, what runs it.
WAYS = {
    "cuda": ("cuda-sm90", "cuda", gpu_runners.need_cuda_headers, gpu_runners.emulated_cuda),
    "opencl": ("opencl", "opencl", gpu_runners.need_opencl, gpu_runners.on_opencl),
    "webgpu": ("webgpu", "webgpu", gpu_runners.need_webgpu, gpu_runners.on_webgpu),
}
ROWS = (1, 2, 3, 8, 17)


@pytest.fixture(params=list(WAYS))
def way(request: pytest.FixtureRequest) -> str:
    WAYS[request.param][2]()
    return str(request.param)


def exact_sums(way: str, K: int, seed: int, folder: Path) -> None:
    """Small whole numbers and powers of two, as in tests/kernels/test_agreement.py: every bit has to be right."""
    target, kind, _, runner = WAYS[way]
    rng = np.random.default_rng([K, seed])
    N, bases = int(rng.choice((1, 2, 3, 31, 32, 33, 64))), int(rng.integers(1, fmt.MAX_BASES + 1))
    options = {"dtype": rng.choice((np.float16, np.float32)), "offset": bool(rng.integers(2)), "powers_of_two": True}
    layer = with_garbage(rng, make_layer(rng, K, N, bases, int(rng.choice(group_sizes(K))), **options))
    run = runner(compile_product(layer, target, kind), layer, folder)
    for rows in ROWS:
        x = rng.integers(-8, 9, (rows, K)).astype(np.float32)
        assert (run(x) == layer.exact(x)).all(), (layer.spec, rows)


@pytest.mark.parametrize("K", [1, 77, 130])
def test_sample_of_the_grid(way: str, K: int, tmp_path: Path) -> None:
    exact_sums(way, K, 0, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("K", range(1, 131))
def test_grid(way: str, K: int, tmp_path: Path) -> None:
    exact_sums(way, K, 1, tmp_path)


@pytest.mark.parametrize(("K", "N", "bases", "group"), [(1100, 70, 4, 256), (300, 530, 2, 300), (260, 3100, 2, 128)])
def test_large(way: str, K: int, N: int, bases: int, group: int, tmp_path: Path) -> None:
    """Real numbers, more than a block's share of K, within the promised bound."""
    target, kind, _, runner = WAYS[way]
    rng = np.random.default_rng(K)
    layer = with_garbage(rng, make_layer(rng, K, N, bases, group, dtype=np.float16, offset=K == 300))
    run = runner(compile_product(layer, target, kind), layer, tmp_path)
    for rows in ROWS:
        x = rng.standard_normal((rows, K), dtype=np.float32)
        assert (np.abs(run(x) - layer.exact(x)) <= 2 * K * 2.0**-23 * layer.terms(x)).all(), rows


def test_launches() -> None:
    """Large matrices are cut so that a lane reads more; every way to cut covers all of N and M."""
    for tiles, wanted in ((10, 1), (256, 2), (600, 4), (1024, 4)):
        spec = fmt.Spec(4096, 16 * tiles, 3, 128, fmt.LAYOUT_TILED)
        cut = gpu_launch.launches(spec, cuda=True)
        assert cut[0].tiles == wanted
        for launch, rows in zip(cut, (1, 2, 8, 100), strict=True):
            blocks, groups = launch.grid(spec, rows)
            assert blocks * launch.tiles >= tiles and groups * launch.rows >= rows
            assert launch.threads <= (1024 if rows == 1 else 256)
