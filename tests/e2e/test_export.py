"""The command line on real and small models, as a user calls it."""

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

torch = pytest.importorskip("torch")

from qbb_export import cli  # noqa: E402
from qbb_export.artifact import read_graph  # noqa: E402
from qbb_export.passes.function_body import binary_basis_nodes  # noqa: E402
from qbb_export.passes.verify import node_spec  # noqa: E402
from qbb_export.reference import dense_weight  # noqa: E402
from qbb_export.runtimes.ort import session  # noqa: E402
from tests.unit import models  # noqa: E402

SMALL = ("--bases", "2", "--group-size", "32")
BUILD = ("--model", "tests.unit.models:two_layers", "--input", "x:float32[batch,40]")


def export(*arguments: object) -> int:
    """Weights alone unless a test says otherwise: what a model learns has tests of its own."""
    recipe = () if "--recipe" in arguments else ("--recipe", "fast")
    return cli.export_main([str(a) for a in (*arguments, *recipe)])


def nodes(path: Path) -> list[str]:
    graph = onnx.load(path, load_external_data=False).graph
    return [node.name for node in graph.node if node.op_type == "BinaryBasisMatMul"]


def test_hugging_face_decoder(tmp_path, capsys):
    folder = models.tiny_llama(tmp_path / "hf")
    assert export(folder, "-o", tmp_path / "m.onnx", *SMALL) == 0
    assert [name.removeprefix("model.layers.") for name in nodes(tmp_path / "m.onnx") if "+" in name] == [
        "0.self_attn.q_proj+k_proj+v_proj", "0.mlp.gate_proj+up_proj",
        "1.self_attn.q_proj+k_proj+v_proj", "1.mlp.gate_proj+up_proj",
    ]  # fmt: skip
    assert len(nodes(tmp_path / "m.onnx")) == 2 * 4
    printed = capsys.readouterr().out
    assert "quantised layers    │ 14" in printed
    assert "bits per weight" in printed
    assert "FAILED" not in printed
    ours = session(tmp_path / "m.onnx")
    assert [i.name for i in ours.get_inputs()] == ["input_ids", "attention_mask"]
    assert [(o.name, o.shape) for o in ours.get_outputs()] == [("logits", ["batch", "sequence", 97])]
    for batch, length in ((1, 1), (3, 7)):  # batch and sequence are dynamic
        ids = np.ones((batch, length), np.int64)
        (logits,) = ours.run(None, {"input_ids": ids, "attention_mask": ids})
        assert logits.shape == (batch, length, 97)


def test_layers_apart_or_fused_give_the_same_bits(tmp_path):
    folder = models.tiny_llama(tmp_path / "hf")
    logits = []
    ids = np.arange(14, dtype=np.int64).reshape(2, 7)
    for name, options in (("fused", ()), ("apart", ("--no-fuse",))):
        assert export(folder, "-o", tmp_path / f"{name}.onnx", *SMALL, "--no-verify", *options) == 0
        feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        logits.append(session(tmp_path / f"{name}.onnx").run(None, feeds)[0])
    assert len(nodes(tmp_path / "apart.onnx")) == 14
    assert np.array_equal(*logits)


def test_the_file_needs_no_library(tmp_path):
    folder = models.tiny_llama(tmp_path / "hf")
    assert export(folder, "-o", tmp_path / "m.onnx", *SMALL, "--no-verify") == 0
    stock = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    ids = np.arange(10, dtype=np.int64)[None]
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    (a,), (b,) = stock.run(None, feeds), session(tmp_path / "m.onnx").run(None, feeds)
    assert np.abs(a - b).max() <= 1e-4 * np.abs(a).max()


@pytest.mark.parametrize(
    ("family", "fused"), [("bert", 2), ("gpt2", 0), ("qwen2", 4), ("gpt_neox", 0), ("vit", 2), ("albert", 2)]
)
def test_other_architectures(tmp_path, family, fused):
    """LayerNorm, biases, transposed weights (GPT-2), parallel blocks (NeoX), pixels (ViT), shared layers (ALBERT)."""
    folder, layers = models.tiny(family, tmp_path / "hf")
    assert export(folder, "-o", tmp_path / "m.onnx", *SMALL) == 0
    assert sum(1 + name.count("+") for name in nodes(tmp_path / "m.onnx")) == layers
    assert sum("+" in name for name in nodes(tmp_path / "m.onnx")) == fused


