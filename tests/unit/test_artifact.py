import hashlib
import os

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qbb_export import artifact
from qbb_export.errors import QbbError
from qbb_export.runtimes import gate
from tests.passes.graphs import binarized, graph

WEIGHT = np.arange(64 * 64, dtype=np.float32).reshape(64, 64) / 1000


def tiny(scale: float = 1.0) -> ir.Model:
    return graph("g (float[b, 64] x) => (float[b, 64] y) { y = MatMul (x, w) }", {"w": WEIGHT * np.float32(scale)})


def files(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def data_file(folder):
    (data,) = folder.glob("*.data")
    return data


def test_a_small_model_has_no_data_file(tmp_path):
    artifact.save(graph("g (float[b, 4] x) => (float[b, 4] y) { y = Relu (x) }"), tmp_path / "m.onnx")
    assert list(files(tmp_path)) == ["m.onnx"]


def test_data_file_bears_its_digest_and_is_aligned(tmp_path):
    written = artifact.save(tiny(), tmp_path / "m.onnx")
    data = data_file(tmp_path)
    assert artifact.data_digest(data.name) == hashlib.sha256(data.read_bytes()).hexdigest()
    assert written == sum(len(content) for content in files(tmp_path).values())
    model = artifact.read_graph(tmp_path / "m.onnx")
    tensor = model.graph.initializers["w"].const_value
    assert isinstance(tensor, ir.ExternalTensor)
    assert tensor.offset % 4096 == 0
    assert np.array_equal(tensor.numpy(), WEIGHT)


def test_small_tensors_stay_in_the_graph_beside_large_ones(tmp_path):
    weights = {"w": WEIGHT, "c": np.ones(64, np.float32)}
    model = graph("g (float[b, 64] x) => (float[b, 64] y) { h = MatMul (x, w) y = Add (h, c) }", weights)
    artifact.save(model, tmp_path / "m.onnx")
    read = gate.check(tmp_path / "m.onnx").graph.initializers
    assert [isinstance(read[name].const_value, ir.ExternalTensor) for name in ("w", "c")] == [True, False]
    assert all(np.array_equal(read[name].const_value.numpy(), array) for name, array in weights.items())


def test_a_data_file_with_two_names_is_refused(tmp_path):
    artifact.save(tiny(), tmp_path / "m.onnx")
    os.link(data_file(tmp_path), tmp_path / "second")
    with pytest.raises(
        QbbError, match=r"tensor 'w': external data has several names; expected a copy of .*; got 2 hard"
    ):
        gate.check(tmp_path / "m.onnx")
    (tmp_path / "second").unlink()
    gate.check(tmp_path / "m.onnx")


def test_data_files_of_other_programs_have_no_digest(tmp_path):
    artifact.save(tiny(), tmp_path / "m.onnx")
    assert artifact.is_sealed(artifact.read_graph(tmp_path / "m.onnx"))
    proto = onnx.load(tmp_path / "m.onnx", load_external_data=False)
    data_file(tmp_path).rename(tmp_path / "weights.bin")
    set_entry(external(proto), "location", "weights.bin")
    rewrite(proto, tmp_path / "m.onnx")
    assert not artifact.is_sealed(gate.check(tmp_path / "m.onnx"))


def test_saving_over_a_model_leaves_no_old_data(tmp_path):
    artifact.save(tiny(), tmp_path / "m.onnx")
    first = data_file(tmp_path)
    other = tmp_path / f"m2.{'0' * 64}.data"
    other.write_bytes(b"another model's")
    artifact.save(tiny(2.0), tmp_path / "m.onnx")
    assert not first.exists()
    assert other.exists()
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".data", ".data", ".onnx"]


