"""Compiled models against ONNX Runtime and float64, in TVM itself."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

tvm = pytest.importorskip("tvm", reason="TVM was NOT tested: pip install 'qbb-export[tvm]'")

from qbb_export import cli, compiling  # noqa: E402
from qbb_export import format as fmt  # noqa: E402
from qbb_export.errors import QbbError  # noqa: E402
from qbb_export.passes.function_body import AttachFunctionBody  # noqa: E402
from qbb_export.runtimes.decoder import Decoder as OrtDecoder  # noqa: E402
from qbb_export.runtimes.ort import session  # noqa: E402
from qbb_export.runtimes.tvm import Decoder, load, operator, versions  # noqa: E402
from qbb_export.runtimes.tvm.build import compile_model  # noqa: E402
from qbb_export.runtimes.tvm.importer import import_model  # noqa: E402
from qbb_export.runtimes.tvm.lower import LowerBinaryBasis  # noqa: E402
from qbb_export.runtimes.tvm.targets import TARGETS, find_target  # noqa: E402
from tests.kernels.layers import make_initializers, make_layer, make_node, make_node_model, with_garbage  # noqa: E402

NATIVE = {"kind": "llvm", "mcpu": "native"}


def test_versions_are_the_pinned_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    versions.check_versions()
    monkeypatch.setattr(versions, "PINNED", {"apache-tvm": "0.1"})
    with pytest.raises(
        QbbError, match=r"^pip install 'qbb-export\[tvm\]': TVM is not installed as we need it; expected"
    ):
        versions.check_versions()


@pytest.mark.parametrize("bases", [1, 2, 3, 4, 8])
def test_kernel(bases: int) -> None:
    rng = np.random.default_rng(bases)
    for (K, N, group), dtype in itertools.product(
        ((1, 1, 1), (31, 3, 31), (33, 16, 32), (130, 33, 96), (300, 40, 300), (1100, 20, 256)), (np.float16, np.float32)
    ):
        layer = with_garbage(rng, make_layer(rng, K, N, bases, group, dtype=dtype, offset=bool(rng.integers(2))))
        spec = layer.spec
        function = tvm.compile(operator.exact(spec, np.dtype(dtype).name), tvm.target.Target(dict(NATIVE)))
        x = rng.standard_normal((3, K), dtype=np.float32)
        offset = np.broadcast_to(layer.offset, (spec.tiles, spec.groups, 16)).astype(np.float32)
        bias = np.zeros((spec.tiles, 16), np.float32)
        bias.reshape(-1)[:N] = np.broadcast_to(layer.bias, N)
        y = tvm.runtime.tensor(np.full((3, N), np.nan, np.float32))
        function["binary_basis_matmul"](*map(tvm.runtime.tensor, (x, layer.planes, layer.scales, offset, bias)), y)
        assert (np.abs(y.numpy() - layer.exact(x)) <= layer.bound(x)).all(), spec


@pytest.mark.parametrize("layout", [fmt.LAYOUT_ROWS, fmt.LAYOUT_TILED])
def test_one_node(tmp_path: Path, layout: int) -> None:
    layer = make_layer(np.random.default_rng(0), 200, 50, 3, 64, layout=layout, dtype=np.float16)
    model = ir.from_proto(make_node_model(layer, dims=("batch", "sequence")))
    AttachFunctionBody()(model)
    ir.save(model, tmp_path / "m.onnx")
    compile_model(tmp_path / "m.onnx", "native", tmp_path / "out")
    for shape in ((1, 1, 200), (2, 5, 200)):
        x = np.random.default_rng(1).standard_normal(shape, dtype=np.float32)
        y = load(tmp_path / "out").run({"X": x})["Y"].reshape(-1, 50)
        assert (np.abs(y - layer.exact(x.reshape(-1, 200))) <= layer.bound(x.reshape(-1, 200))).all()


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("torch")
    from tests.unit.models import tiny_llama

    folder = tmp_path_factory.mktemp("tvm")
    source = tiny_llama(folder / "hf")
    arguments = [str(source), "-o", str(folder / "m.onnx"), "--recipe", "rtn", "--bases", "3", "--group-size", "32"]
    assert cli.export_main(arguments) == 0
    return folder / "m.onnx"


@pytest.fixture(scope="module")
def folder(language_model: Path) -> Path:
    compile_model(language_model, "native", language_model.parent / "native")
    return language_model.parent / "native"


def test_command(language_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It compares with ONNX Runtime."""
    assert cli.main(["compile", str(language_model), "-o", str(tmp_path / "out")]) == 0
    assert "TVM / ONNX Runtime" in capsys.readouterr().out