def test_state_dict_pickle_and_program(tmp_path):
    module = models.two_layers()
    torch.save(module.state_dict(), tmp_path / "state.pt")
    torch.save(module, tmp_path / "module.pt")
    batch = torch.export.Dim("batch")
    program = torch.export.export(module, (torch.ones(3, 40),), dynamic_shapes=({0: batch},))
    torch.export.save(program, tmp_path / "program.pt2")
    results = []
    for name, arguments in {
        "state.pt": BUILD,
        "module.pt": ("--trust-pickle", *BUILD[2:]),
        "program.pt2": ("--trust-pickle",),
    }.items():
        out = tmp_path / f"{name}.onnx"
        assert export(tmp_path / name, "-o", out, "--include", "*", *SMALL, *arguments) == 0
        assert len(nodes(out)) == 2
        results.append(session(out).run(None, {"x": np.ones((5, 40), np.float32)})[0])
    assert np.array_equal(results[0], results[1])
    assert np.array_equal(results[0], results[2])


def onnx_model(path: Path) -> Path:
    weights = {"fc1.weight": (40, 33), "fc2.weight": (33, 24)}
    rng = np.random.default_rng(1)
    text = """<ir_version: 8, opset_import: ["": 17]>
      g (float[batch, 40] x) => (float[batch, 24] y) {
        h = MatMul (x, fc1_weight) r = Relu (h) y = MatMul (r, fc2_weight)
      }"""
    proto = onnx.parser.parse_model(text)
    for name, shape in weights.items():
        array = rng.standard_normal(shape).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name.replace(".", "_")))
    onnx.save(proto, path)
    return path


def test_onnx_in(tmp_path):
    source = onnx_model(tmp_path / "in.onnx")
    assert export(source, "-o", tmp_path / "out.onnx", "--include", "*", *SMALL) == 0
    assert len(nodes(tmp_path / "out.onnx")) == 2
    before, after = onnxruntime.InferenceSession(source), session(tmp_path / "out.onnx")
    assert [v.name for v in before.get_inputs()] == [v.name for v in after.get_inputs()]
    assert [v.name for v in before.get_outputs()] == [v.name for v in after.get_outputs()]


def test_pytorch_and_onnx_give_the_same_weights(tmp_path):
    """A data file bears the digest of its bytes, so equal names are equal weights: planes, scales and all others."""
    folder = models.tiny_llama(tmp_path / "hf")
    assert export(folder, "-o", tmp_path / "float.onnx", "--recipe", "float", "--no-verify") == 0
    digests = []
    for source, out in ((folder, "a.onnx"), (tmp_path / "float.onnx", "b.onnx")):
        assert export(source, "-o", tmp_path / out, *SMALL) == 0
        (data,) = tmp_path.glob(f"{out[0]}.*.data")
        digests.append(data.name.split(".")[1])
    assert digests[0] == digests[1]


def test_running_again_is_byte_identical_and_uses_the_record(tmp_path, monkeypatch):
    source = onnx_model(tmp_path / "in.onnx")
    assert export(source, "-o", tmp_path / "a.onnx", *SMALL) == 0
    first = {p.name: p.read_bytes() for p in tmp_path.glob("a*.data")} | {"g": (tmp_path / "a.onnx").read_bytes()}
    import qbb_export.record

    def never(*_: object, **__: object) -> None:
        raise AssertionError("a finished layer was quantised again")

    monkeypatch.setattr(qbb_export.record, "quantize", never)
    assert export(source, "-o", tmp_path / "a.onnx", "--force", *SMALL) == 0
    assert {p.name: p.read_bytes() for p in tmp_path.glob("a*.data")} | {
        "g": (tmp_path / "a.onnx").read_bytes()
    } == first


def test_choosing_layers(tmp_path):
    folder = models.tiny_llama(tmp_path / "hf")
    out = tmp_path / "m.onnx"
    arguments = ("--no-verify", "--no-fuse", "--force", "--group-size", "0")
    assert export(folder, "-o", out, *arguments, "--exclude", "*.0.*", "--include", "lm_head", "--bases", "1") == 0
    assert len(nodes(out)) == 7 + 1
    assert export(folder, "-o", out, *arguments, "--exclude", "*", "--include", "*.1.mlp.*") == 0
    assert len(nodes(out)) == 3
    assert export(folder, "-o", out, *arguments, "--layer", "*.mlp.*:bases=3,group_size=32", "--bases", "1") == 0
    graph = onnx.load(out, load_external_data=False).graph
    settings = [
        tuple(next(a.i for a in node.attribute if a.name == key) for key in ("bases", "group_size"))
        for node in graph.node
        if node.op_type == "BinaryBasisMatMul"
    ]
    assert settings.count((3, 32)) == 6
    assert settings.count((1, 64)) == 8