def test_saving_is_deterministic(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        artifact.save(tiny(), tmp_path / name / "m.onnx")
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_a_failed_write_keeps_the_old_model(tmp_path):
    artifact.save(tiny(), tmp_path / "m.onnx")
    before = files(tmp_path)
    model = tiny(2.0)

    def fail():
        raise OSError(28, "No space left on device")

    value = model.graph.initializers["w"]
    value.const_value = ir.LazyTensor(fail, dtype=ir.DataType.FLOAT, shape=value.shape, name="w")
    with pytest.raises(QbbError, match=r"cannot write the model; got No space left on device"):
        artifact.save(model, tmp_path / "m.onnx")
    assert files(tmp_path) == before


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_data_of_a_graph_that_was_not_written_goes(tmp_path, monkeypatch, error):
    artifact.save(tiny(), tmp_path / "m.onnx")
    before = files(tmp_path)

    def fail(path, data):
        raise error

    monkeypatch.setattr(artifact, "write_whole", fail)
    with pytest.raises((QbbError, KeyboardInterrupt)) as caught:
        artifact.save(tiny(2.0), tmp_path / "m.onnx")
    assert isinstance(caught.value, QbbError) == isinstance(error, OSError)
    assert files(tmp_path) == before


def test_what_a_killed_save_left_is_swept(tmp_path):
    leftover = tmp_path / ".m.onnx.data.tmp.abc"
    leftover.mkdir()
    (leftover / "half").touch()
    artifact.save(tiny(), tmp_path / "m.onnx")
    assert not leftover.exists()


def test_a_graph_without_its_digest_on_demand(tmp_path):
    artifact.save(tiny(), tmp_path / "m.onnx")
    artifact.save(artifact.read_graph(tmp_path / "m.onnx"), tmp_path / "n.onnx", seal=False)
    assert not artifact.is_sealed(gate.check(tmp_path / "n.onnx"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("m.txt", r"wrong suffix; expected a path ending in \.onnx; got \.txt"),
        ("missing/m.onnx", r"output folder does not exist"),
        ("folder.onnx", r"output is a folder"),
        ("old.onnx", r"output exists already \(--force replaces it\)"),
    ],
)
def test_outputs_that_are_refused(tmp_path, name, message):
    (tmp_path / "folder.onnx").mkdir()
    (tmp_path / "old.onnx").write_bytes(b"")
    with pytest.raises(QbbError, match=message):
        artifact.check_writable(tmp_path / name, force=False)
    artifact.check_writable(tmp_path / "old.onnx", force=True)


def saved(folder) -> "onnx.ModelProto":
    ours, _ = binarized(tiny(), group_size=32)
    for name, value in ours.graph.initializers.items():
        value.name = name
    artifact.save(ours, folder / "m.onnx")
    return onnx.load(folder / "m.onnx", load_external_data=False)


def rewrite(proto, path):
    """Another program's file: it has no digest of its own."""
    del proto.metadata_props[:]
    path.write_bytes(proto.SerializeToString())


def external(proto):
    return next(t for t in proto.graph.initializer if t.external_data)


def set_entry(tensor, key, value):
    for entry in tensor.external_data:
        if entry.key == key:
            entry.value = value
            return
    tensor.external_data.add(key=key, value=value)


@pytest.mark.parametrize(
    "location", ["../secret.data", "/etc/passwd", "sub/secret.data", "..", ".", "", "link.data", "\0"]
)
def test_external_data_outside_the_folder_is_refused(tmp_path, location):
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    for secret in (tmp_path / "secret.data", folder / "sub" / "secret.data"):
        secret.write_bytes(bytes(1 << 16))
    (folder / "link.data").symlink_to(tmp_path / "secret.data")
    artifact.save(tiny(), folder / "m.onnx")
    proto = onnx.load(folder / "m.onnx", load_external_data=False)
    set_entry(external(proto), "location", location)
    rewrite(proto, folder / "m.onnx")
    with pytest.raises(QbbError, match=r"tensor 'w': external data leaves the model's folder"):
        gate.check(folder / "m.onnx")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("location", "gone.data", "external data is missing"),
        ("offset", "4096", "external data is too short"),
        ("offset", "-4096", "not an ONNX model|external data is too short"),
        ("length", str(2**40), "external data is too short"),
        ("type", "0", "tensor 'w': external data has no type"),
    ],
)
def test_external_data_that_is_not_there_is_refused(tmp_path, key, value, message):
    artifact.save(tiny(), tmp_path / "m.onnx")
    proto = onnx.load(tmp_path / "m.onnx", load_external_data=False)
    if key == "type":
        external(proto).data_type = int(value)
    else:
        set_entry(external(proto), key, value)
    rewrite(proto, tmp_path / "m.onnx")
    with pytest.raises(QbbError, match=message):
        gate.check(tmp_path / "m.onnx")


