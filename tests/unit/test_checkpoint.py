"""GPTQ and AWQ checkpoints, packed here bit by bit, come back as the floats that they stand for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from qbb_export.checkpoint import QuantizedCheckpoint
from qbb_export.errors import QbbError

Array = np.ndarray[Any, Any]
LAYER = "model.layers.0.self_attn.q_proj"


# --- an independent packer -------------------------------------------------------------------------------------------


def bits_to_words(values: list[int], bits: int) -> list[int]:
    """One stream of bits, lowest first, cut into words of 32: GPTQ's packing for any number of bits."""
    assert len(values) * bits % 32 == 0
    words = [0] * (len(values) * bits // 32)
    for i, value in enumerate(values):
        for b in range(bits):
            place = i * bits + b
            words[place // 32] |= (value >> b & 1) << (place % 32)
    return words


def pack_gptq(values: Array, bits: int, axis: int) -> Array:
    lines = values if axis == 1 else values.T
    packed = np.array([bits_to_words(line.tolist(), bits) for line in lines], dtype=np.uint32).view(np.int32)
    return np.ascontiguousarray(packed if axis == 1 else packed.T)


def pack_awq(values: Array) -> Array:
    """``WQLinear_GEMM``: the i-th lowest nibble of a word holds column ``order[i]`` of its eight."""
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    packed = np.zeros((values.shape[0], values.shape[1] // 8), dtype=np.uint32)
    for row in range(packed.shape[0]):
        for word in range(packed.shape[1]):
            packed[row, word] = sum(int(values[row, 8 * word + order[i]]) << (4 * i) for i in range(8))
    return packed.view(np.int32)


class Layer:
    """Random codes, zero points, scales and groups of one layer, and its tensors."""

    def __init__(
        self, seed: int, K: int, N: int, bits: int, size: int, *, act_order: bool = False, low: int = 1
    ) -> None:
        rng = np.random.default_rng(seed)
        self.bits, self.group_size = bits, size
        groups = 1 if size == -1 else -(-K // size)
        self.codes = rng.integers(0, 2**bits, (K, N))
        self.zeros = rng.integers(low, 2**bits, (groups, N))
        self.scales = (rng.random((groups, N)) * 0.02 + 1e-4).astype(np.float16)
        self.group = np.arange(K) // (K if size == -1 else size)
        self.act_order = act_order
        if act_order:
            self.group = rng.permutation(self.group)

    @property
    def weight(self) -> Array:
        """float32 ``[N, K]``: exact, 9 bits of a difference times 11 of a scale."""
        zeros, scales = self.zeros[self.group].astype(np.float64), self.scales[self.group].astype(np.float64)
        return (scales * (self.codes - zeros)).T.astype(np.float32)

    def gptq(self, stored_zeros: Array | None = None) -> dict[str, Array]:
        zeros = self.zeros if stored_zeros is None else stored_zeros
        return {
            f"{LAYER}.qweight": pack_gptq(self.codes, self.bits, 0),
            f"{LAYER}.qzeros": pack_gptq(zeros, self.bits, 1),
            f"{LAYER}.scales": self.scales,
            f"{LAYER}.g_idx": self.group.astype(np.int32),
        }

    def awq(self) -> dict[str, Array]:
        packed = {"qweight": pack_awq(self.codes), "qzeros": pack_awq(self.zeros), "scales": self.scales}
        return {f"{LAYER}.{part}": tensor for part, tensor in packed.items()}


def config(method: str = "gptq", **said: Any) -> dict[str, Any]:
    default: dict[str, Any] = {"bits": 4, "group_size": 32, "quant_method": method}
    default |= {"version": "gemm"} if method == "awq" else {"checkpoint_format": "gptq_v2", "sym": False}
    return {"model_type": "llama", "quantization_config": {k: v for k, v in (default | said).items() if v != "absent"}}


def folder_of(path: Path, said: dict[str, Any], tensors: dict[str, Array], name: str = "model.safetensors") -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(said))
    save_file(tensors, path / name)
    return path


def read(path: Path) -> Array:
    return QuantizedCheckpoint.open(path).weight(f"{LAYER}.weight")


# --- what is read ----------------------------------------------------------------------------------------------------

SIZES = st.sampled_from([-1, 16, 32, 40, 128])
ONCE = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@ONCE
@given(
    seed=st.integers(0, 10**6),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 2)),
    bits=st.sampled_from([2, 3, 4, 8]),
    size=SIZES,
    act_order=st.booleans(),
    first_format=st.booleans(),
)
def test_gptq(
    tmp_path: Path, seed: int, shape: tuple[int, int], bits: int, size: int, act_order: bool, first_format: bool
) -> None:
    layer = Layer(seed, 32 * shape[0], 32 * shape[1], bits, size, act_order=act_order, low=int(first_format))
    said = config(
        bits=bits, group_size=size, desc_act=act_order, checkpoint_format="gptq" if first_format else "gptq_v2"
    )
    path = folder_of(tmp_path, said, layer.gptq(layer.zeros - first_format))
    got = read(path)
    assert got.dtype == np.float32 and got.flags.c_contiguous
    assert np.array_equal(got, layer.weight)


@ONCE
@given(st.integers(0, 10**6), st.integers(1, 130), st.integers(1, 6), SIZES)
def test_awq(tmp_path: Path, seed: int, K: int, words: int, size: int) -> None:
    layer = Layer(seed, K, 8 * words, 4, size, low=0)
    assert np.array_equal(read(folder_of(tmp_path, config("awq", group_size=size), layer.awq())), layer.weight)


def test_widths_that_are_no_multiple_of_32(tmp_path: Path) -> None:
    """4-bit values fill whole words at multiples of 8 already, 8-bit values of 4, 2-bit values of 16."""
    for bits, K, N in ((4, 40, 24), (8, 36, 20), (2, 48, 16)):
        layer = Layer(bits, K, N, bits, 16)
        path = folder_of(tmp_path / str(bits), config(bits=bits, group_size=16), layer.gptq())
        assert np.array_equal(read(path), layer.weight)


def test_three_bits_cross_words_as_autogptq_packs_them(tmp_path: Path) -> None:
    """10 values, 2 + 1 bits of one, 10 values, 1 + 2 bits of one, 10 values."""
    layer = Layer(1, 32, 32, 3, -1)
    words = layer.gptq()[f"{LAYER}.qweight"].view(np.uint32)
    for n in range(32):
        v = [int(value) for value in layer.codes[:, n]]
        first = sum(v[j] << (3 * j) for j in range(10)) | (v[10] & 3) << 30
        second = v[10] >> 2 | sum(v[11 + j] << (3 * j + 1) for j in range(10)) | (v[21] & 1) << 31
        third = v[21] >> 1 | sum(v[22 + j] << (3 * j + 2) for j in range(10))
        assert words[:, n].tolist() == [first, second, third]
    assert np.array_equal(read(folder_of(tmp_path, config(bits=3, group_size=-1), layer.gptq())), layer.weight)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("seed", range(3))
def test_zero_points_that_gptqmodel_lowered_word_by_word(tmp_path: Path, bits: int, seed: int) -> None:
    """Its one subtraction borrows from the neighbour of a zero point that is 0, and wraps at the end of the word."""
    layer = Layer(seed, 64, 64, bits, 32, low=0)
    layer.zeros[0, :5], layer.zeros[1, -3:] = 0, 0
    tensors = layer.gptq()
    ones = int("1".zfill(bits) * (32 // bits), 2)
    for word in np.nditer(tensors[f"{LAYER}.qzeros"].view(np.uint32), op_flags=[["readwrite"]]):
        word[...] = (int(word) - ones) % 2**32
    said = config(bits=bits, checkpoint_format="gptq", meta={"quantizer": ["gptqmodel:5.8.0"]})
    assert np.array_equal(read(folder_of(tmp_path, said, tensors)), layer.weight)


def test_three_bit_zero_points_wrap_one_by_one(tmp_path: Path) -> None:
    layer = Layer(3, 64, 64, 3, 32, low=0)
    layer.zeros[0, :5], layer.zeros[1, -3:] = 0, 0
    said = config(bits=3, checkpoint_format="gptq")
    assert np.array_equal(read(folder_of(tmp_path, said, layer.gptq((layer.zeros - 1) % 8))), layer.weight)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("layout", ["gptq", "gptq_v2"])
def test_symmetric_zero_points_are_known_however_they_are_stored(tmp_path: Path, bits: int, layout: str) -> None:
    layer = Layer(4, 64, 64, bits, 32)
    layer.zeros[:] = 2 ** (bits - 1)
    files = {"as they are": layer.gptq(), "one too low": layer.gptq(layer.zeros - 1)}
    if bits == 3:  # as GPTQModel wrote them until pull request 2763: constants that fit no packing
        files["gptqmodel"] = layer.gptq()
        words = files["gptqmodel"][f"{LAYER}.qzeros"].view(np.uint32)
        for column in range(words.shape[1]):
            words[:, column] -= np.uint32((0x24924924, 0x92492492, 0x49249249)[column % 3])
    for name, tensors in files.items():
        said = config(bits=bits, checkpoint_format=layout, sym=True, meta={"quantizer": "gptqmodel:2.0.0"})
        assert np.array_equal(read(folder_of(tmp_path / name, said, tensors)), layer.weight), name


def test_zero_points_that_vary_are_read_whatever_sym_says(tmp_path: Path) -> None:
    layer = Layer(5, 64, 64, 4, 32)
    assert np.array_equal(read(folder_of(tmp_path, config(sym=True), layer.gptq())), layer.weight)


def test_three_bits_of_gptqmodel_in_the_first_format_are_refused(tmp_path: Path) -> None:
    layer = Layer(6, 32, 32, 3, 32)
    said = config(bits=3, checkpoint_format="gptq", meta={"quantizer": ["optimum:1.24.0", "gptqmodel:4.2.5"]})
    with pytest.raises(QbbError, match=r"q_proj: 3-bit zero points of the format gptq cannot be told apart; expected"):
        read(folder_of(tmp_path, said, layer.gptq(layer.zeros - 1)))


@pytest.mark.parametrize("index", ["absent", "zeros"])
def test_without_a_useful_g_idx_inputs_are_in_order(tmp_path: Path, index: str) -> None:
    layer = Layer(7, 96, 32, 4, 32)
    tensors = layer.gptq()
    tensors[f"{LAYER}.g_idx"][:] = 0
    if index == "absent":
        del tensors[f"{LAYER}.g_idx"]
    assert np.array_equal(read(folder_of(tmp_path, config(), tensors)), layer.weight)


def test_config_as_old_and_new_tools_write_it(tmp_path: Path) -> None:
    layer = Layer(8, 64, 32, 4, 32)
    first, second = layer.gptq(layer.zeros - 1), layer.gptq()
    excluded = {"-:.*mlp.*": {}}
    for said, tensors in (
        (config(checkpoint_format="absent", sym="absent"), first),
        (config(checkpoint_format="absent", format="gptq"), first),
        (config(checkpoint_format="GPTQ"), first),
        (config(checkpoint_format=None, format="gptq_v2", dynamic=excluded), second),
        (config("awq", version="GEMM"), layer.awq()),
        (config("awq", version="absent", format="gemm"), layer.awq()),
        (config("awq", version="absent"), layer.awq()),
    ):
        assert np.array_equal(read(folder_of(tmp_path, said, tensors)), layer.weight)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_scales_of_other_types(tmp_path: Path, dtype: Any) -> None:
    layer = Layer(9, 64, 32, 4, 32)
    layer.scales = layer.scales.astype(dtype)
    # One rounding at a time: a float32 scale times a difference of 5 bits.
    expected = (layer.scales.astype(np.float32)[layer.group] * (layer.codes - layer.zeros[layer.group])).T
    got = read(folder_of(tmp_path, config(), layer.gptq()))
    assert np.array_equal(got, expected.astype(np.float32))


def test_more_outputs_than_are_worked_on_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Layer(10, 32, 96, 4, 16)
    for method, tensors in (("gptq", layer.gptq()), ("awq", layer.awq())):
        path = folder_of(tmp_path / method, config(method, group_size=16), tensors)
        monkeypatch.setattr("qbb_export.checkpoint.reader.BLOCK", 40)
        assert np.array_equal(read(path), layer.weight)


def test_names_and_tensors_that_are_not_quantised(tmp_path: Path) -> None:
    layer = Layer(11, 32, 32, 4, 32)
    plain = {
        "model.embed_tokens.weight": np.arange(6, dtype=np.float16).reshape(2, 3),
        "model.norm.weight": np.array([1.5, -2.0], dtype=ml_dtypes.bfloat16),
        f"{LAYER}.bias": np.arange(32, dtype=np.float32),
    }
    checkpoint = QuantizedCheckpoint.open(folder_of(tmp_path, config(), layer.gptq() | plain))
    assert checkpoint.names() == tuple(sorted([*plain, f"{LAYER}.weight"]))
    for name, tensor in plain.items():
        got = checkpoint.weight(name)
        assert got.dtype == np.float32 and np.array_equal(got, tensor.astype(np.float32))
    for unknown in ("lm_head.weight", LAYER, f"{LAYER}.qweight.weight", ""):
        with pytest.raises(QbbError, match="no such parameter in the checkpoint"):
            checkpoint.weight(unknown)


def sharded(path: Path, layer: Layer, count: int = 3) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config()))
    weight_map: dict[str, str] = {}
    tensors = layer.gptq()
    for i in range(count):  # the parts of one layer may lie in different files
        name = f"gptq_model-4bit-32g-{i + 1:05d}-of-{count:05d}.safetensors"
        part = dict(list(tensors.items())[i::count])
        save_file(part, path / name)
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (path / "gptq_model-4bit-32g.safetensors.index.json").write_text(json.dumps(index))
    return path


def test_sharded(tmp_path: Path) -> None:
    layer = Layer(12, 64, 32, 4, 32)
    path = sharded(tmp_path, layer)
    assert np.array_equal(read(path), layer.weight)
    folder_of(path, config(), Layer(13, 64, 32, 4, 32).gptq())  # model.safetensors does not count beside an index
    assert np.array_equal(read(path), layer.weight)


def test_model_safetensors_counts_among_several(tmp_path: Path) -> None:
    layer = Layer(14, 64, 32, 4, 32)
    folder_of(tmp_path, config(), {"x": np.zeros(1)}, "adapter.safetensors")
    assert np.array_equal(read(folder_of(tmp_path, config(), layer.gptq())), layer.weight)


def test_needs_no_torch(tmp_path: Path) -> None:
    path = folder_of(tmp_path, config(), {"w": np.array([1.5, 2.0], dtype=ml_dtypes.bfloat16)})
    code = (
        "import sys; from pathlib import Path; from qbb_export.checkpoint import QuantizedCheckpoint;"
        "assert QuantizedCheckpoint.open(Path(sys.argv[1])).weight('w').tolist() == [1.5, 2.0];"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=True)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"model_type": "llama"}, "not a quantised checkpoint; expected quantization_config"),
        ([], "cannot read; expected a JSON object; got list"),
        (config("bitsandbytes"), "unknown quant_method; expected gptq or awq; got bitsandbytes"),
        (config(quant_method="absent"), "unknown quant_method; expected gptq or awq"),
        (config(checkpoint_format="marlin"), "unknown checkpoint_format; expected gptq or gptq_v2; got marlin"),
        (config("awq", version="gemv"), "unknown version; expected gemm; got gemv"),
        (config(bits=5), "unknown bits; expected one of 2, 3, 4, 8; got 5"),
        (config(bits="absent"), "unknown bits; expected one of 2, 3, 4, 8"),
        (config(bits=True), "unknown bits"),
        (config("awq", bits=8), "unknown bits; expected one of 4; got 8"),
        (config(group_size=0), "bad group_size; expected -1 or a positive number; got 0"),
        (config(group_size=-2), "bad group_size"),
        (config(group_size="absent"), "bad group_size"),
        (config(dynamic={"+:.*": {"bits": 8}}), "settings of single layers are not supported; got dynamic:"),
    ],
)
def test_config_is_checked(tmp_path: Path, said: Any, message: str) -> None:
    path = folder_of(tmp_path, said, Layer(0, 32, 32, 4, 32).gptq())
    with pytest.raises(QbbError) as caught:
        QuantizedCheckpoint.open(path)
    assert str(caught.value).startswith(f"{path / 'config.json'}: {message}")


