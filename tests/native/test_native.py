"""C and C++ users: the example program, the build options, the kernels under the sanitizers."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from qbb_export.custom_ops import library_info, library_path
from tests.kernels.layers import make_layer, make_node_model

ROOT = Path(__file__).resolve().parents[2]
OPS = ROOT / "custom_ops"
CXX = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")

pytestmark = pytest.mark.skipif(CXX is None, reason="no C++ compiler: set CXX")


def run(*command: object, **options: object) -> str:
    """The output of a command that must succeed."""
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=900, **options)
    assert done.returncode == 0, f"{command[0]} gave {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def libonnxruntime() -> Path:
    found = sorted((Path(ort.__file__).parent / "capi").glob("libonnxruntime.so.1.*"))
    if not found:
        pytest.skip("this onnxruntime has no libonnxruntime.so")
    return found[0]


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as its README says."""
    program = tmp_path_factory.mktemp("example") / "run_model"
    command = re.search(r"^    (g\+\+ .*)$", (ROOT / "examples/cpp/README.md").read_text(), re.MULTILINE)
    assert command is not None
    words = command.group(1).replace("-o run_model", f"-o {program}").split()
    run(CXX, "-Wall", "-Wextra", *words[1:], cwd=ROOT)
    return program


def test_example(example: Path, tmp_path: Path) -> None:
    assert len((ROOT / "examples/cpp/run_model.cc").read_text().splitlines()) <= 80

    layer = make_layer(np.random.default_rng(0), 100, 20, 2, 32, powers_of_two=True)
    model = tmp_path / "model.onnx"
    onnx.save(make_node_model(layer, dims=("batch", 3)), model)
    text = run(example, libonnxruntime(), library_path(), model)
    name, shape, values = re.fullmatch(r"(\w+) \[(.*)\]: (.*)\n", text).groups()
    assert (name, shape) == ("Y", "2, 3, 20")
    want = layer.exact(np.full((1, 100), 0.5, np.float32))[0, :4].astype(np.float32)
    np.testing.assert_array_equal([float(v) for v in values.split()], [float(f"{v:g}") for v in want.astype(float)])


def test_example_runs_an_exported_model(example: Path, tmp_path: Path) -> None:
    """From a float .onnx through the command line to C++; the same numbers as in Python."""
    from qbb_export import cli
    from qbb_export.runtimes.ort import session

    weights = np.random.default_rng(4).standard_normal((96, 40)).astype(np.float32)
    text = (
        '<ir_version: 8, opset_import: ["": 17]> g (float[batch, 96] x) => (float[batch, 40] y) { y = MatMul (x, w) }'
    )
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weights, "w"))
    onnx.save(proto, tmp_path / "in.onnx")
    assert cli.export_main([str(tmp_path / "in.onnx"), "-o", str(tmp_path / "out.onnx"), "--group-size", "32"]) == 0
    printed = run(example, libonnxruntime(), library_path(), tmp_path / "out.onnx")
    (expected,) = session(tmp_path / "out.onnx").run(None, {"x": np.full((2, 96), 0.5, np.float32)})
    assert printed == "y [2, 40]: " + " ".join(f"{v:g}" for v in expected[0, :4]) + "\n"


def test_example_tells_what_is_wrong(example: Path, tmp_path: Path) -> None:
    layer = make_layer(np.random.default_rng(0), 100, 20, 2, 32)
    model = make_node_model(layer)
    next(a for a in model.graph.node[0].attribute if a.name == "format").i = 9
    onnx.save(model, tmp_path / "model.onnx")
    command = [example, libonnxruntime(), library_path(), tmp_path / "model.onnx"]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "node qbb::BinaryBasisMatMul 'linear': unknown format version" in done.stderr


def build_driver(folder: Path, sanitizers: str) -> Path:
    """The library with warnings as errors, and the driver linked to it, both under the sanitizers."""
    cmake = shutil.which("cmake")
    if cmake is None:
        pytest.skip("no cmake")
    build = folder / "build"
    # -O1 builds faster and keeps more of the accesses that sanitizers look at.
    options = [f"-DQBB_SANITIZE={sanitizers}", "-DQBB_WERROR=ON", "-DCMAKE_CXX_FLAGS_RELEASE=-O1"]
    run(cmake, "-S", OPS, "-B", build, f"-DCMAKE_CXX_COMPILER={CXX}", *options)
    run(cmake, "--build", build, "--parallel", "2")
    driver = folder / "abi_driver"
    flags = ["-std=c++17", "-O1", "-g", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]
    source = ROOT / "tests/native/abi_driver.cc"
    run(
        CXX,
        *flags,
        "-I",
        OPS / "include",
        source,
        "-o",
        driver,
        "-L",
        build,
        "-lqbb_ops",
        f"-Wl,-rpath,{build}",
        "-pthread",
    )
    return driver


@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_under_sanitizers(sanitizers: str, tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("QBB_ISA", "LD_PRELOAD")}
    driver = build_driver(tmp_path, sanitizers)
    assert run(driver, 1, 150, env=environment) == "150 matrices\n"


def test_only_our_names_are_exported() -> None:
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("no nm")
    names = {line.split()[-1] for line in run(nm, "-D", "--defined-only", library_path()).splitlines()}
    declared = set(re.findall(r"\b(qbb_\w+)\(", (OPS / "include/qbb/ops.h").read_text()))
    assert names == {"RegisterCustomOps", *declared}


def isa_flags(name: str) -> list[str]:
    """The flags that the build gives to cpu/<name>.cc alone."""
    text = (OPS / "CMakeLists.txt").read_text()
    found = re.search(rf'cpu/{name}\.cc PROPERTIES COMPILE_OPTIONS\s+"([^"]+)"', text)
    assert found, f"no flags for {name} in CMakeLists.txt"
    return [flag for flag in found[1].split(";") if flag.startswith("-m")]


def check_isa_file(compiler: str, nm: str, name: str, folder: Path) -> None:
    """A weak symbol in a file with flags of its own could replace the plain one everywhere and crash older CPUs."""
    out = folder / f"{name}.o"
    for level in ("-O0", "-O2"):
        includes = ["-I", OPS, "-I", OPS / "include"]
        run(compiler, "-std=c++17", level, *isa_flags(name), *includes, "-c", OPS / f"cpu/{name}.cc", "-o", out)
        kinds = {line.split()[-2] for line in run(nm, "--defined-only", out).splitlines()}
        assert not kinds & {"W", "u"}, run(nm, "-C", "--defined-only", out)


def test_every_isa_file_is_compiled_without_shared_inline_code(tmp_path: Path) -> None:
    nm = shutil.which("nm")
    if nm is None or "avx2" not in library_info().isas:
        pytest.skip("no nm, or no x86 kernels")
    for name in ("avx2", "avx512", "avx512vnni"):
        check_isa_file(CXX, nm, name, tmp_path)


def test_plain_cpus_get_the_scalar_kernel(tmp_path: Path) -> None:
    """What is compiled where there are no x86 kernels."""
    flags = ["-std=c++17", "-O0", "-shared", "-fPIC", "-DQBB_X86_KERNELS=0", "-I", OPS, "-I", OPS / "include"]
    sources = [
        *OPS.glob("core/*.cc"),
        *(OPS / f"cpu/{n}.cc" for n in ("dispatch", "ops", "scalar")),
        OPS / "cuda/absent.cc",
        OPS / "ort/adapter.cc",
    ]
    library = tmp_path / "libqbb_ops.so"
    run(CXX, *flags, *sources, "-o", library)
    assert library_info(library).isas == {"scalar": True}
