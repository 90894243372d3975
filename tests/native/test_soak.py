"""The native promises of SECURITY.md with their full figures: R4, R11, R12, R17, R18 (make soak)."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.native.build import CXX, ENVIRONMENT, OPS, ROOT, build_driver, build_library, build_sanitized, run
from tests.native.coverage import FLAGS, VALIDATORS, decisions
from tests.native.mutants import MUTANTS, Mutant

pytestmark = [pytest.mark.soak, pytest.mark.skipif(CXX is None, reason="no C++ compiler: set CXX")]

ADDRESS = "address,undefined"
HOUR = 3600
RUNS = 1_000_000
# Where every check of the validators is tested.
VALIDATION = ["tests/kernels/test_validation.py", "tests/kernels/test_ort.py", "tests/kernels/test_modes_ort.py"]


def find_clang() -> str | None:
    return next(filter(None, map(shutil.which, ("clang++", "clang++-14", "clang++-16", "clang++-19"))), None)


@pytest.fixture(scope="module")
def checked_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_sanitized(tmp_path_factory.mktemp("checked"), ADDRESS)


def test_a_million_inputs(tmp_path: Path) -> None:
    """R4: libFuzzer where Clang is; else random changes of the kept inputs, which find less in as many runs."""
    clang = find_clang()
    options = [f"-DQBB_SANITIZE={ADDRESS}", "-DQBB_FUZZ=ON"]
    build_library(tmp_path, *options, flags="-O2", compiler=clang or CXX, limit=HOUR)
    fuzzer = tmp_path / "abi_fuzz"
    if clang is None:
        print("no clang++: changes of the kept inputs instead of libFuzzer")
        assert f"{RUNS} changed ones" in run(fuzzer, OPS / "fuzz/corpus", 2, RUNS, env=ENVIRONMENT, limit=2 * HOUR)
        return
    corpus = tmp_path / "corpus"
    shutil.copytree(OPS / "fuzz/corpus", corpus)
    command = [fuzzer, corpus, f"-runs={RUNS}", "-max_len=256", "-print_final_stats=1", f"-artifact_prefix={tmp_path}/"]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=2 * HOUR)
    assert done.returncode == 0, done.stderr[-5000:]
    executed = int(re.search(r"number_of_executed_units: (\d+)", done.stderr)[1])
    print(f"{executed} executions, no finding")
    assert executed >= RUNS


def test_threads(tmp_path: Path) -> None:
    """R11 under TSan: 8 threads on one kernel, 8 on 8, 200 kernels that come and go meanwhile; 500 runs each."""
    library = build_sanitized(tmp_path, "thread")
    printed = run(build_driver("threads_driver", library, "thread"), 500, env=ENVIRONMENT, limit=HOUR)
    assert printed == "8 threads, 500 runs each: 0 wrong\n"


@pytest.mark.parametrize("isa", ["avx512vnni", "avx2", "scalar"])
def test_sizes_above_two_to_the_31(checked_library: Path, isa: str) -> None:
    """R12, under ASan and UBSan. Takes up to 10 GB of memory."""
    if os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < 14e9:
        pytest.skip("less than 14 GB of memory: sizes above 2^31 were NOT tested")
    from qbb_export.custom_ops import library_info

    if not library_info().isas.get(isa, False):
        pytest.skip(f"no {isa} here")
    printed = run(build_driver("large_driver", checked_library, ADDRESS), isa, env=ENVIRONMENT, limit=HOUR)
    assert printed.count("exact\n") == 7


def test_the_kernel_suite_under_asan_and_ubsan(checked_library: Path) -> None:
    """R17: all of tests/kernels with a library whose first bad access or overflow ends the process."""
    names = ("libasan.so", "libubsan.so", "libstdc++.so")
    preload = " ".join(run(CXX, f"-print-file-name={name}").strip() for name in names)
    environment = {
        **ENVIRONMENT,
        "QBB_LIBRARY": str(checked_library),
        "LD_PRELOAD": preload,
        "ASAN_OPTIONS": "detect_leaks=0:alloc_dealloc_mismatch=0",  # Python and ONNX Runtime are not built for these
        "PYTHONMALLOC": "malloc",
    }
    # ASan keeps what was freed for a while, so memory does grow.
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "tests/kernels"]
    command += ["-k", "not leave_no_memory_behind"]
    printed = run(*command, env=environment, cwd=ROOT, limit=2 * HOUR)
    print(printed[-300:])
    assert "failed" not in printed and "passed" in printed


# --- R18: every check of the validators is needed ---------------------------------------------------------------------


def validate(library: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """The tests of the validators with another build of the library, up to the first that fails."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", "-p", "no:cacheprovider", *VALIDATION]
    environment = {**ENVIRONMENT, **more, "QBB_LIBRARY": str(library)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=900)


