"""Training on a GPU: recorded steps do what launched ones do, and a run that is killed ends in the same bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from torch import nn  # noqa: E402

from qbb_export.distill import train as training  # noqa: E402
from qbb_export.distill.gradients import Gradients  # noqa: E402
from qbb_export.distill.settings import DistillSettings  # noqa: E402
from qbb_export.distill.train import LogLine, train  # noqa: E402
from qbb_export.load import load_torch  # noqa: E402
from qbb_export.source import LoadOptions  # noqa: E402
from tests.unit.models import tiny_llama  # noqa: E402
from tests.unit.training import Shelf, Stopped, student_of  # noqa: E402

pytestmark = pytest.mark.gpu

TEXT = np.random.default_rng(0).integers(0, 97, (24, 40))
VALIDATION = [np.random.default_rng(1).integers(0, 97, (6, 40))]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    if not torch.cuda.is_available():
        pytest.fail("make test-gpu needs an NVIDIA GPU and a CUDA build of PyTorch")
    folder = tiny_llama(tmp_path_factory.mktemp("llama"), num_hidden_layers=3)
    return load_torch(str(folder), LoadOptions()).module.float().cuda().requires_grad_(False)


def trained(teacher: nn.Module, settings: DistillSettings, **arguments: Any) -> tuple[list[Any], list[LogLine]]:
    student = student_of(teacher, settings.codes)
    log = train(teacher, student, [TEXT], VALIDATION, settings, **arguments)
    return [p.detach().cpu() for _, bases, latent in student.matrices() for p in (*bases.parameters(), latent)], log


@pytest.mark.parametrize(
    "settings",
    [
        DistillSettings(steps=12, batch=4),
        DistillSettings(steps=12, batch=4, codes=False, loss="mse", features=1.0, swap=0.5),
    ],
)
def test_recorded_steps_are_those_launched(
    teacher: nn.Module, settings: DistillSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Gradients] = []

    class Watched(Gradients):
        def __call__(self, ids: Any, *numbers: int) -> Any:
            made.append(self)
            launched = self._in_order(ids, numbers).clone()
            wanted = [None if p.grad is None else p.grad.clone() for p in self._parameters]
            recorded = super().__call__(ids, *numbers)
            assert float(recorded) == pytest.approx(float(launched), rel=2**-8)  # bfloat16
            for parameter, gradient in zip(self._parameters, wanted, strict=True):
                assert (parameter.grad is None) == (gradient is None)
                if gradient is not None:
                    assert float((parameter.grad - gradient).abs().max()) <= 2**-6 * float(gradient.abs().max())
            return recorded

    monkeypatch.setattr(training, "Gradients", Watched)
    _, log = trained(teacher, settings)
    assert len(made) == 12 and made[0].recorded == (3 if settings.swap else 1)
    least = min(line.validation for line in log if line.validation is not None)
    assert least < log[0].loss  # what was recorded moves the parameters, the right way


def test_killed_runs_end_in_the_same_bytes(teacher: nn.Module) -> None:
    settings = DistillSettings(steps=40, batch=4)
    whole, log = trained(teacher, settings, journal=Shelf(5))
    shelf = Shelf(5)

    def kill(done: int, *_: object) -> None:
        if done >= 23:
            raise Stopped

    with pytest.raises(Stopped):
        trained(teacher, settings, journal=shelf, tell=kill)
    assert shelf.kept is not None
    again, log_again = trained(teacher, settings, journal=shelf)
    assert log == log_again
    assert all(torch.equal(x, y) for x, y in zip(whole, again, strict=True))


def test_what_cannot_be_recorded_runs_as_usual() -> None:
    parameter = nn.Parameter(torch.ones(3, device="cuda"))

    def compute(ids: Any) -> Any:
        loss = (parameter * ids.float()).sum()
        if float(loss.detach()) > 0:  # waits for the GPU
            loss.backward()
        return loss.detach()

    gradients = Gradients(compute, [parameter], graphs=True)
    for number in (1, 2, 3):
        ids = torch.full((3,), number, device="cuda")
        assert float(gradients(ids)) == 3 * number
        assert parameter.grad is not None and parameter.grad.tolist() == [number] * 3
    assert gradients.recorded == 0
