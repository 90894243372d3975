"""On a GPU, what is written and swept is the same on every run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from qbb_export.distill.deterministic import deterministic  # noqa: E402
from qbb_export.distill.objective import vocabulary_size  # noqa: E402
from qbb_export.distill.settings import SweepSettings, TextSettings  # noqa: E402
from qbb_export.distill.student import Target  # noqa: E402
from qbb_export.distill.sweeps import SweptModel, sweep_layers  # noqa: E402
from qbb_export.distill.text import Vocabulary, write_text  # noqa: E402
from qbb_export.load import load_torch  # noqa: E402
from qbb_export.quantize import QuantizeSettings, quantize  # noqa: E402
from qbb_export.source import LoadOptions  # noqa: E402

pytestmark = pytest.mark.gpu

SETTINGS = QuantizeSettings(bases=3, group_size=128, offset=False)


@pytest.fixture(scope="module")
def loaded(shared: Any) -> Any:
    if not torch.cuda.is_available():
        pytest.fail("make test-gpu needs an NVIDIA GPU and a CUDA build of PyTorch")
    found = load_torch(str(shared / "models/gutenberg-llama-28m"), LoadOptions())
    found.module.requires_grad_(False).cuda()
    return found


@pytest.fixture(autouse=True)
def repeat() -> Iterator[None]:
    with deterministic(gradients=False):
        yield


def test_text(loaded: Any) -> None:
    known = Vocabulary.of(loaded.tokenizer, vocabulary_size(loaded.module))
    first, second = (write_text(loaded.module, known, TextSettings(sequences=512)) for _ in range(2))
    assert (first == second).all()


def test_sweep(loaded: Any) -> None:
    names = [n for n, p in loaded.module.named_parameters() if p.ndim == 2 and ".layers.0." in n]
    targets = [Target(name, name, False, SETTINGS) for name in names]
    text = [np.random.default_rng(0).integers(0, 8000, (256, 512))]
    model = SweptModel(loaded.module, targets, text)
    first, second = (model.hessians(model.groups[0]) for _ in range(2))
    for (members, once), (_, again) in zip(first, second, strict=True):
        assert torch.equal(once, again), [target.name for target in members]
        weights = [model.weight(target) for target in members]
        starts = [quantize(weight, SETTINGS, "rtn") for weight in weights]
        results = [sweep_layers(weights, once, starts, SweepSettings()) for _ in range(2)]
        for target, one, other in zip(members, *results, strict=True):
            assert (one.words == other.words).all() and (one.scales == other.scales).all(), target.name