def test_free_sizes(language_model: Path, folder: Path) -> None:
    from qbb_export.verification import run_file

    compiled = load(folder)
    for batch, length in ((1, 1), (3, 40)):
        ids = np.random.default_rng(length).integers(0, 97, (batch, length))
        feeds = {
            value["name"]: {"input_ids": ids}.get(value["name"], np.ones_like(ids))
            for value in compiled.manifest["inputs"]
        }
        (expected,) = run_file(language_model, feeds, library=True).values()
        (found,) = compiled.run(feeds).values()
        assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_the_runtime_alone_is_enough(folder: Path) -> None:
    code = (
        "import sys, numpy as np\nfrom qbb_export.runtimes.tvm import load\n"
        f"c = load({str(folder)!r})\n"
        "ids = np.arange(12).reshape(1, 12)\n"
        "names = [i['name'] for i in c.manifest['inputs']]\n"
        "found = c.run({name: ids if name == 'input_ids' else ids * 0 + 1 for name in names})\n"
        "print([v.shape for v in found.values()])\n"
        "assert 'onnxruntime' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "TVM_USE_RUNTIME_LIB": "1"}
    )
    assert done.returncode == 0 and "(1, 12, 97)" in done.stdout, done.stderr


def greedy(decoder: object, prompt: np.ndarray, count: int) -> list[int]:
    """The most likely tokens, and no tie among them that rounding could decide."""
    tokens, new = [], prompt
    for _ in range(count):
        logits = decoder.step(new)[0, -1]  # type: ignore[attr-defined]
        tokens.append(int(logits.argmax()))
        new = np.asarray([tokens[-1:]], np.int64)
    return tokens


@pytest.fixture(scope="module")
def generating_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("onnxruntime_genai")
    from tests.unit.models import tiny_decoder

    folder = tmp_path_factory.mktemp("generates")
    source, _ = tiny_decoder("llama", folder / "hf")
    arguments = [str(source), "-o", str(folder / "g"), "--recipe", "rtn", "--bases", "3", "--group-size", "32"]
    assert cli.export_main([*arguments, "--no-verify"]) == 0
    return folder / "g"


def test_decoder_with_a_cache(generating_folder: Path, tmp_path: Path) -> None:
    """Token by token, and several at once behind others; both sides with what they kept themselves."""
    model = generating_folder / "model.onnx"
    rows = compiling.compile_and_compare(model, "native", tmp_path / "out")
    assert [row.output for row in rows] == ["logits", "logits after a token more"] and all(row.ok for row in rows)
    compiled = load(tmp_path / "out")
    prompt = np.asarray([[5, 9, 2, 11, 7]])
    ours, theirs = Decoder(compiled), OrtDecoder(session(model), 64)
    assert greedy(ours, prompt, 20) == greedy(theirs, prompt, 20)
    more = np.asarray([[3, 1, 4, 1, 5, 9]])
    a, b = ours.step(more), theirs.step(more)
    assert a.shape == b.shape and np.abs(a - b).max() <= 1e-4 * np.abs(b).max()


def test_not_a_decoder(folder: Path) -> None:
    with pytest.raises(QbbError, match=r"not a decoder with a cache; expected inputs past_key_values\.\*"):
        Decoder(load(folder))