def test_a_layer_of_another_kind_is_named(tmp_path, capsys):
    folder = models.tiny_llama(tmp_path / "hf", tie_word_embeddings=True)
    assert export(folder, "-o", tmp_path / "m.onnx", "--include", "*embed_tokens") == 2
    assert "only linear layers can be quantised" in (line := capsys.readouterr().err.strip().splitlines()[-1])
    assert "got model.embed_tokens.weight (Embedding)" in line


def test_float_recipe_writes_a_plain_model(tmp_path):
    folder = models.tiny_llama(tmp_path / "hf")
    assert export(folder, "-o", tmp_path / "m.onnx", "--recipe", "float") == 0
    assert nodes(tmp_path / "m.onnx") == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gone.pt"], "no such file or folder"),
        (["in.onnx", "-o", "gone/m.onnx"], "output folder does not exist"),
        (["in.onnx", "-o", "in.onnx"], "output exists already (--force replaces it)"),
        (["in.onnx", "-o", "m.bin"], "a folder is made from a model of transformers"),
        (["in.onnx", "--bases", "9"], "--bases: bad number of bases; expected 1..8; got 9"),
        (["in.onnx", "--bases", "x"], "invalid int value"),
        (["in.onnx", "--group-size", "48"], "bad group size"),
        (["in.onnx", "--include", "fc3*"], "--include fc3*: no such layer; expected a name such as fc"),
        (["in.onnx", "--layer", "fc1_weight"], "cannot read a layer override"),
        (["in.onnx", "--layer", "fc1_weight:bases=9"], "bad number of bases"),
        (["in.onnx", "--exclude", "*"], "no linear layer to quantise"),
        (["nan.onnx"], "fc1_weight"),
        (["cut.onnx"], "not an ONNX model"),
        (["evil.onnx"], "external data leaves the model's folder"),
        (["domain.onnx"], "operator of an unknown domain"),
        (["emb.onnx", "--include", "table"], "only linear layers can be quantised; expected MatMul or Gemm with a"),
        (["in.onnx", "--device", "quantum"], "no such device"),
        (["in.onnx", "--unknown"], "unrecognized arguments"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    proto = onnx.load(onnx_model(tmp_path / "in.onnx"))
    (tmp_path / "cut.onnx").write_bytes((tmp_path / "in.onnx").read_bytes()[:-3000])
    weight = onnx.numpy_helper.to_array(proto.graph.initializer[0]).copy()
    weight[3, 4] = np.nan
    bad = onnx.ModelProto()
    bad.CopyFrom(proto)
    bad.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(weight, "fc1_weight"))
    onnx.save(bad, "nan.onnx")
    evil = onnx.ModelProto()
    evil.CopyFrom(proto)
    tensor = evil.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../secret")
    Path("evil.onnx").write_bytes(evil.SerializeToString())
    domain = onnx.ModelProto()
    domain.CopyFrom(proto)
    domain.graph.node[1].domain = "some.where"
    domain.opset_import.add(domain="some.where", version=1)
    onnx.save(domain, "domain.onnx")
    text = """<ir_version: 8, opset_import: ["": 17]>
      g (int64[b] i) => (float[b, 24] y) { e = Gather (table, i) y = MatMul (e, w) }"""
    embedding = onnx.parser.parse_model(text)
    embedding.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((9, 8), np.float32), "table"))
    embedding.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((8, 24), np.float32), "w"))
    onnx.save(embedding, "emb.onnx")
    before = sorted(p.name for p in tmp_path.iterdir())
    code = export(*arguments, *([] if "-o" in arguments else ["-o", "m.onnx"]))
    printed = capsys.readouterr().err.strip().splitlines()
    errors = [line for line in printed if line.startswith("error: ")]
    assert code == 2
    assert len(errors) == 1
    assert message in errors[0]
    left = sorted(p.name for p in tmp_path.iterdir() if p.suffix != ".qbb")
    assert left == before


def test_a_future_format_is_refused_by_name(tmp_path, capsys):
    source = onnx_model(tmp_path / "in.onnx")
    assert export(source, "-o", tmp_path / "m.onnx", *SMALL, "--no-verify") == 0
    proto = onnx.load(tmp_path / "m.onnx", load_external_data=False)
    node = next(n for n in proto.graph.node if n.op_type == "BinaryBasisMatMul")
    next(a for a in node.attribute if a.name == "format").i = 7
    del proto.metadata_props[:]  # its digest
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    text = tmp_path / "t.txt"
    text.write_text("hello")
    assert cli.main(["eval", str(tmp_path / "m.onnx"), "--text", str(text), "--tokenizer", "gone"]) == 2
    with pytest.raises(Exception, match=r"unknown format version .* expected 1; got 7"):
        session(tmp_path / "m.onnx")