def part_of(tensors: dict[str, Array], part: str, value: Any) -> dict[str, Array]:
    return {name: np.ascontiguousarray(value(t)) if name.endswith(part) else t for name, t in tensors.items()}


@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("qweight", lambda t: t.astype(np.int64), r"qweight: wrong tensor; expected an int32 matrix; got int64 \["),
        ("qweight", lambda t: t.reshape(-1), r"qweight: wrong tensor; expected an int32 matrix; got int32 \[768\]"),
        ("qweight", lambda t: t[:0], r"qweight: wrong tensor; expected an int32 matrix; got int32 \[0, "),
        ("qweight", lambda t: t[: len(t) // 2], r"wrong number of groups; expected 2 \(48 inputs, .*; got 3"),
        ("qweight", lambda t: t[:, :-1], r"scales: wrong tensor; expected floats \[groups, (56|63)\]"),
        ("qzeros", lambda t: t[:, :-1], r"qzeros: wrong tensor; expected int32 \[3, 8\]; got int32 \[3, 7\]"),
        ("qzeros", lambda t: t[:-1], r"qzeros: wrong tensor; expected int32 \[3, 8\]; got int32 \[2, 8\]"),
        ("scales", lambda t: t[:-1], r"wrong number of groups; expected 3 \(96 inputs, group_size 32\); got 2"),
        ("scales", lambda t: t[0], r"scales: wrong tensor; expected floats \[groups, 64\]; got float16 \[64\]"),
        ("scales", lambda t: t.astype(np.int32), "scales: wrong tensor; expected floats"),
    ],
)
def test_tensors_are_checked(tmp_path: Path, method: str, part: str, value: Any, message: str) -> None:
    layer = Layer(1, 96, 64, 4, 32)
    tensors = part_of(layer.gptq() if method == "gptq" else layer.awq(), part, value)
    with pytest.raises(QbbError, match=message):
        read(folder_of(tmp_path, config(method), tensors))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (lambda t: t[:-1], r"g_idx: wrong tensor; expected int32 \[96\]; got int32 \[95\]"),
        (lambda t: t.astype(np.int64), "g_idx: wrong tensor"),
        (lambda t: t + 1, r"g_idx: group out of range; expected 0\.\.2; got 1\.\.3"),
        (lambda t: t - 1, r"g_idx: group out of range; expected 0\.\.2; got -1\.\.1"),
    ],
)
def test_g_idx_is_checked(tmp_path: Path, value: Any, message: str) -> None:
    tensors = part_of(Layer(1, 96, 64, 4, 32).gptq(), "g_idx", value)
    with pytest.raises(QbbError, match=message):
        read(folder_of(tmp_path, config(), tensors))


