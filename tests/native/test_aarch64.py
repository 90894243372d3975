"""The kernels for 64-bit Arm: cross-built with CMake's toolchain file, run under qemu."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

from qbb_export.custom_ops import library_path
from tests.native.build import CXX, OPS, ROOT, run
from tests.native.test_native import check_isa_file

PACKAGES = {"aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu", "qemu-aarch64-static": "qemu-user-static"}
SYSROOT = "/usr/aarch64-linux-gnu"
# What each CPU must run. The first is ARMv8.0: a kernel that takes a later instruction without asking dies there.
ISAS = {"cortex-a53": ["neon", "scalar"], "max": ["neondot", "neon", "scalar"]}


@pytest.fixture(scope="module")
def arm_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library for Arm, with warnings as errors."""
    missing = [package for command, package in PACKAGES.items() if shutil.which(command) is None]
    if missing:
        pytest.skip(f"the kernels for Arm were NOT tested; to test them: apt-get install {' '.join(missing)}")
    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if cmake is None:
        pytest.skip("the kernels for Arm were NOT tested: no cmake; to test them: pip install cmake")
    build = tmp_path_factory.mktemp("arm")
    toolchain = OPS / "cmake/aarch64-linux-gnu.cmake"
    run(cmake, "-S", OPS, "-B", build, f"-DCMAKE_TOOLCHAIN_FILE={toolchain}", "-DQBB_WERROR=ON")
    run(cmake, "--build", build)
    return build / "libqbb_ops.so"


def build_driver(compiler: str, source: str, library: Path, program: Path) -> Path:
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-I", OPS / "include", "-pthread", f"-Wl,-rpath,{library.parent}"]
    run(compiler, *flags, ROOT / "tests/native" / source, library, "-o", program)
    return program


def run_arm(cpu: str, *command: object) -> str:
    return run("qemu-aarch64-static", "-cpu", cpu, "-L", SYSROOT, *command)


def test_every_kernel_gives_the_bits_of_the_scalar_one_and_of_x86(arm_library: Path, tmp_path: Path) -> None:
    if CXX is None:
        pytest.skip("no C++ compiler for this machine: set CXX")
    native = build_driver(CXX, "isa_driver.cc", library_path(), tmp_path / "native")
    *_, digest = run(native, 1, 160).split()
    arm = build_driver("aarch64-linux-gnu-g++", "isa_driver.cc", arm_library, tmp_path / "arm")
    for cpu, isas in ISAS.items():
        assert run_arm(cpu, arm, 1, 160).split() == [*isas, digest], cpu


def test_exact_numbers_and_broken_descriptions(arm_library: Path, tmp_path: Path) -> None:
    """Exact mode against plain loops over both layouts, integer modes against each other, with threads."""
    driver = build_driver("aarch64-linux-gnu-g++", "abi_driver.cc", arm_library, tmp_path / "driver")
    assert run_arm("max", driver, 2, 25) == "25 matrices\n"


def test_the_dot_product_file_has_no_shared_inline_code(arm_library: Path, tmp_path: Path) -> None:
    check_isa_file("aarch64-linux-gnu-g++", "aarch64-linux-gnu-nm", "neondot", tmp_path)
