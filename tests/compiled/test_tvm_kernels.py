"""Kernels for CPUs against exact arithmetic: on this machine, and for others under qemu."""

from __future__ import annotations

import platform
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

tvm = pytest.importorskip("tvm", reason="TVM was NOT tested: pip install 'qbb-export[tvm]'")

from tvm.tirx.script.builder import ir as T  # noqa: E402

from qbb_export.runtimes.tvm import cpu  # noqa: E402
from qbb_export.runtimes.tvm.cpu import ir, x86  # noqa: E402
from qbb_export.runtimes.tvm.cpu.ir import Register  # noqa: E402
from qbb_export.runtimes.tvm.targets import TARGETS, describe  # noqa: E402
from tests.compiled.products import Job, Library  # noqa: E402
from tests.kernels.integer_modes import INT8, INT16, expected  # noqa: E402
from tests.kernels.layers import group_sizes, make_layer, many_rows, with_garbage  # noqa: E402

ROWS_OF_X = (1, 2, 3, 5, 8, 17)
ROWS = (1, 2, 3, 31, 32, 33, 64)

# What this machine may run, best first: name, and what LLVM is told.
X86 = {
    "avx512vnni": {"kind": "llvm", "mcpu": "znver4"},
    "avx512": {"kind": "llvm", "mcpu": "x86-64-v4"},
    "avx2": {"kind": "llvm", "mcpu": "x86-64-v3"},
    "portable": {"kind": "llvm", "mcpu": "x86-64"},
}
# Target, kernels that it must get, and the CPU that qemu plays: one that dies of later instructions.
OTHERS = {
    "cortex-a76": ("neondot", ["qemu-aarch64-static", "-cpu", "cortex-a76", "-L", "/usr/aarch64-linux-gnu"]),
    "cortex-a53": ("neon", ["qemu-aarch64-static", "-cpu", "cortex-a53", "-L", "/usr/aarch64-linux-gnu"]),
    "riscv64": ("portable", ["qemu-riscv64-static", "-cpu", "rv64,v=false", "-L", "/usr/riscv64-linux-gnu"]),
}


def runs_here(name: str) -> bool:
    if platform.machine() != "x86_64":
        return False
    host = tvm.target.Target(describe(TARGETS["native"]))
    best = cpu.isa_of(host).name
    return list(X86).index(name) >= list(X86).index(best)


def whole_numbers(rng: np.random.Generator, K: int, N: int, bases: int) -> Job:
    """Sums of small whole numbers times powers of two: no order of additions may change a bit."""
    group = int(rng.choice(group_sizes(K)))
    layer = make_layer(
        rng,
        K,
        N,
        bases,
        group,
        dtype=np.float16,
        offset=bool(rng.integers(2)),
        bias=bool(rng.integers(2)),
        powers_of_two=True,
    )
    inputs = tuple(rng.integers(-8, 9, (M, K)).astype(np.float32) for M in ROWS_OF_X)
    return Job(with_garbage(rng, layer), 0, inputs)


def check_whole_numbers(jobs: list[Job], outputs: list[list[np.ndarray]]) -> None:
    for job, found in zip(jobs, outputs, strict=True):
        for x, y in zip(job.inputs, found, strict=True):
            np.testing.assert_array_equal(y, job.layer.exact(x).astype(np.float32), str((job.layer.spec, len(x))))


def any_numbers(rng: np.random.Generator, mode: int, K: int, N: int, bases: int, group: int) -> Job:
    dtype = np.float16 if rng.integers(2) else np.float32
    layer = with_garbage(rng, make_layer(rng, K, N, bases, group, dtype=dtype, offset=bool(rng.integers(2))))
    many = 128 // bases + 1 if mode == INT16 else 40 // bases + 1
    return Job(layer, mode, tuple(rng.standard_normal((M, K), dtype=np.float32) for M in (1, 2, 7, many)))


def check_any_numbers(jobs: list[Job], outputs: list[list[np.ndarray]]) -> None:
    """Against float64: exact mode within what every order of additions keeps, the others by their definition."""
    for job, found in zip(jobs, outputs, strict=True):
        spec = job.layer.spec
        for x, y in zip(job.inputs, found, strict=True):
            if job.mode == 0 or (job.mode == INT16 and many_rows(spec.bases, len(x), INT16)):
                want, bound = job.layer.exact(x), 2 * spec.K * 2.0**-23 * job.layer.terms(x)
            else:
                want, bound = expected(job.layer, x, job.mode)
            assert (np.abs(y - want) <= bound).all(), (spec, job.mode, len(x), np.abs(y - want).max())


