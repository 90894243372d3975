"""Programs that run what TVM compiled, as examples/tvm/README.md says; those for other machines in qemu."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

tvm = pytest.importorskip("tvm", reason="TVM was NOT tested: pip install 'qbb-export[tvm]'")
import tvm_ffi  # noqa: E402

from qbb_export.cli import export_main  # noqa: E402
from qbb_export.passes.function_body import AttachFunctionBody  # noqa: E402
from qbb_export.runtimes.ort import session  # noqa: E402
from qbb_export.runtimes.tvm.build import compile_model  # noqa: E402
from qbb_export.runtimes.tvm.versions import PINNED  # noqa: E402
from tests.kernels.layers import Layer, group_sizes, make_layer, make_node_model  # noqa: E402

ROOT = Path(__file__).parents[2]
HEADERS = tvm_ffi.libinfo.find_include_path()
LIBRARIES = ("tvm/lib/libtvm_runtime.so", "tvm_ffi/lib/libtvm_ffi.so")
PACKAGES = {
    "aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu",
    "aarch64-linux-gnu-gcc": "gcc-aarch64-linux-gnu",
    "riscv64-linux-gnu-gcc": "gcc-riscv64-linux-gnu",
    "qemu-aarch64-static": "qemu-user-static",
    "qemu-riscv64-static": "qemu-user-static",
    "g++": "g++",
    "node": "nodejs",
    "wasm-ld": "lld",
}


def need(*commands: str) -> None:
    missing = [PACKAGES[command] for command in commands if shutil.which(command) is None]
    if missing:
        pytest.skip(f"compiled models were NOT run here; to run them: apt-get install {' '.join(missing)}")


def run(*command: object, **options: object) -> subprocess.CompletedProcess[bytes]:
    done = subprocess.run([str(word) for word in command], capture_output=True, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stderr.decode()
    return done  # type: ignore[no-any-return]


def command(start: str) -> list[str]:
    """The README's line that starts so."""
    found = re.search(rf"^    ({re.escape(start)}.*)$", (ROOT / "examples/tvm/README.md").read_text(), re.MULTILINE)
    assert found is not None
    return found.group(1).split()


def save(layer: Layer, path: Path) -> Path:
    model = ir.from_proto(make_node_model(layer, dims=("batch", 3)))
    AttachFunctionBody()(model)
    ir.save(model, path)
    return path


@pytest.fixture(scope="module")
def layer() -> Layer:
    return make_layer(np.random.default_rng(0), 130, 33, 3, 64, dtype=np.float16)