@pytest.mark.slow
def test_real_decoder(shared: Path, tmp_path: Path) -> None:
    """The same words as ONNX Runtime writes."""
    pytest.importorskip("onnxruntime_genai")
    source = shared / "models" / "gutenberg-llama-28m"
    arguments = [str(source), "-o", str(tmp_path / "g"), "--recipe", "rtn", "--bases", "3"]
    assert cli.export_main([*arguments, "--no-verify"]) == 0
    compile_model(tmp_path / "g" / "model.onnx", "native", tmp_path / "out")
    prompt = np.asarray([[83, 12, 280, 261, 1059]])
    theirs = OrtDecoder(session(tmp_path / "g" / "model.onnx"), 128)
    assert greedy(Decoder(load(tmp_path / "out")), prompt, 64) == greedy(theirs, prompt, 64)


@pytest.mark.parametrize("mode", ["int8"])
def test_modes(language_model: Path, tmp_path: Path, mode: str) -> None:
    """Another mode than the file's; rounded as our own kernels round."""
    (row,) = compiling.compile_and_compare(language_model, "native", tmp_path / "out", mode=mode)
    assert row.ok and row.error > 0
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["mode"] == mode
    with pytest.raises(QbbError, match="unknown mode; expected exact or int8 or int16; got int4"):
        compile_model(language_model, "native", tmp_path / "other", mode="int4")


def test_layers_with_one_input_share_its_tables(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    layers = [make_layer(rng, 64, n, 3, 32, dtype=np.float16) for n in (16, 48)]
    nodes = [make_node(layer, y=f"Y{i}", prefix=f"l{i}.", name=f"n{i}") for i, layer in enumerate(layers)]
    initializers = [tensor for i, layer in enumerate(layers) for tensor in make_initializers(layer, f"l{i}.")]
    x = onnx.helper.make_tensor_value_info("X", onnx.TensorProto.FLOAT, ["M", 64])
    ys = [onnx.helper.make_tensor_value_info(f"Y{i}", onnx.TensorProto.FLOAT, ["M", n]) for i, n in enumerate((16, 48))]
    graph = onnx.helper.make_graph(nodes, "two", [x], ys, initializers)
    opsets = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid("qbb", 1)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=9), tmp_path / "m.onnx")
    target = tvm.target.Target(dict(NATIVE))
    module = LowerBinaryBasis(target)(import_model(tmp_path / "m.onnx")[0])
    module = tvm.relax.transform.EliminateCommonSubexpr()(module)
    text = module["main"].script(show_meta=False)
    assert text.count("R.call_tir(activations_64") == 1 and text.count("R.call_tir(binary_basis_matmul_64") == 2


@pytest.mark.parametrize("name", [name for name, target in TARGETS.items() if target.linker is not None])
def test_other_machines(tmp_path: Path, name: str) -> None:
    target = TARGETS[name]
    if shutil.which(target.linker or "") is None:
        with pytest.raises(QbbError, match=re.escape(f"expected {target.linker} (apt install {target.package})")):
            find_target(name)
        pytest.skip(f"{name} was NOT compiled for: no {target.linker}")
    model = ir.from_proto(make_node_model(make_layer(np.random.default_rng(0), 64, 16, 2, 32)))
    AttachFunctionBody()(model)
    ir.save(model, tmp_path / "m.onnx")
    assert compiling.compile_and_compare(tmp_path / "m.onnx", name, tmp_path / "out") == []
    head = (tmp_path / "out" / "model.so").read_bytes()[:20]
    machines = {"aarch64": 183, "riscv64": 243}
    assert head[:4] == b"\x7fELF" and head[18] == machines[target.machine]


@pytest.fixture(scope="module")
def one_node(tmp_path_factory: pytest.TempPathFactory) -> Path:
    layer = make_layer(np.random.default_rng(0), 130, 33, 2, 64, dtype=np.float16)
    model = ir.from_proto(make_node_model(layer))
    AttachFunctionBody()(model)
    path = tmp_path_factory.mktemp("one") / "m.onnx"
    ir.save(model, path)
    return path


