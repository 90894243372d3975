"""Quantising on a GPU gives the bytes that a CPU gives."""

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from qbb_export import cli  # noqa: E402
from qbb_export.quantize import QuantizeSettings, quantize  # noqa: E402
from tests.unit import models  # noqa: E402

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def cuda() -> None:
    if not torch.cuda.is_available():
        pytest.fail("make test-gpu needs an NVIDIA GPU and a CUDA build of PyTorch")


@pytest.mark.parametrize("recipe", ["fast", "greedy"])
@pytest.mark.parametrize("bases", [1, 2, 3, 4, 6])
@pytest.mark.parametrize(("shape", "group_size"), [((37, 130), 32), ((64, 512), 128), ((300, 1000), 0), ((1, 1), 0)])
def test_same_bytes_as_numpy(shape: tuple[int, int], group_size: int, bases: int, recipe: str) -> None:
    weights = np.random.default_rng([*shape, bases]).standard_normal(shape).astype(np.float32)
    settings = QuantizeSettings(bases=bases, group_size=group_size, offset=recipe == "fast" and bases % 2 == 0)
    ours = quantize(torch.from_numpy(weights).cuda(), settings, recipe)
    expected = quantize(weights, settings, recipe)
    assert ours.words.tobytes() == expected.words.tobytes()
    assert ours.scales.tobytes() == expected.scales.tobytes()
    assert (ours.offset is None) == (expected.offset is None)
    if ours.offset is not None and expected.offset is not None:
        assert ours.offset.tobytes() == expected.offset.tobytes()


def test_command_line(tmp_path: Path) -> None:
    folder = models.tiny_llama(tmp_path / "hf")
    for device in ("cpu", "cuda"):
        (tmp_path / device).mkdir()
        assert (
            cli.export_main(
                [str(folder), "-o", str(tmp_path / device / "m.onnx"), "--device", device, "--recipe", "fast"]
            )
            == 0
        )
    files = [{p.name: p.read_bytes() for p in (tmp_path / d).iterdir() if p.is_file()} for d in ("cpu", "cuda")]
    assert files[0] == files[1]