@pytest.fixture(scope="module")
def model(layer: Layer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(layer, tmp_path_factory.mktemp("model") / "model.onnx")


def build_runner(compiler: str, libraries: list[Path], folder: Path) -> Path:
    lib = folder / "lib"
    lib.mkdir()
    for library in libraries:
        shutil.copy(library, lib)
    words = command("g++ -std=c++17")
    replaced = {"g++": compiler, "HEADERS": HEADERS, "LIBS": lib, "run_model": folder / "run_model"}
    run(*(replaced.get(word, word) for word in words), cwd=ROOT)
    return folder / "run_model"


def check_printed(text: str, layer: Layer, size: int) -> None:
    name, shape, values = re.fullmatch(r"(\w+) \[(.*)\]: (.*)\n", text).groups()  # type: ignore[union-attr]
    assert (name, shape) == ("Y", f"{size}, 3, 33")
    x = np.full((1, 130), 0.5, np.float32)
    found = np.array([float(value) for value in values.split()])
    assert (np.abs(found - layer.exact(x)[0, :4]) <= layer.bound(x)[0, :4]).all()


def test_cpp(model: Path, layer: Layer, tmp_path: Path) -> None:
    need("g++")
    site = Path(tvm.__file__).parents[1]
    program = build_runner("g++", [site / library for library in LIBRARIES], tmp_path)
    compile_model(model, "native", tmp_path / "out")
    found = {"env": {"LD_LIBRARY_PATH": str(tmp_path / "lib")}}
    check_printed(run(program, tmp_path / "out", 5, **found).stdout.decode(), layer, 5)
    assert len((ROOT / "examples/tvm/run_model.cc").read_text().splitlines()) <= 80

    refused = subprocess.run([program, tmp_path / "nothing"], capture_output=True, text=True, **found)  # type: ignore[call-overload]
    assert refused.returncode == 1 and refused.stderr.startswith("error: ")


@pytest.fixture(scope="module")
def runner_on_arm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The C++ program with the libraries of the wheels for Arm, which lie in ``lib`` beside it."""
    need("aarch64-linux-gnu-g++", "qemu-aarch64-static")
    folder = tmp_path_factory.mktemp("arm")
    wanted = [f"{name}=={version}" for name, version in PINNED.items()]
    pip = (sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", folder / "wheels")
    platform = ("--platform", "manylinux_2_28_aarch64")
    done = subprocess.run([*pip, *platform, *wanted], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"compiled models were NOT run on Arm: no wheels: {done.stderr.strip().splitlines()[-1]}")
    for wheel in (folder / "wheels").glob("*.whl"):
        with zipfile.ZipFile(wheel) as file:
            for name in set(file.namelist()) & set(LIBRARIES):
                file.extract(name, folder)
    return build_runner("aarch64-linux-gnu-g++", [folder / library for library in LIBRARIES], folder)


def run_on_arm(program: Path, cpu: str, *arguments: object) -> str:
    qemu = ("qemu-aarch64-static", "-cpu", cpu, "-L", "/usr/aarch64-linux-gnu")
    found = ("-E", f"LD_LIBRARY_PATH={program.parent / 'lib'}")
    return run(*qemu, *found, program, *arguments).stdout.decode()


@pytest.mark.slow  # downloads 98 MB
@pytest.mark.parametrize("cpu", ["cortex-a76", "cortex-a53"])
def test_cpp_on_arm(cpu: str, runner_on_arm: Path, model: Path, layer: Layer, tmp_path: Path) -> None:
    """All of TVM's virtual machine."""
    compile_model(model, cpu, tmp_path / "out")
    check_printed(run_on_arm(runner_on_arm, cpu, tmp_path / "out", 2), layer, 2)


@pytest.mark.slow  # likewise, and compiles a whole model
@pytest.mark.parametrize("mode", ["exact", "int8"])
def test_a_sentence_encoder_on_arm(mode: str, runner_on_arm: Path, minilm_dir: Path, tmp_path: Path) -> None:
    """All outputs, within 1e-4 of the largest in exact mode; int8 may be twice as far off as our own kernels."""
    path, tokens = tmp_path / "minilm.onnx", 8
    options = ["--recipe", "greedy", "--bases", "3", "--group-size", "64", "--no-verify"]
    assert export_main([str(minilm_dir), "-o", str(path), *options]) == 0
    compile_model(path, "cortex-a76", tmp_path / "out", mode=mode)
    ids = np.random.default_rng(0).integers(
        1000, 30000, (tokens, tokens)
    )  # the program has one size for all that is open
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    names = [value["name"] for value in manifest["inputs"]]
    (tmp_path / "x.bin").write_bytes(b"".join(feeds[name].tobytes() for name in names))

    def here(mode: str) -> Any:
        return np.concatenate(
            [np.ravel(y) for y in session(path, mode=mode).run(None, {name: feeds[name] for name in names})]
        )

    files = (tmp_path / "x.bin", tmp_path / "y.bin")
    run_on_arm(runner_on_arm, "cortex-a76", tmp_path / "out", tokens, *files)
    found = np.fromfile(files[1], np.float32)
    expected = here("exact")
    largest = np.abs(expected).max()
    off = np.abs(found - expected).max() / largest
    bound = 1e-4 if mode == "exact" else 2 * np.abs(here(mode) - expected).max() / largest  # docs/tvm.md
    print(f"{mode}: {off:.1e} of the largest output, allowed {bound:.1e}")
    assert found.shape == expected.shape
    assert off <= bound


def make_kernel(model: Path, target: str, folder: Path) -> None:
    words = command("python examples/tvm/make_kernel.py model.onnx NODE riscv64")
    replaced = {"python": sys.executable, "model.onnx": model, "NODE": "linear", "riscv64": target, "layer": folder}
    run(*(replaced.get(word, word) for word in words), cwd=ROOT)


def check_kernel(layer: Layer, *program: object) -> None:
    x = np.random.default_rng(1).standard_normal((3, 130), dtype=np.float32)
    y = np.frombuffer(run(*program, input=x.tobytes()).stdout, np.float32).reshape(3, 33)
    assert (np.abs(y - layer.exact(x)) <= layer.bound(x)).all()


@pytest.mark.parametrize(
    ("target", "cpu", "qemu"),
    [("riscv64", "riscv64", ("-cpu", "rv64")), ("cortex-a53", "aarch64", ("-cpu", "cortex-a53"))],
)
def test_c_without_a_runtime(
    target: str, cpu: str, qemu: tuple[str, ...], model: Path, layer: Layer, tmp_path: Path
) -> None:
    compiler = f"{cpu}-linux-gnu-gcc"
    need(compiler, f"qemu-{cpu}-static")
    folder = tmp_path / "layer"
    make_kernel(model, target, folder)
    replaced = {"riscv64-linux-gnu-gcc": compiler, "HEADERS": HEADERS, "layer": folder, "kernel": tmp_path / "kernel"}
    replaced |= {f"layer/{name}": folder / name for name in ("kernel.o", "layer.S")}
    replaced["-Wa,-I,layer"] = f"-Wa,-I,{folder}"
    words = command("riscv64-linux-gnu-gcc")
    run(*(replaced.get(word, word) for word in words), "-Wall", "-Wextra", "-Werror", cwd=ROOT)
    check_kernel(layer, f"qemu-{cpu}-static", *qemu, tmp_path / "kernel")


def node_program(folder: Path) -> tuple[object, ...]:
    """Links what ``make_kernel.py`` wrote to a folder."""
    kernel = folder / "kernel.wasm"
    replaced = {"layer/kernel.o": folder / "kernel.o", "kernel.wasm": kernel}
    run(*(replaced.get(word, word) for word in command("wasm-ld")), cwd=ROOT)
    return "node", ROOT / "examples/tvm/kernel.mjs", kernel, folder


def test_webassembly(model: Path, layer: Layer, tmp_path: Path) -> None:
    need("node", "wasm-ld")
    make_kernel(model, "wasm32", tmp_path / "layer")
    check_kernel(layer, *node_program(tmp_path / "layer"))


@pytest.mark.slow
@pytest.mark.parametrize("first", range(1, 131, 10))
def test_webassembly_grid(first: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every K; N and bases take turns. Small whole numbers and powers of two: every sum is exact."""
    need("node", "wasm-ld")
    monkeypatch.syspath_prepend(str(ROOT / "examples/tvm"))
    example = importlib.import_module("make_kernel")
    rng = np.random.default_rng([5, first])
    for K in range(first, first + 10):
        N, bases = (1, 2, 3, 31, 32, 33, 64)[K % 7], K % 8 + 1
        options = {"dtype": rng.choice((np.float16, np.float32)), "offset": bool(rng.integers(2))}
        layer = make_layer(rng, K, N, bases, int(rng.choice(group_sizes(K))), powers_of_two=True, **options)
        folder = tmp_path / str(K)
        example.write(save(layer, tmp_path / f"{K}.onnx"), "linear", "wasm32", folder)
        x = rng.integers(-8, 9, (5, K)).astype(np.float32)
        y = np.frombuffer(run(*node_program(folder), input=x.tobytes()).stdout, np.float32).reshape(5, N)
        assert (y == layer.exact(x)).all(), layer.spec


def test_unknown_node(model: Path, tmp_path: Path) -> None:
    script = ROOT / "examples/tvm/make_kernel.py"
    words = [sys.executable, script, model, "-", "native", tmp_path / "x"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 1 and "no such node; expected linear; got -" in done.stderr
    assert not (tmp_path / "x").exists()
    assert onnx.load(model).graph.node[0].name == "linear"
