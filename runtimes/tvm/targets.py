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


@dataclass(frozen=True)
class Target:
    """A kind of machine.

    Attributes:
        name: ours, or ``custom``.
        description: as TVM takes it.
        linker: a C++ compiler for that machine; None: this machine's own.
        package: Debian's package with the linker.
        machine: as ``platform.machine`` says it; the result is run and compared on such a machine only.
    """

    name: str
    description: MappingProxyType[str, Any]
    linker: str | None = None
    package: str = "g++"
    machine: str = ""


def _llvm(name: str, machine: str, linker: str | None = None, package: str = "g++", **options: Any) -> Target:
    return Target(name, MappingProxyType({"kind": "llvm", **options}), linker, package, machine)


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
            target = Target("custom", MappingProxyType(json.loads(text)))
        except json.JSONDecodeError as error:
            raise QbbError("bad target", where="--target", expected="a name or JSON", got=error) from error
    elif text in TARGETS:
        target = TARGETS[text]
    else:
        raise QbbError("unknown target", where="--target", expected=f"{', '.join(TARGETS)}, or TVM's JSON", got=text)
    linker = target.linker or "g++"
    if shutil.which(linker) is None:
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
