"""Names of targets: what LLVM is told, and the compiler that links for them."""

from __future__ import annotations

import json
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from qbb_export.errors import QbbError

LIBRARY: Final = "model.so"
OBJECTS: Final = "model.tar"
GPU_KINDS: Final = ("cuda", "opencl", "metal", "webgpu")  # of targets, by TVM's names


@dataclass(frozen=True)
class Target:
    """A kind of machine.

    Attributes:
        name: ours, or ``custom``.
        description: as TVM takes it.
        linker: a C++ compiler for that machine; None: this machine's own.
        package: Debian's package with the linker.
        machine: as ``platform.machine`` says it; the result is run and compared on such a machine only.
        device: where its kernels run, by TVM's name.
        library: what is written: a shared library, or object files to be linked with TVM's runtime for that machine,
            which no wheel has.
    """

    name: str
    description: MappingProxyType[str, Any]
    linker: str | None = None
    package: str = "g++"
    machine: str = ""
    device: str = "cpu"
    library: str = LIBRARY


def _llvm(name: str, machine: str, linker: str | None = None, package: str = "g++", **options: Any) -> Target:
    return Target(name, MappingProxyType({"kind": "llvm", **options}), linker, package, machine)


def _gpu(name: str, **options: Any) -> Target:
    """Kernels for a GPU; the code around them is for this machine."""
    description = {**options, "host": {"kind": "llvm"}}
    return Target(name, MappingProxyType(description), device=options["kind"])


_AARCH64: Final = ("aarch64", "aarch64-linux-gnu-g++", "g++-aarch64-linux-gnu")
TARGETS: Final = MappingProxyType(
    {
        target.name: target
        for target in (
            _llvm("native", platform.machine()),
            _llvm("x86-64-v3", "x86_64", mcpu="x86-64-v3"),
            _llvm("x86-64-v4", "x86_64", mcpu="x86-64-v4"),
            _llvm("cortex-a76", *_AARCH64, mtriple="aarch64-linux-gnu", mcpu="cortex-a76"),
            _llvm("cortex-a53", *_AARCH64, mtriple="aarch64-linux-gnu", mcpu="cortex-a53"),
            _llvm("riscv64", "riscv64", "riscv64-linux-gnu-g++", "g++-riscv64-linux-gnu",
                  mtriple="riscv64-linux-gnu", mcpu="generic-rv64", mattr=["+m", "+a", "+f", "+d", "+c"]),
            Target("wasm32", MappingProxyType({"kind": "llvm", "mtriple": "wasm32-unknown-unknown-wasm",
                   "mattr": ["+simd128"], "vector-width": 128}), machine="wasm32", library=OBJECTS),
            Target("hexagon", MappingProxyType({"kind": "llvm", "mtriple": "hexagon-unknown-linux-musl",
                   "mcpu": "hexagonv66"}), machine="hexagon", library=OBJECTS),
            _gpu("cuda-sm90", kind="cuda", arch="sm_90", max_threads_per_block=1024, max_shared_memory_per_block=49152,
                 thread_warp_size=32),
            _gpu("opencl", kind="opencl", max_num_threads=256),
            _gpu("webgpu", kind="webgpu", max_num_threads=256),
            _gpu("metal", kind="metal", max_threads_per_block=256),
        )
    }
)  # fmt: skip


def find_target(text: str) -> Target:
    """A target by its name, or by TVM's own description as JSON, which is linked for this machine.

    Raises:
        QbbError: neither, or the compiler that links for it is missing.
    """
    if text.lstrip().startswith("{"):
        try:
            description = json.loads(text)
            kind = description.get("kind", "") if isinstance(description, dict) else ""
            target = Target("custom", MappingProxyType(description), device=kind if kind in GPU_KINDS else "cpu")
        except (json.JSONDecodeError, TypeError) as error:
            raise QbbError("bad target", where="--target", expected="a name or JSON", got=error) from error
    elif text in TARGETS:
        target = TARGETS[text]
    else:
        raise QbbError("unknown target", where="--target", expected=f"{', '.join(TARGETS)}, or TVM's JSON", got=text)
    if target.device == "cuda" and shutil.which("nvcc") is None:
        where = f"--target {target.name}"
        raise QbbError("no compiler for its kernels", where=where, expected="nvcc (CUDA toolkit 13) in PATH")
    linker = target.linker or "g++"
    if target.library == LIBRARY and shutil.which(linker) is None:
        raise QbbError(
            "no compiler to link with",
            where=f"--target {target.name}",
            expected=f"{linker} (apt install {target.package})",
        )
    return target


def describe(target: Target) -> dict[str, Any]:
    """What TVM is told; ``native`` gets this machine's CPU, less what a virtual machine hides of it."""
    description = dict(target.description)
    if target.name != "native":
        return description
    from tvm.target import Target as Described
    from tvm.target import codegen

    cpu = str(codegen.llvm_get_system_cpu())
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return description
    flags = {flag.replace("_", "") for line in lines if line.startswith("flags") for flag in line.split()}
    if not flags:  # not x86, whose features these are
        return description
    known = codegen.llvm_get_cpu_features(Described({**description, "mcpu": cpu}))
    hidden = sorted(
        f for f in map(str, known) if f.startswith(("avx", "amx", "vaes", "vpclmul", "gfni")) and f not in flags
    )
    return {**description, "mcpu": cpu, "mattr": [f"-{feature}" for feature in hidden]}
