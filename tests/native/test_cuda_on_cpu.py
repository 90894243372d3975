"""CUDA kernels where there is no GPU: compiled for the CPU, each thread a fiber (cuda_on_cpu/emulate.h)."""

from __future__ import annotations

import ctypes
import itertools
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from qbb_export import format as fmt
from tests.kernels.cuda_bound import FEW, cuda_bound
from tests.kernels.layers import Layer, make_layer, with_garbage

ROOT = Path(__file__).parents[2]
CXX = shutil.which("g++") or shutil.which("clang++")
HEADERS = next((p for p in Path("/usr/local").glob("cuda*/include") if (p / "cuda_fp16.h").is_file()), None)
DECODE, BATCH, PROMPT, GENERAL, BYTES, CLUSTER_BYTES, CLUSTER_HALVES, BULK = range(8)
FLOAT32, FLOAT16, BFLOAT16 = 1, 10, 16


class Weights(ctypes.Structure):
    """``custom_ops/cuda/weights.h``."""

    _fields_ = [
        *((name, ctypes.c_int) for name in ("K", "N", "bases", "words", "groups", "tiles", "group_words")),
        ("planes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("half_scales", ctypes.c_bool),
        ("offset", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("row_unit", ctypes.c_void_p),
        ("unit", ctypes.c_float),
        ("group_shift", ctypes.c_int),
        ("tile_bytes", ctypes.c_int),
        ("plane_bytes", ctypes.c_int64),
        ("scale_bytes", ctypes.c_int64),
    ]


class Rows(ctypes.Structure):
    _fields_ = [
        ("x", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        *((name, ctypes.c_int) for name in ("type", "M", "block")),
    ]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if CXX is None or HEADERS is None:
        pytest.skip("CUDA kernels were NOT tested: no C++ compiler, or no CUDA headers in /usr/local/cuda")
    path = tmp_path_factory.mktemp("cuda") / "kernels.so"
    folders = [ROOT / "tests/native/cuda_on_cpu", ROOT / "custom_ops", ROOT / "custom_ops/include", HEADERS]
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-Wno-psabi", *(f"-I{folder}" for folder in folders)]
    source = ROOT / "tests/native/cuda_on_cpu/kernels.cc"
    subprocess.run([CXX, *flags, "-o", str(path), str(source)], check=True)
    return ctypes.CDLL(str(path))


def to_brain(x: np.ndarray) -> np.ndarray:
    """float32 to the bits of bfloat16, cut off."""
    return (x.view(np.uint32) >> 16).astype(np.uint16)


def run(
    library: ctypes.CDLL,
    layer: Layer,
    x: np.ndarray,
    kind: int,
    path: int,
    option: int,
    blocks: int = 3,
    block: int = 0,
) -> None:
    """Run one kernel on x float32 ``[M, K]`` and compare."""
    s = layer.spec
    stored = {FLOAT32: x, FLOAT16: x.astype(np.float16), BFLOAT16: to_brain(x)}[kind]
    stored = np.ascontiguousarray(stored)
    exact_x = (to_brain(x).astype(np.uint32) << 16).view(np.float32) if kind == BFLOAT16 else stored
    group_words = s.words if s.group_size == s.K else s.group_size // 32
    shift = 30 if group_words == s.words else max(0, (group_words // 4).bit_length() - 1)
    single = layer.offset.shape == (1, 1) and s.offset_shape != (1, 1)
    level = float(np.nanmax(np.abs(layer.scales.astype(np.float64)).sum(0))) + float(np.nanmax(np.abs(layer.offset)))
    bias = np.broadcast_to(layer.bias, s.N).astype(np.float32)
    row_unit = np.zeros(s.tiles * fmt.TILE_ROWS, np.float32)
    row_unit[: s.N] = layer.row_levels() / 32600
    weights = Weights(
        *(s.K, s.N, s.bases, s.words, s.groups, s.tiles, group_words),
        layer.planes.ctypes.data,
        layer.scales.ctypes.data,
        layer.scales.dtype == np.float16,
        None if single else layer.offset.ctypes.data,
        bias.ctypes.data,
        row_unit.ctypes.data,
        2.0 ** (np.floor(np.log2(level)) - 13),
        shift,
        s.words * 64,
        s.tiles * s.words * 64,
        s.tiles * s.groups * 32,
    )
    y = np.full((len(x), s.N), 0xFFFF if kind != FLOAT32 else np.nan, np.uint16 if kind != FLOAT32 else np.float32)
    rows = Rows(stored.ctypes.data, y.ctypes.data, kind, len(x), block)
    assert library.run_on_cpu(path, option, blocks, ctypes.byref(weights), ctypes.byref(rows)) == 0
    found = {FLOAT32: y, FLOAT16: y.view(np.float16) if kind == FLOAT16 else y}.get(kind)
    found = (y.astype(np.uint32) << 16).view(np.float32) if found is None else found
    exact_x = exact_x.astype(np.float64)
    digits = {FLOAT32: 24, FLOAT16: 11, BFLOAT16: 8}[kind]
    bits = option // 100 if path in (DECODE, BULK) else 16
    half, steps = path in (BATCH, PROMPT, CLUSTER_HALVES), {CLUSTER_BYTES: FEW, BYTES: 32639}.get(path, 32767)
    bound = cuda_bound(layer, exact_x, digits=digits, half=half, bits=bits, whole=path == BYTES, steps=steps)
    error = np.abs(found.astype(np.float64) - layer.exact(exact_x))
    assert (error <= bound).all(), (s, path, option, kind, float(np.nanmax(error)), float(bound.max()))


def inputs(rng: np.random.Generator, rows: int, K: int) -> np.ndarray:
    return rng.standard_normal((rows, K), dtype=np.float32)


@pytest.mark.parametrize("bases", [1, 2, 3, 4])
def test_decode(library: ctypes.CDLL, bases: int) -> None:
    rng = np.random.default_rng(bases)
    for (K, N, group), bits, step in itertools.product(
        ((128, 16, 128), (300, 40, 300), (1100, 33, 256), (4480, 64, 128)), (8, 16), (1, 2, 4)
    ):
        layer = make_layer(rng, K, N, bases, group, dtype=np.float16, offset=bool(rng.integers(2)))
        rows = int(rng.integers(1, step + 1))
        kind = int(rng.choice((FLOAT32, FLOAT16, BFLOAT16)))
        run(library, with_garbage(rng, layer), inputs(rng, rows, K), kind, DECODE, 100 * bits + step)


@pytest.mark.parametrize("bases", [1, 2, 3, 4])
def test_decode_bulk(library: ctypes.CDLL, bases: int) -> None:
    rng = np.random.default_rng(bases)
    for (K, N, group), option in itertools.product(
        ((300, 40, 300), (1100, 70, 256), (4480, 40, 128)), (801, 804, 1601, 1602)
    ):
        layer = make_layer(rng, K, N, bases, group, dtype=np.float16, offset=bool(rng.integers(2)))
        rows = int(rng.integers(1, option % 100 + 1))
        kind, stages = int(rng.choice((FLOAT32, FLOAT16, BFLOAT16))), int(rng.choice((0, 2, 3)))
        blocks = int(rng.integers(1, 4))
        run(library, with_garbage(rng, layer), inputs(rng, rows, K), kind, BULK, option, blocks, stages)


@pytest.mark.parametrize("bases", [1, 2, 3, 4])
def test_batch(library: ctypes.CDLL, bases: int) -> None:
    rng = np.random.default_rng(bases)
    for (K, N, group), columns in itertools.product(
        ((128, 16, 128), (301, 40, 301), (1160, 33, 256), (4480, 150, 128)), (1, 2, 4, 8)
    ):
        layer = make_layer(rng, K, N, bases, group, dtype=np.float16, offset=bool(rng.integers(2)))
        x = inputs(rng, int(rng.integers(1, 10 * columns)), K)
        for kind in (FLOAT16, BFLOAT16):
            options = {"blocks": int(rng.integers(1, 4)), "block": int(rng.choice((0, 2, 8)))}
            run(library, with_garbage(rng, layer), x, kind, BATCH, columns, **options)


@pytest.mark.parametrize("bases", [1, 2, 3, 4])
def test_bytes(library: ctypes.CDLL, bases: int) -> None:
    rng = np.random.default_rng(bases)
    for (K, N, group), columns in itertools.product(
        ((128, 16, 128), (301, 40, 301), (1160, 33, 256), (4480, 150, 128)), (1, 2)
    ):
        layer = make_layer(rng, K, N, bases, group, dtype=np.float16, offset=bool(rng.integers(2)))
        x = inputs(rng, int(rng.integers(1, 10 * columns)), K)
        for kind in (FLOAT32, FLOAT16, BFLOAT16):
            options = {"blocks": int(rng.integers(1, 4)), "block": int(rng.choice((0, 2, 8)))}
            run(library, with_garbage(rng, layer), x, kind, BYTES, columns, **options)


@pytest.mark.parametrize("bases", [1, 2, 3, 4])
def test_cluster(library: ctypes.CDLL, bases: int) -> None:
    """Blocks without chunks of their own, pieces that end early, groups across pieces, several sets, rounds of rows."""
    rng = np.random.default_rng(bases)
    cases = itertools.cycle(((2, 1), (2, 3), (4, 2), (8, 1)))  # blocks of a cluster, and clusters
    shapes = ((128, 16, 128), (301, 40, 301), (1160, 33, 256), (1408, 200, 128))
    for (K, N, group), (path, rows) in itertools.product(
        shapes, ((CLUSTER_BYTES, 8), (CLUSTER_BYTES, 16), (CLUSTER_HALVES, 8), (CLUSTER_HALVES, 32))
    ):
        layer = make_layer(rng, K, N, bases, group, dtype=np.float16, offset=bool(rng.integers(2)))
        kinds = (FLOAT16, BFLOAT16, FLOAT32) if (path, rows) == (CLUSTER_BYTES, 8) else (FLOAT16, BFLOAT16)
        for kind in kinds:
            x = inputs(rng, int(rng.integers(1, 3 * rows)), K)
            blocks, clusters = next(cases)
            run(library, with_garbage(rng, layer), x, kind, path, 100 * blocks + rows, blocks * clusters)


@pytest.mark.parametrize("bases", [1, 2, 3, 4])
def test_prompt(library: ctypes.CDLL, bases: int) -> None:
    rng = np.random.default_rng(bases)
    shapes = (
        (128, 130, 128, 2128),
        (304, 40, 304, 2256),
        (1160, 33, 256, 2064),
        (776, 300, 128, 2256),
        (328, 300, 328, 2064),
    )
    for K, N, group, how in shapes:
        layer = make_layer(rng, K, N, bases, group, dtype=np.float16, offset=bool(rng.integers(2)))
        x = inputs(rng, int(rng.integers(1, 140)), K)
        run(library, with_garbage(rng, layer), x, FLOAT16, PROMPT, how, 4)


@pytest.mark.parametrize("slices", [2, 3, 4])
def test_prompt_in_slices(library: ctypes.CDLL, slices: int) -> None:
    """A cluster for each part; slices without chunks of their own, too."""
    rng = np.random.default_rng(slices)
    for (K, N, group), tokens in itertools.product(((128, 300, 128), (1160, 40, 256)), (64, 128, 256)):
        layer = make_layer(rng, K, N, 3, group, dtype=np.float16, offset=bool(rng.integers(2)))
        x, outputs = inputs(rng, int(rng.integers(1, 2 * tokens)), K), -(-N // 256)
        clusters = outputs * -(-len(x) // tokens)
        how = 2000 * slices + tokens
        run(library, with_garbage(rng, layer), x, FLOAT16, PROMPT, how, 2 * slices * clusters)


def test_prompt_of_many_rows(library: ctypes.CDLL) -> None:
    """Several parts for each block; their order has a second set of rows, a smaller one."""
    rng = np.random.default_rng(0)
    layer = make_layer(rng, 40, 272, 2, 40, dtype=np.float16, offset=True)
    run(library, with_garbage(rng, layer), inputs(rng, 2200, 40), FLOAT16, PROMPT, 2128, 4)


@pytest.mark.parametrize("bases", [1, 3, 5, 8])
def test_general(library: ctypes.CDLL, bases: int) -> None:
    rng = np.random.default_rng(bases)
    for K, N, group in ((1, 1, 1), (31, 3, 31), (130, 33, 32), (260, 16, 64), (700, 17, 96), (2000, 20, 2000)):
        dtype = (np.float16, np.float32)[int(rng.integers(2))]
        layer = make_layer(rng, K, N, bases, group, dtype=dtype, offset=bool(rng.integers(2)))
        kind = int(rng.choice((FLOAT32, FLOAT16, BFLOAT16)))
        run(library, with_garbage(rng, layer), inputs(rng, 3, K), kind, GENERAL, 0)


def test_formats_agree() -> None:
    """A structure that differs from the header's would make the other tests read nonsense."""
    assert ctypes.sizeof(Weights) == 112 and ctypes.sizeof(Rows) == 32 and fmt.TILE_ROWS == 16
