"""Opening PyTorch models: every kind of input, and one clear line for everything else."""

import pickle
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from qbb_export.errors import QbbError  # noqa: E402
from qbb_export.load import load_torch  # noqa: E402
from qbb_export.source import InputSpec, LoadOptions  # noqa: E402
from tests.unit import models  # noqa: E402

X = (InputSpec("x", "float32", ("batch", 40)),)
BUILD = "tests.unit.models:two_layers"


class Evil:
    """Unpickling this creates a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return (Path.touch, (self.canary,))


def test_input_descriptions():
    assert InputSpec.parse("input_ids:int64[batch, sequence]") == InputSpec("input_ids", "int64", ("batch", "sequence"))
    assert InputSpec.parse("x:float32[2,3]").dims == (2, 3)
    for bad in ("x", "x:float32", "x:complex64[2]", "x:float32[2", ":float32[2]", ""):
        with pytest.raises(QbbError, match="--input: cannot read an input description"):
            InputSpec.parse(bad)


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3}], ids=["plain", "checkpoint"])
def test_state_dict_with_a_builder(tmp_path, wrap):
    module = models.two_layers()
    torch.save(wrap(module.state_dict()), tmp_path / "m.pt")
    loaded = load_torch(str(tmp_path / "m.pt"), LoadOptions(model=BUILD, inputs=X))
    assert torch.equal(loaded.module.fc1.weight, module.fc1.weight)
    assert not loaded.module.training


def test_safetensors_with_a_builder(tmp_path):
    from safetensors.torch import save_file

    module = models.two_layers()
    save_file(module.state_dict(), tmp_path / "m.safetensors")
    loaded = load_torch(str(tmp_path / "m.safetensors"), LoadOptions(model=BUILD, inputs=X))
    assert torch.equal(loaded.module.fc2.bias, module.fc2.bias)


def test_state_dict_with_a_config(tmp_path):
    folder = models.tiny_llama(tmp_path / "hf")
    state = load_torch(str(folder), LoadOptions()).module.state_dict()
    torch.save(state, tmp_path / "m.pt")
    loaded = load_torch(str(tmp_path / "m.pt"), LoadOptions(config=folder))
    assert [spec.name for spec in loaded.inputs] == ["input_ids", "attention_mask"]
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(loaded.module.state_dict()[name], state[name])


def test_pickled_module_only_with_trust(tmp_path):
    module = models.two_layers()
    torch.save(module, tmp_path / "m.pt")
    with pytest.raises(QbbError, match=r"would run code from it; expected a state dict .* or --trust-pickle"):
        load_torch(str(tmp_path / "m.pt"), LoadOptions(inputs=X))
    loaded = load_torch(str(tmp_path / "m.pt"), LoadOptions(inputs=X, trust_pickle=True))
    assert torch.equal(loaded.module.fc1.weight, module.fc1.weight)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt"])
@pytest.mark.parametrize("how", ["torch.save", "pickle"])
def test_evil_pickles_run_nothing(tmp_path, how, suffix):
    canary = tmp_path / "canary"
    path = tmp_path / f"m{suffix}"
    if how == "pickle":
        path.write_bytes(pickle.dumps(Evil(canary)))
    else:
        torch.save({"state_dict": {"w": Evil(canary)}}, path)
    with pytest.raises(QbbError):
        load_torch(str(path), LoadOptions(model=BUILD, inputs=X))
    assert not canary.exists()


def test_exported_program_only_with_trust(tmp_path):
    program = torch.export.export(models.two_layers(), (torch.ones(3, 40),))
    torch.export.save(program, tmp_path / "m.pt2")
    with pytest.raises(QbbError, match="--trust-pickle"):
        load_torch(str(tmp_path / "m.pt2"), LoadOptions())
    assert load_torch(str(tmp_path / "m.pt2"), LoadOptions(trust_pickle=True)).program is not None


def write(path, content=b"\x00" * 50):
    path.write_bytes(content)
    return str(path)


def test_everything_else_is_one_clear_line(tmp_path):
    state = tmp_path / "state.pt"
    torch.save(models.two_layers().state_dict(), state)
    numbers = tmp_path / "numbers.pt"
    torch.save([1, 2, 3], numbers)
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "readme.md").touch()
    cases = [
        (str(tmp_path / "gone.pt"), LoadOptions(), "no such file or folder"),
        ("a/b/c", LoadOptions(), "no such file or folder"),
        (str(tmp_path / "empty"), LoadOptions(), "not a model folder; expected config.json in it; got an empty folder"),
        (str(tmp_path / "other"), LoadOptions(), "got readme.md"),
        (write(tmp_path / "m.gguf"), LoadOptions(), "not a model that can be read; .* suffix '.gguf'"),
        (write(tmp_path / "m.safetensors"), LoadOptions(), "damaged safetensors file"),
        (write(tmp_path / "m.pt"), LoadOptions(), "cannot read the file|would run code"),
        (write(tmp_path / "e.pt", b""), LoadOptions(), "cannot read the file"),
        (str(numbers), LoadOptions(), "not a model; expected a module or a state dict; got list"),
        (str(state), LoadOptions(), "a state dict holds weights but no module; expected --config"),
        (str(state), LoadOptions(model=BUILD), "inputs are unknown; expected --input"),
        (str(state), LoadOptions(model="tests.unit.models:other_layers", inputs=X), "weights do not fit the module"),
        (str(state), LoadOptions(model="no.such:thing", inputs=X), "cannot build the module; .* ModuleNotFoundError"),
        (str(state), LoadOptions(model="math:pi", inputs=X), "cannot build the module"),
        (str(state), LoadOptions(model="builtins:dict", inputs=X), "not a module; expected torch.nn.Module; got dict"),
        (str(state), LoadOptions(config=tmp_path / "empty"), "no config.json"),
    ]
    for source, options, message in cases:
        with pytest.raises(QbbError, match=message) as caught:
            load_torch(source, options)
        assert "\n" not in str(caught.value)


def test_damaged_hugging_face_folders(tmp_path):
    folder = models.tiny_llama(tmp_path / "hf")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(QbbError, match=r"model\.safetensors: damaged safetensors file"):
        load_torch(str(folder), LoadOptions())
    weights.unlink()
    with pytest.raises(QbbError, match="cannot open the model"):
        load_torch(str(folder), LoadOptions())
    from safetensors.torch import load, save_file

    tensors = load(whole)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(QbbError, match=r"weights are missing; expected model\.layers\.1\.mlp\.up_proj\.weight"):
        load_torch(str(folder), LoadOptions())
    (folder / "config.json").write_text("{")
    with pytest.raises(QbbError, match="cannot open the model"):
        load_torch(str(folder), LoadOptions())
