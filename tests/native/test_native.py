"""C and C++ users: the example program, the build options, the kernels under the sanitizers."""

from __future__ import annotations

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
from tests.native.build import CXX, ENVIRONMENT, OPS, ROOT, build_driver, build_sanitized, run

pytestmark = pytest.mark.skipif(CXX is None, reason="no C++ compiler: set CXX")


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


def test_under_asan_and_ubsan(tmp_path: Path) -> None:
    """Random matrices, then the kept inputs of the fuzzer and some changes of them."""
    sanitizers = "address,undefined"
    library = build_sanitized(tmp_path, sanitizers, "-DQBB_FUZZ=ON")
    driver = build_driver("abi_driver", library, sanitizers)
    assert run(driver, 1, 150, env=ENVIRONMENT) == "150 matrices\n"
    if "clang" in str(CXX):
        run(tmp_path / "abi_fuzz", "-runs=0", OPS / "fuzz/corpus", env=ENVIRONMENT)
    else:
        printed = run(tmp_path / "abi_fuzz", OPS / "fuzz/corpus", 1, 3000, env=ENVIRONMENT)
        assert re.fullmatch(r"\d+ inputs and 3000 changed ones\n", printed)


def test_under_tsan(tmp_path: Path) -> None:
    library = build_sanitized(tmp_path, "thread")
    assert run(build_driver("abi_driver", library, "thread"), 1, 150, env=ENVIRONMENT) == "150 matrices\n"
    printed = run(build_driver("threads_driver", library, "thread"), 10, env=ENVIRONMENT)
    assert printed == "8 threads, 10 runs each: 0 wrong\n"


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