def test_three_bit_tensors_fill_whole_periods(tmp_path: Path) -> None:
    tensors = part_of(Layer(1, 96, 64, 3, 32).gptq(), "qweight", lambda t: t[:-1])
    with pytest.raises(
        QbbError, match=r"q_proj: wrong shape of qweight; expected whole words of 3-bit values; got \[8"
    ):
        read(folder_of(tmp_path, config(bits=3), tensors))


@pytest.mark.parametrize("part", ["qzeros", "scales"])
def test_missing_tensors_are_named(tmp_path: Path, part: str) -> None:
    tensors = Layer(1, 64, 32, 4, 32).gptq()
    del tensors[f"{LAYER}.{part}"]
    with pytest.raises(QbbError, match=rf"tensor is missing; expected {LAYER}\.{part}$"):
        read(folder_of(tmp_path, config(), tensors))


def test_files_are_checked(tmp_path: Path) -> None:
    with pytest.raises(QbbError, match=r"config\.json: cannot read; expected a JSON file; got .*No such file"):
        QuantizedCheckpoint.open(tmp_path / "nowhere")
    path = folder_of(tmp_path / "a", config(), Layer(1, 64, 32, 4, 32).gptq())
    (path / "config.json").write_bytes(b"\xff{")
    with pytest.raises(QbbError, match=r"config\.json: cannot read"):
        QuantizedCheckpoint.open(path)
    (path / "config.json").write_text(json.dumps(config()))
    (path / "model.safetensors").rename(path / "one.safetensors")
    QuantizedCheckpoint.open(path)
    (path / "two.safetensors").write_bytes((path / "one.safetensors").read_bytes())
    with pytest.raises(QbbError, match=r"cannot tell which files to read; .* got \['one.safetensors', 'two.safetens"):
        QuantizedCheckpoint.open(path)
    for file in path.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(QbbError, match=r"cannot tell which files to read; .* got none"):
        QuantizedCheckpoint.open(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index.pop("weight_map"), "index.json: damaged index; expected weight_map"),
        (lambda index: index.update(weight_map=[1]), "^[^ ]*index.json: damaged index"),
        (lambda index: index["weight_map"].update(x=7), "index.json: damaged index"),
        (lambda index: index["weight_map"].update(x="gone.safetensors"), "file of the index is missing; .*; got gone"),
        (lambda index: index["weight_map"].update(x="../model.safetensors"), r"file of the index is missing.*\.\./m"),
        (
            lambda index: index["weight_map"].update(x=index["weight_map"][f"{LAYER}.scales"]),
            "tensor is missing; expec",
        ),
    ],
)
def test_index_is_checked(tmp_path: Path, change: Any, message: str) -> None:
    save_file({"x": np.zeros(1)}, tmp_path / "model.safetensors")
    path = sharded(tmp_path / "folder", Layer(1, 64, 32, 4, 32))
    file = next(path.glob("*.index.json"))
    index = json.loads(file.read_text())
    change(index)
    file.write_text(json.dumps(index))
    with pytest.raises(QbbError, match=message):
        QuantizedCheckpoint.open(path)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damaged_files_give_one_clear_line(tmp_path: Path, data: st.DataObject) -> None:
    layer = Layer(2, 32, 32, 4, 32)
    path = folder_of(tmp_path, config(), layer.gptq())
    file = path / "model.safetensors"
    content = bytearray(file.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
        must_fail = True
    else:
        content[data.draw(st.integers(0, header - 1))] ^= data.draw(st.integers(1, 255))
        must_fail = False  # a change in the metadata may mean nothing
    file.write_bytes(content)
    try:
        got = read(path)
    except QbbError as error:
        assert "\n" not in str(error) and str(path) in str(error)
    else:
        assert not must_fail and got.dtype == np.float32