@pytest.fixture
def sources(tmp_path: Path) -> Iterator[Path]:
    copy = tmp_path / "custom_ops"
    shutil.copytree(OPS, copy)
    yield copy


def apply(mutant: Mutant, sources: Path) -> None:
    original = (OPS / mutant.file).read_text()
    parts = original.split(mutant.old)
    assert len(parts) > mutant.nth + 1, f"{mutant.file} has no longer: {mutant.old}"
    at = mutant.nth + 1
    changed = mutant.old.join(parts[:at]) + mutant.new + mutant.old.join(parts[at:])
    (sources / mutant.file).write_text(changed)


def killed_by(done: subprocess.CompletedProcess[str]) -> str:
    """The first test that noticed; a crash of the process counts."""
    if done.returncode in (0, 1):
        failed = re.search(r"^FAILED (?:tests/kernels/)?(\S+)", done.stdout, re.MULTILINE)
        return failed[1] if failed else "" if done.returncode == 0 else "an error"
    return f"the end of the process ({done.returncode})"


def test_every_check_is_needed(sources: Path, tmp_path: Path) -> None:
    build = tmp_path / "build"
    # Warnings that a removed check brings are no matter here.
    options = {"source": sources, "flags": "-O0"}
    library = build_library(build, "-DQBB_WERROR=OFF", **options)
    whole = validate(library)
    assert whole.returncode == 0, whole.stdout[-3000:]
    survivors = []
    for number, mutant in enumerate(MUTANTS, 1):
        apply(mutant, sources)
        build_library(build, "-DQBB_WERROR=OFF", **options)
        killer = killed_by(validate(library))
        shutil.copy(OPS / mutant.file, sources / mutant.file)
        (sources / mutant.file).touch()
        text = " ".join(mutant.old.split())
        print(f"{number:2}/{len(MUTANTS)} {mutant.file:16} {text:60.60} {killer or 'SURVIVED'}", flush=True)
        if not killer:
            survivors.append(mutant)
    assert survivors == []


def test_every_decision_is_taken_both_ways(tmp_path: Path) -> None:
    """R18: the tests of the validators, counted by Clang."""
    clang = find_clang()
    version = "" if clang is None else Path(clang).name.removeprefix("clang++")
    if clang is None or shutil.which(f"llvm-cov{version}") is None:
        pytest.skip("no clang++ with llvm-cov: the decisions of the validators were NOT counted")
    library = build_library(tmp_path, f"-DCMAKE_CXX_FLAGS={FLAGS}", flags="-O0", compiler=clang)
    done = validate(library, LLVM_PROFILE_FILE=str(tmp_path / "%p.profraw"))
    assert done.returncode == 0, done.stdout[-3000:]
    counted = decisions(library, list(tmp_path.glob("*.profraw")), OPS, version)
    assert [file.file for file in counted] == sorted(VALIDATORS)
    for file in counted:
        print(f"{file.file:16} {file.taken:3} of {file.total:3}")
        for line, text in file.missed:
            print(f"    line {line}: {text}")
    assert all(file.total >= 6 for file in counted)
    assert [(file.file, *missed) for file in counted for missed in file.missed] == []
