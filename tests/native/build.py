"""The library and programs around it, built for a test."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OPS = ROOT / "custom_ops"
CXX = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
# Of this machine's user, but nothing that would change what a program under test does.
ENVIRONMENT = {k: v for k, v in os.environ.items() if k not in ("QBB_ISA", "LD_PRELOAD")}


def run(*command: object, limit: int = 900, **options: object) -> str:
    """The output of a command that must succeed."""
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=limit, **options)
    assert done.returncode == 0, f"{command[0]} gave {done.returncode}:\n{done.stdout[-5000:]}\n{done.stderr[-5000:]}"
    return done.stdout


def build_library(
    build: Path, *options: str, source: Path = OPS, flags: str = "-O1", compiler: str | None = CXX, limit: int = 900
) -> Path:
    """The library, warnings being errors. -O1 builds faster and keeps more of what sanitizers look at."""
    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if cmake is None:
        pytest.skip("no cmake")
    both = ["-DQBB_WERROR=ON", "-DQBB_CUDA=OFF", f"-DCMAKE_CXX_FLAGS_RELEASE={flags}", *options]
    run(cmake, "-S", source, "-B", build, f"-DCMAKE_CXX_COMPILER={compiler}", *both)
    run(cmake, "--build", build, "--parallel", "2", limit=limit)
    return build / "libqbb_ops.so"


def build_sanitized(build: Path, sanitizers: str, *options: str) -> Path:
    """The library with every report of a sanitizer being the end of the process."""
    return build_library(build, f"-DQBB_SANITIZE={sanitizers}", *options)


def build_driver(name: str, library: Path, sanitizers: str) -> Path:
    """tests/native/<name>.cc, linked to the library, under the same sanitizers."""
    program = library.parent / name
    flags = ["-std=c++17", "-O1", "-g", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", "-I", OPS / "include"]
    link = ["-L", library.parent, "-lqbb_ops", f"-Wl,-rpath,{library.parent}", "-pthread"]
    run(CXX, *flags, ROOT / f"tests/native/{name}.cc", "-o", program, *link)
    return program