def test_disagreement_is_an_exit_code(tmp_path, monkeypatch, capsys):
    from qbb_export import verification
    from qbb_export.cli.terminal import EXIT_DISAGREES

    monkeypatch.setattr(verification, "BODY_BOUND", 0.0)
    monkeypatch.setattr(verification, "run_file", lambda path, feeds, library: {"y": np.full((2, 24), float(library))})
    assert export(onnx_model(tmp_path / "in.onnx"), "-o", tmp_path / "m.onnx", *SMALL) == EXIT_DISAGREES
    assert "FAILED (y)" in capsys.readouterr().out


def test_library_verb(capsys):
    assert cli.main(["library"]) == 0
    assert Path(capsys.readouterr().out.strip()).is_file()
    assert cli.main(["library", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["format_version"] == 1


def test_large_layers_are_verified_by_their_first_rows(tmp_path, monkeypatch, capsys):
    from qbb_export import verification

    monkeypatch.setattr(verification, "_BODY_MAX_WEIGHTS", 100)
    monkeypatch.setattr(verification, "_CHECKED_ROWS", 20)
    for layout in ("tiled", "rows"):
        out = tmp_path / f"{layout}.onnx"
        assert export(onnx_model(tmp_path / "in.onnx"), "-o", out, "--include", "*", "--layout", layout, *SMALL) == 0
        printed = capsys.readouterr().out
        assert "library / float64, first rows" in printed
        assert "body / float64, first rows" in printed


def test_each_layer_of_a_large_node_is_verified(tmp_path, monkeypatch):
    """By the first rows of its own; initializers are large enough to be mapped from a file."""
    from qbb_export import verification

    text = """<ir_version: 8, opset_import: ["": 17]>
      g (float[b, 64] x) => (float[b, 256] p, float[b, 128] q, float[b, 7] r) {
        p = MatMul (x, u) q = MatMul (x, v) c = MatMul (x, w) r = Add (c, bias) }"""
    proto = onnx.parser.parse_model(text)
    rng = np.random.default_rng(3)
    for name, shape in (("u", (64, 256)), ("v", (64, 128)), ("w", (64, 7)), ("bias", (7,))):
        array = rng.standard_normal(shape).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    onnx.save(proto, tmp_path / "in.onnx")
    monkeypatch.setattr(verification, "_CHECKED_ROWS", 20)
    for layout in ("tiled", "rows"):
        out = tmp_path / f"{layout}.onnx"
        assert export(tmp_path / "in.onnx", "-o", out, "--include", "*", "--layout", layout, *SMALL) == 0
        assert nodes(out) == ["u+v+w"]
        seen = verification.check_layers(out)
        assert [row.output for row in seen[::2]] == ["u+v+w[0:20]", "u+v+w[256:276]", "u+v+w[384:391]"]
        assert all(row.ok for row in seen)
        (node,) = binary_basis_nodes(read_graph(out))
        whole = [value.const_value.numpy().copy() for value in node.inputs[1:]]
        for start, stop in ((0, 20), (256, 276), (384, 391)):
            _, arrays, spec = verification._rows_of(node, start, stop)
            expected = dense_weight(*whole[:3], node_spec(node))[start:stop]
            assert np.array_equal(dense_weight(*arrays[:3], spec), expected)
            assert np.array_equal(arrays[3], whole[3][start:stop])


def test_an_onnx_model_whose_inputs_we_cannot_make_up(tmp_path, capsys):
    """Indices 0 and 1 only fit here by luck: the table has one row. The layers are verified one by one instead."""
    text = """<ir_version: 8, opset_import: ["": 17]>
      g (int64[b] i) => (float[b, 24] y) { e = Gather (table, i) y = MatMul (e, w) }"""
    proto = onnx.parser.parse_model(text)
    rng = np.random.default_rng(2)
    for name, shape in (("table", (1, 64)), ("w", (64, 24))):
        array = rng.standard_normal(shape).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    onnx.save(proto, tmp_path / "in.onnx")
    assert export(tmp_path / "in.onnx", "-o", tmp_path / "m.onnx", *SMALL) == 0
    assert "library / float64, first rows" in capsys.readouterr().out
