"""Kernels for CPUs by themselves: compiled for an instruction set, run here, or by a small C++ program under qemu."""

from __future__ import annotations

import struct
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tvm
import tvm_ffi
from tvm.support import cc

from qbb_export.runtimes.tvm import cpu
from tests.kernels.layers import Layer

DRIVER = Path(__file__).with_name("kernel_driver.cc")
_CODES = {"i": 0, "u": 1, "f": 2}  # DLPack's


@dataclass(frozen=True)
class Job:
    """A layer in a mode, with X float32 [M, K] for some M."""

    layer: Layer
    mode: int
    inputs: tuple[np.ndarray, ...]


def kernels_of(isa: Any, job: Job) -> cpu.Kernels:
    layer = job.layer
    spec = layer.spec
    offset = np.broadcast_to(layer.offset, (spec.tiles, spec.groups, 16)).astype(np.float32)
    bias = np.zeros((spec.tiles, 16), np.float32)
    bias.reshape(-1)[: spec.N] = np.broadcast_to(layer.bias, spec.N)
    return cpu.kernels(isa, spec, job.mode, layer.planes, layer.scales, np.ascontiguousarray(offset), bias)


class Library:
    """Kernels of some jobs as one library."""

    def __init__(self, description: dict[str, Any], jobs: Sequence[Job], isa: Any = None) -> None:
        self.target = tvm.target.Target(description)
        self.isa = cpu.isa_of(self.target) if isa is None else isa
        self.jobs = jobs
        self.kernels = [kernels_of(self.isa, job) for job in jobs]
        functions = {}
        for i, k in enumerate(self.kernels):
            functions[f"prepare{i}"] = k.prepare.with_attr("global_symbol", f"prepare{i}")
            functions[f"product{i}"] = k.product.with_attr("global_symbol", f"product{i}")
        self.compiled = tvm.compile(tvm.IRModule(functions), self.target)

    def run(self) -> list[list[np.ndarray]]:
        """Outputs of each job for each X, on this machine."""
        found = []
        for i, (job, k) in enumerate(zip(self.jobs, self.kernels, strict=True)):
            constants = [tvm.runtime.tensor(c) for c in k.constants]
            outputs = []
            for array in job.inputs:
                x = tvm.runtime.tensor(array)
                made = [tvm.runtime.tensor(a) for a in empty(k, len(array))]
                y = tvm.runtime.tensor(np.full((len(array), job.layer.spec.N), np.nan, np.float32))
                self.compiled[f"prepare{i}"](x, *made)
                self.compiled[f"product{i}"](x, *made, *constants, y)
                outputs.append(y.numpy())
            found.append(outputs)
        return found

    def run_elsewhere(self, compiler: str, command: Sequence[str], folder: Path) -> list[list[np.ndarray]]:
        """The same by the driver, built with a cross compiler and run by a command."""
        program = build_driver(compiler, folder)
        self.compiled.export_library(str(folder / "kernels.so"), fcompile=cc.cross_compiler(compiler))
        self.write(folder / "in")
        done = subprocess.run(
            [*command, str(program), str(folder / "kernels.so"), str(folder / "in"), str(folder / "out")],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{' '.join(command)}: {done.returncode} {done.stderr}"
        return self.read(folder / "out")

    def write(self, path: Path) -> None:
        """The driver's input."""
        tensors: list[bytes] = []
        calls: list[bytes] = []
        results: list[int] = []

        def tensor(array: np.ndarray, *, full: bool) -> int:
            head = (_CODES[array.dtype.kind], array.dtype.itemsize * 8, array.ndim, *array.shape, int(full))
            tensors.append(_pack(*head) + (np.ascontiguousarray(array).tobytes() if full else b""))
            return len(tensors) - 1

        def call(name: str, *places: int) -> None:
            calls.append(_pack(len(name)) + name.encode() + _pack(len(places), *places))

        for i, (job, k) in enumerate(zip(self.jobs, self.kernels, strict=True)):
            constants = [tensor(c, full=True) for c in k.constants]
            for array in job.inputs:
                x = tensor(array, full=True)
                made = [tensor(a, full=False) for a in empty(k, len(array))]
                y = tensor(np.empty((len(array), job.layer.spec.N), np.float32), full=False)
                call(f"prepare{i}", x, *made)
                call(f"product{i}", x, *made, *constants, y)
                results.append(y)
        parts = [_pack(len(tensors)), *tensors, _pack(len(calls)), *calls, _pack(len(results), *results)]
        path.write_bytes(b"".join(parts))

    def read(self, path: Path) -> list[list[np.ndarray]]:
        """What the driver wrote."""
        numbers = np.fromfile(path, np.float32)
        found, at = [], 0
        for job in self.jobs:
            outputs = []
            for array in job.inputs:
                size = len(array) * job.layer.spec.N
                outputs.append(numbers[at : at + size].reshape(len(array), -1))
                at += size
            found.append(outputs)
        assert at == numbers.size
        return found


def build_driver(compiler: str, folder: Path) -> Path:
    program = folder / "driver"
    include = tvm_ffi.libinfo.find_include_path()
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-rdynamic", "-I", include, "-o", str(program)]
    subprocess.run([compiler, *flags, str(DRIVER), "-ldl"], check=True)
    return program


def empty(k: cpu.Kernels, M: int) -> list[np.ndarray]:
    sizes = [(int(tvm.sym.Analyzer().simplify(tvm.tirx.const(1, "int64") * size)), dtype) for size, dtype in k.made(M)]
    return [np.full(size, -1, np.dtype(dtype)) for size, dtype in sizes]


def _pack(*numbers: int) -> bytes:
    return struct.pack(f"<{len(numbers)}q", *numbers)
