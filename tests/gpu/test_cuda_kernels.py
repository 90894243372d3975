"""CUDA kernels against float64, over shapes that go through every path and every remainder."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from qbb_export import format as fmt  # noqa: E402
from tests.gpu.cuda_abi import CudaKernel, need_cuda  # noqa: E402
from tests.kernels import abi  # noqa: E402
from tests.kernels.cuda_bound import cuda_bound  # noqa: E402
from tests.kernels.layers import Layer, group_sizes, make_layer, with_garbage  # noqa: E402

pytestmark = pytest.mark.gpu

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DIGITS = {torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}


@pytest.fixture(autouse=True, scope="module")
def cuda() -> None:
    need_cuda()


def bound(layer: Layer, x: np.ndarray, dtype: torch.dtype, bits: int = 16) -> np.ndarray:
    """:func:`cuda_bound` of a type."""
    half, whole = dtype != torch.float32, len(x) > 2 and bits == 16
    return cuda_bound(layer, x, digits=DIGITS[dtype], half=half, bits=bits, whole=whole)


def check(layer: Layer, rows: int, dtype: torch.dtype, seed: int = 0, **options: object) -> torch.Tensor:
    """Compare one product; returns y."""
    x = torch.from_numpy(np.random.default_rng(seed).standard_normal((rows, layer.spec.K), dtype=np.float32))
    x = x.to(dtype).cuda()
    y = CudaKernel(layer, **options)(x)  # type: ignore[arg-type]
    exact = x.double().cpu().numpy()
    bits = 8 if options.get("mode") == fmt.MODES.index("int8") and rows <= 4 else 16
    error = np.abs(y.double().cpu().numpy() - layer.exact(exact))
    assert (error <= bound(layer, exact, dtype, bits)).all(), (layer.spec, rows, dtype, options, np.nanmax(error))
    return y


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", (fmt.LAYOUT_ROWS, fmt.LAYOUT_TILED))
@pytest.mark.parametrize("K", (1, 31, 33, 96, 127, 128, 130, 256, 260, 640, 1000, 2048, 4200))
def test_grid(K: int, layout: int, dtype: torch.dtype) -> None:
    rng = np.random.default_rng([K, layout])
    for N, bases in itertools.product((1, 3, 16, 33, 64), range(1, fmt.MAX_BASES + 1)):
        sizes = [*group_sizes(K), *(g for g in (64, 128, 256) if g < K)]
        options = {"offset": bool(rng.integers(2)), "bias": bool(rng.integers(2)), "layout": layout}
        scale_type = np.float32 if rng.integers(4) == 0 else np.float16
        layer = make_layer(rng, K, N, bases, int(rng.choice(sizes)), dtype=scale_type, **options)  # type: ignore[arg-type]
        for rows in (1, 2, 3, 5, 9, 17, 40):
            check(with_garbage(rng, layer), rows, dtype, seed=rows)


@pytest.mark.parametrize("arch", (None, "80", "75"))
@pytest.mark.parametrize("mode", fmt.MODES)
@pytest.mark.parametrize("bases", (1, 2, 3, 4, 5))
def test_large(bases: int, mode: str, arch: str | None) -> None:
    rng = np.random.default_rng(bases)
    for K, N in ((4096, 6144), (1408, 512), (14336, 1024)):
        layer = make_layer(rng, K, N, bases, 128, dtype=np.float16, offset=bases < 3)
        for dtype, rows in itertools.product(DTYPES, (1, 2, 4, 7, 16, 33, 130, 300)):
            check(layer, rows, dtype, mode=fmt.MODES.index(mode), arch=arch)


@pytest.mark.parametrize("bases", (1, 2, 3, 4))
def test_prompts(bases: int) -> None:
    """More than a GPU multiplies at a time, and less; rows that the copy engine cannot take; outputs one by one."""
    rng = np.random.default_rng(bases)
    for K, N, group, rows in (
        (520, 2056, 128, 2300),
        (1160, 2050, 256, 2300),
        (333, 1001, 333, 700),
        (4096, 512, 512, 400),
        (4096, 1024, 128, 64),  # few outputs: slices of the inputs, here two, three and four
        (14336, 4096, 128, 64),
        (14336, 600, 128, 200),
    ):
        layer = make_layer(rng, K, N, bases, group, dtype=np.float16, offset=bases < 3, bias=True)
        check(with_garbage(rng, layer), rows, torch.float16)


def test_same_bytes_every_time() -> None:
    rng = np.random.default_rng(0)
    for group_size, rows in itertools.product((128, 64, 0), (1, 2, 8, 100, 3000)):
        kernel = CudaKernel(make_layer(rng, 2048, 1000, 3, group_size or None, dtype=np.float16))
        x = torch.randn(rows, 2048, device="cuda", dtype=torch.float16)
        first = kernel(x)
        assert all(torch.equal(kernel(x), first) for _ in range(20))


def test_a_graph_of_launches() -> None:
    """What is captured is what runs, with another X."""
    rng = np.random.default_rng(0)
    kernels = [CudaKernel(make_layer(rng, 1024, 1024, 3, 128, dtype=np.float16)) for _ in range(3)]
    for rows in (1, 2, 12):
        x = torch.randn(rows, 1024, device="cuda", dtype=torch.float16) / 256
        outputs = [torch.empty_like(x) for _ in kernels]

        def run(x: torch.Tensor = x, outputs: list[torch.Tensor] = outputs) -> None:
            for kernel, source, target in zip(kernels, [x, *outputs], outputs, strict=False):
                kernel.into(source, target)

        run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        x.copy_(torch.randn_like(x) / 256)
        graph.replay()
        wanted = x
        for kernel in kernels:
            wanted = kernel(wanted)
        torch.cuda.synchronize()
        assert torch.equal(outputs[-1], wanted)


def test_bfloat16_beyond_float16() -> None:
    layer = make_layer(np.random.default_rng(0), 512, 64, 3, 128, dtype=np.float16)
    for scale, rows in itertools.product((1e-30, 1e-8, 1e8, 1e30), (1, 3, 20)):
        x = (torch.randn(rows, 512, device="cuda") * scale).to(torch.bfloat16)
        y = CudaKernel(layer)(x).double().cpu().numpy()
        exact = x.double().cpu().numpy()
        assert (np.abs(y - layer.exact(exact)) <= bound(layer, exact, torch.bfloat16)).all()


def test_what_is_refused() -> None:
    layer = make_layer(np.random.default_rng(0), 256, 32, 2, 128, dtype=np.float16)
    with pytest.raises(abi.Failed, match=r"QBB_CUDA_ARCH; expected 75 to .*; got 30"):
        CudaKernel(layer, arch="30")
    with pytest.raises(abi.Failed, match="unknown mode; expected 0"):
        CudaKernel(layer, mode=3)
    kernel = CudaKernel(layer)
    with pytest.raises(abi.Failed, match="bad number of rows"):
        abi.call(abi.library().qbb_cuda_kernel_run, kernel.handle, 10, -1, None, None, None)
    assert CudaKernel(layer)(torch.empty(0, 256, device="cuda")).shape == (0, 32)