@pytest.mark.parametrize(("offset", "length"), [(-4096, 4096), (0, -4096)])
def test_negative_numbers_are_refused_by_us_too(tmp_path, offset, length):
    """onnx_ir refuses them while it reads a file, with some message; another release may not."""
    (tmp_path / "w.data").write_bytes(bytes(8192))
    tensor = ir.ExternalTensor("w.data", offset, length, ir.DataType.FLOAT, shape=ir.Shape([32, 32]), name="w")
    with pytest.raises(QbbError, match=r"tensor 'w': external data is too short"):
        artifact._check_external(tensor, tmp_path / "m.onnx")


def test_a_flipped_bit_in_the_weights_is_found(tmp_path):
    artifact.save(tiny(), tmp_path / "m.onnx")
    gate.check(tmp_path / "m.onnx")
    data = data_file(tmp_path)
    content = bytearray(data.read_bytes())
    content[5] ^= 1
    data.write_bytes(content)
    with pytest.raises(QbbError, match=r"weights are damaged; expected SHA-256"):
        gate.check(tmp_path / "m.onnx")
    gate.check(tmp_path / "m.onnx", data=False)


def test_the_graph_carries_its_own_digest(tmp_path):
    artifact.save(tiny(), tmp_path / "m.onnx")
    artifact.save(artifact.read_graph(tmp_path / "m.onnx"), tmp_path / "again.onnx")  # sealed anew, once
    content = (tmp_path / "m.onnx").read_bytes()
    proto = onnx.load_model_from_string(content)
    ((key, digest),) = [(entry.key, entry.value) for entry in proto.metadata_props]
    assert key == artifact.SEAL_KEY
    assert hashlib.sha256(content.replace(digest.encode(), b"0" * 64)).hexdigest() == digest
    gate.check(tmp_path / "again.onnx")


def test_a_graph_changed_by_another_program_is_refused_until_the_metadata_goes(tmp_path):
    proto = saved(tmp_path)
    proto.graph.node[0].doc_string = "edited"
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(QbbError, match=r"file is damaged, or was changed .*; expected qbb\.sha256 [0-9a-f]{64}; got"):
        gate.check(tmp_path / "m.onnx")
    gate.check(tmp_path / "m.onnx", data=False)
    rewrite(proto, tmp_path / "m.onnx")
    gate.check(tmp_path / "m.onnx")


@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"not a protobuf", b"\x08\x0a"])
def test_files_that_are_no_models(tmp_path, content):
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    with pytest.raises(QbbError, match=r"m\.onnx: not an ONNX model"):
        gate.check(path)


@pytest.mark.parametrize("suffix", [".ort", ".ORT"])
def test_a_file_for_another_parser_of_onnx_runtime(tmp_path, suffix):
    """The suffix makes ONNX Runtime read it with a parser that the gate knows nothing of."""
    artifact.save(tiny(), tmp_path / "m.onnx")
    (tmp_path / "m.onnx").rename(tmp_path / f"m{suffix}")
    with pytest.raises(QbbError, match=rf"wrong suffix; expected an \.onnx file; got {suffix}"):
        gate.check(tmp_path / f"m{suffix}")