def some_jobs(rng: np.random.Generator, whole: int) -> tuple[list[Job], list[Job]]:
    """Whole numbers at random places of the grid, and all modes on shapes with every kind of rest."""
    grid = [
        whole_numbers(rng, int(rng.integers(1, 131)), int(rng.choice(ROWS)), int(rng.integers(1, 9)))
        for _ in range(whole)
    ]
    modes = [
        any_numbers(rng, mode, *shape) for mode in (0, INT8, INT16) for shape in ((130, 33, 2, 96), (300, 17, 3, 300))
    ]
    return grid, modes


def check(library: Library, outputs: list[list[np.ndarray]], whole: int) -> None:
    check_whole_numbers(list(library.jobs[:whole]), outputs[:whole])
    check_any_numbers(list(library.jobs[whole:]), outputs[whole:])


@pytest.mark.parametrize("name", X86)
def test_this_machine(name: str) -> None:
    if not runs_here(name):
        pytest.skip(f"kernels for {name} were NOT tested: this CPU has not got it")
    grid, modes = some_jobs(np.random.default_rng(1), 4)
    library = Library(X86[name], [*grid, *modes])
    assert library.isa.name == name
    check(library, library.run(), len(grid))


def written_out(name: str, dtype: str, *arguments: Any) -> Any:
    """The instructions of AVX-512 that kernels name, by plain arithmetic."""
    if name.startswith("llvm.x86.avx512.permvar"):
        table, places = arguments
        lanes = 64 if dtype == "int8x64" else 16
        memory = Register(dtype.split("x")[0], table, lanes)
        wide = T.Cast(f"int32x{lanes}", places) & ir.splat(lanes - 1, "int32", lanes)
        return memory._buffer[wide]
    if name == "llvm.x86.avx512.vpdpbusd.512":
        sums, without_sign, signed = arguments
        products = T.Cast("int32x64", without_sign) * T.Cast("int32x64", signed)
        for i in range(4):
            sums = sums + ir.shuffle([products], range(i, 64, 4))
        return sums
    return ir.intrinsic(name, dtype, *arguments)


@pytest.mark.slow
@pytest.mark.parametrize("isa", [x86.Avx512Vnni, x86.Avx512])
def test_avx512_written_out(isa: type[x86.Avx2], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernels on any x86 with AVX2: all but the instructions themselves, which the test above wants the CPU for."""
    if not runs_here("avx2"):
        pytest.skip("NOT tested: no AVX2 here")
    monkeypatch.setattr(x86, "intrinsic", written_out)
    grid, modes = some_jobs(np.random.default_rng(4), 2)
    library = Library(X86["avx2"], [*grid, *modes], isa())
    check(library, library.run(), len(grid))


@pytest.mark.parametrize("name", OTHERS)
def test_other_machines(name: str, tmp_path: Path) -> None:
    target, (isa, command) = TARGETS[name], OTHERS[name]
    missing = [tool for tool in (target.linker or "", command[0]) if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"kernels for {name} were NOT tested: no {', '.join(missing)} (.ci/device-tools)")
    grid, modes = some_jobs(np.random.default_rng(2), 3)
    library = Library(describe(target), [*grid, *modes])
    assert library.isa.name == isa
    assert target.linker is not None
    check(library, library.run_elsewhere(target.linker, command, tmp_path), len(grid))


@pytest.mark.slow
@pytest.mark.parametrize("first", range(1, 131, 10))
@pytest.mark.parametrize("name", [*X86, *OTHERS])
def test_grid(name: str, first: int, tmp_path: Path) -> None:
    """Every K with every N; bases take turns."""
    rng = np.random.default_rng([3, first])
    for K in range(first, first + 10):
        jobs = [whole_numbers(rng, K, N, (K + i) % 8 + 1) for i, N in enumerate(ROWS)]
        if name in X86:
            if not runs_here(name):
                pytest.skip(f"kernels for {name} were NOT tested: this CPU has not got it")
            found = Library(X86[name], jobs).run()
        else:
            linker = TARGETS[name].linker
            if linker is None or shutil.which(linker) is None:
                pytest.skip(f"kernels for {name} were NOT tested: no {linker}")
            found = Library(describe(TARGETS[name]), jobs).run_elsewhere(linker, OTHERS[name][1], tmp_path)
        check_whole_numbers(jobs, found)