@pytest.mark.parametrize(
    ("name", "mark"),
    [
        ("opencl", b"__kernel void"),
        ("webgpu", b"@compute @workgroup_size"),
        ("metal", b"kernel void"),
        ("cuda-sm90", b".nv.info"),  # machine code, not source
        ("wasm32", b"\0asm"),
        ("hexagon", b"\x7fELF\x01"),
    ],
)
def test_machines_without_a_runtime_here(one_node: Path, tmp_path: Path, name: str, mark: bytes) -> None:
    """What is written is for that machine, and is refused here by name."""
    if name == "cuda-sm90" and shutil.which("nvcc") is None:
        with pytest.raises(
            QbbError, match=r"cuda-sm90: no compiler for its kernels; expected nvcc \(CUDA toolkit 13\)"
        ):
            find_target(name)
        pytest.skip("cuda-sm90 was NOT compiled for: no nvcc")
    # A process of its own: with TVM's CUDA runtime in it, this one would call nvcc in other tests, too.
    code = "import sys; from qbb_export.runtimes.tvm.build import compile_model; compile_model(*sys.argv[1:])"
    subprocess.run([sys.executable, "-c", code, one_node, name, tmp_path / "out"], check=True)
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    file = tmp_path / "out" / manifest["library"]["file"]
    if file.suffix == ".tar":
        with tarfile.open(file) as objects:
            assert {objects.extractfile(member).read(len(mark)) for member in objects} == {mark}  # type: ignore[union-attr]
    else:
        assert mark in file.read_bytes()
    if name in ("wasm32", "hexagon"):
        with pytest.raises(QbbError, match=r"not a library for this machine; expected model\.so; got model\.tar"):
            load(tmp_path / "out")
    elif name != "cuda-sm90" or not tvm.cuda().exist:
        with pytest.raises(QbbError, match=f"no device for a compiled model; .* got no {manifest['device']} here"):
            load(tmp_path / "out")


def test_a_target_in_tvm_s_words(one_node: Path, tmp_path: Path) -> None:
    """A GPU by JSON gets a GPU's kernels."""
    described = '{"kind": "opencl", "max_num_threads": 128, "host": {"kind": "llvm"}}'
    compile_model(one_node, described, tmp_path / "out")
    assert json.loads((tmp_path / "out/manifest.json").read_text())["device"] == "opencl"
    assert b"__kernel void" in (tmp_path / "out/model.so").read_bytes()
    for wrong in ("{}", '{"kind": "abacus"}', '{"kind": "opencl", "wheels": 4}'):
        with pytest.raises(QbbError, match="TVM refuses the target"):
            compile_model(one_node, wrong, tmp_path / "other")


def test_bad_targets_and_output(language_model: Path, folder: Path) -> None:
    with pytest.raises(QbbError, match="unknown target; expected native, x86-64-v3"):
        compile_model(language_model, "pentium", folder)
    with pytest.raises(QbbError, match="bad target"):
        compile_model(language_model, "{kind", folder)
    with pytest.raises(QbbError, match=r"output exists already \(--force replaces it\)"):
        compile_model(language_model, "native", folder)
    with pytest.raises(QbbError, match=r"output folder holds something else; expected manifest\.json in it"):
        compile_model(language_model, "native", folder.parent, force=True)
    assert language_model.is_file()


def test_bad_feeds(folder: Path) -> None:
    compiled = load(folder)
    with pytest.raises(QbbError, match="missing input"):
        compiled.run({})
    feeds = {value["name"]: np.zeros((1, 3), np.int64) for value in compiled.manifest["inputs"]}
    with pytest.raises(QbbError, match=r"bad input; expected int64 .*; got float32 \[1, 3\]"):
        compiled.run({**feeds, "input_ids": np.zeros((1, 3), np.float32)})
    with pytest.raises(QbbError, match=r"attention_mask: bad input; expected int64 .*; got int64 \[1, 4\]"):
        compiled.run({**feeds, "attention_mask": np.zeros((1, 4), np.int64)})


def test_bad_folders(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "model.so").write_bytes(b"other")
    manifest = json.loads((folder / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(QbbError, match="not the one that was compiled"):
        load(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "version": 9}))
    with pytest.raises(QbbError, match="manifest of another version; expected 1; got 9"):
        load(tmp_path)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(QbbError, match="no compiled model"):
        load(tmp_path)