def test_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(QbbError, match="no such file"):
        gate.check(tmp_path / "m.onnx")
    with pytest.raises(QbbError, match=r"no such file; expected an \.onnx file; got a folder"):
        gate.check(tmp_path)


def node_attribute(proto, name):
    (node,) = [n for n in proto.graph.node if n.op_type == "BinaryBasisMatMul"]
    return next(a for a in node.attribute if a.name == name)


def change_format(proto):
    node_attribute(proto, "format").i = 2


def change_k(proto):
    node_attribute(proto, "K").i = 32


def drop_attribute(proto):
    (node,) = [n for n in proto.graph.node if n.op_type == "BinaryBasisMatMul"]
    node.attribute.remove(node_attribute(proto, "bases"))


def float_attribute(proto):
    attribute = node_attribute(proto, "bases")
    attribute.ClearField("i")
    attribute.type, attribute.f = onnx.AttributeProto.FLOAT, 2.0


def rename_operator(proto):
    (node,) = [n for n in proto.graph.node if n.op_type == "BinaryBasisMatMul"]
    node.op_type = "BinaryBasisConv"


def foreign_domain(proto):
    proto.graph.node.add(op_type="Evil", domain="some.where", input=["x"], output=["z"], name="evil")
    proto.opset_import.add(domain="some.where", version=1)


def drop_body(proto):
    del proto.functions[:]


def change_body(proto):
    node = next(n for n in proto.functions[0].node if n.op_type == "ReduceSum")
    node.op_type = "ReduceMax"


def break_body(proto):
    proto.functions[0].node[0].attribute[0].type = onnx.AttributeProto.UNDEFINED


def no_graph_in_an_attribute(proto):
    attribute = proto.graph.node[0].attribute.add()
    attribute.name, attribute.type = "body", onnx.AttributeProto.GRAPH


def weight_from_input(proto):
    (node,) = [n for n in proto.graph.node if n.op_type == "BinaryBasisMatMul"]
    proto.graph.input.append(onnx.helper.make_tensor_value_info(node.input[1], onnx.TensorProto.UINT32, [2, 4, 2, 16]))


def two_layouts(proto):
    (node,) = [n for n in proto.graph.node if n.op_type == "BinaryBasisMatMul"]
    other = proto.graph.node.add()
    other.CopyFrom(node)
    other.name, other.output[0] = "other", "other"
    next(a for a in other.attribute if a.name == "layout").i = 0
    for name, shape in (("B", [2, 64, 2]), ("S", [2, 64, 2]), ("Z", [64, 2])):
        tensor = onnx.TensorProto(name=f"rows_{name}", dims=shape)
        dtype = {"B": np.uint32, "S": np.float16, "Z": np.float32}[name]
        tensor.CopyFrom(onnx.numpy_helper.from_array(np.zeros(shape, dtype), tensor.name))
        proto.graph.initializer.append(tensor)
        other.input["XBSZ".index(name)] = tensor.name


def with_functions(proto, bodies):
    """Functions f::0, f::1, … of which the graph calls the first; each body lists those that it calls."""
    for number, called in enumerate(bodies):
        steps = [onnx.helper.make_node(str(c), [f"v{i}"], [f"v{i + 1}"], domain="f") for i, c in enumerate(called)]
        steps = steps or [onnx.helper.make_node("Relu", ["v0"], ["v1"])]
        function = onnx.helper.make_function(
            "f", str(number), ["v0"], [f"v{len(steps)}"], steps, [onnx.helper.make_opsetid("", 20)]
        )
        function.opset_import.add(domain="f", version=1)
        proto.functions.append(function)
    proto.graph.node.add(op_type="0", domain="f", input=["x"], output=["called"], name="caller")
    proto.opset_import.add(domain="f", version=1)


def calls_itself(proto):
    with_functions(proto, [[1], [0]])


def too_deep(proto):
    with_functions(proto, [[i + 1] for i in range(150)] + [[]])


def billion_laughs(proto):
    with_functions(proto, [[i + 1, i + 1] for i in range(40)] + [[]])


def newer_opset(proto):
    next(o for o in proto.opset_import if o.domain == "qbb").version = 2


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change_format, r"node '.*': .*unknown format version .* got 2"),
        (change_k, r"node '.*': .*(wrong shape of B|bad group_size)"),
        (drop_attribute, r"node '.*': wrong attributes"),
        (float_attribute, r"node '.*': attribute bases is no integer; expected int; got FLOAT"),
        (rename_operator, r"node '.*': unknown operator; expected BinaryBasisMatMul; got qbb::BinaryBasisConv"),
        (foreign_domain, r"node 'evil': operator of an unknown domain; .* got some.where::Evil"),
        (drop_body, r"function body is missing"),
        (change_body, r"function body is not ours"),
        (break_body, r"function body is not ours"),
        (no_graph_in_an_attribute, r"not an ONNX model|node '.*': wrong attributes"),
        (weight_from_input, r"node '.*': B is not constant"),
        (newer_opset, r"unknown version of our operators; expected 1; got 2"),
        (two_layouts, r"one file holds one layout; expected one layout; got \[0, 1\]"),
        (calls_itself, r"function 'f::.': functions are nested too deeply, or call themselves"),
        (too_deep, r"function 'f::100': functions are nested too deeply, or call themselves; expected at most 100"),
        (billion_laughs, r"functions inlined: too many nodes; expected at most 1000000; got 1099511627777"),
    ],
)
def test_damaged_nodes_are_refused_by_name(tmp_path, damage, message):
    proto = saved(tmp_path)
    gate.check(tmp_path / "m.onnx")
    damage(proto)
    rewrite(proto, tmp_path / "m.onnx")
    with pytest.raises(QbbError, match=message) as caught:
        gate.check(tmp_path / "m.onnx")
    assert "\n" not in str(caught.value)


def test_a_graph_of_2_gib_is_refused_unread(tmp_path, monkeypatch):
    artifact.save(tiny(), tmp_path / "m.onnx")
    monkeypatch.setattr(artifact, "_MAX_GRAPH_BYTES", (tmp_path / "m.onnx").stat().st_size)
    with pytest.raises(QbbError, match=r"graph is too large; expected < 2 GiB; got \d+ bytes"):
        gate.check(tmp_path / "m.onnx")


def test_weights_in_attributes_are_checked_too(tmp_path):
    tensor = onnx.TensorProto(name="t", data_type=1, dims=[4], data_location=onnx.TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="gone.data")
    proto = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 20]> g (float[4] x) => (float[4] y) {y = Neg (x)}'
    )
    proto.graph.node.append(onnx.helper.make_node("Constant", [], ["c"], value=tensor))
    rewrite(proto, tmp_path / "m.onnx")
    with pytest.raises(QbbError, match=r"external data is missing; expected a file gone\.data"):
        gate.check(tmp_path / "m.onnx")


def test_what_onnx_ir_cannot_follow_is_no_model(tmp_path, monkeypatch):
    """Any of its many exceptions: a damaged file must not show a traceback."""
    artifact.save(tiny(), tmp_path / "m.onnx")

    def fail(*_):
        raise RuntimeError("parts that do not fit")

    monkeypatch.setattr("qbb_export.passes.verify.binary_basis_nodes", fail)
    with pytest.raises(QbbError, match=r"m\.onnx: not an ONNX model; got RuntimeError: parts that do not fit"):
        gate.check(tmp_path / "m.onnx")


def test_a_folder_without_write_permission(tmp_path, monkeypatch):
    # Root may write anywhere, so the system's answer is made up: what is tested is that it is asked for and told.
    monkeypatch.setattr(os, "access", lambda path, mode: not (path == tmp_path and mode == os.W_OK))
    with pytest.raises(QbbError, match="not writable"):
        artifact.check_writable(tmp_path / "m.onnx", force=False)
