"""The training loop: the order of the text, rates, the blocks that stand in, and that nothing ever gets worse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from torch import nn  # noqa: E402

from qbb_export.distill import train as training  # noqa: E402
from qbb_export.distill.ranks import ALONE, Ranks  # noqa: E402
from qbb_export.distill.settings import DistillSettings  # noqa: E402
from qbb_export.distill.train import Batches, LogLine, micro_batches, own_rows, rate_at, train, validate  # noqa: E402
from qbb_export.errors import QbbError  # noqa: E402
from qbb_export.load import load_torch  # noqa: E402
from qbb_export.source import LoadOptions  # noqa: E402
from tests.unit.models import tiny_llama  # noqa: E402
from tests.unit.training import Shelf, Stopped, student_of  # noqa: E402

TEXT = np.random.default_rng(0).integers(0, 97, (24, 10))
VALIDATION = [np.random.default_rng(1).integers(0, 97, (6, 10))]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    folder = tiny_llama(tmp_path_factory.mktemp("llama"), num_hidden_layers=3)
    model = load_torch(str(folder), LoadOptions()).module.float().requires_grad_(False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 4 if parameter.ndim == 2 else 1  # else all tokens are about as likely
    return model


@pytest.mark.parametrize("codes", [False, True])
@pytest.mark.parametrize("rate", [1e-3, 3.0, 1e30])
def test_it_never_ends_worse_than_it_began(teacher: nn.Module, codes: bool, rate: float) -> None:
    settings = DistillSettings(steps=6, batch=4, codes=codes, scale_rate=rate, code_rate=rate, warmup=0.0)
    student = student_of(teacher, codes)
    began = validate(teacher, student.model, VALIDATION, settings)
    log = train(teacher, student, [TEXT], VALIDATION, settings)
    ended = validate(teacher, student.model, VALIDATION, settings)
    found = [line.validation for line in log if line.validation is not None]
    assert found[0] == began and len(found) == 7
    assert ended == np.nanmin(found) <= began
    if rate == 1e-3:
        assert ended < 0.999 * began  # it learns
    else:
        assert ended == began  # these rates ruin everything in the first step
        assert not found[1] <= began


def test_rates_rise_and_fall() -> None:
    settings = DistillSettings(steps=40, warmup=0.1)
    rates = [rate_at(step, settings) for step in range(40)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert np.allclose(rates[4:], 0.5 + 0.5 * np.cos(np.pi * np.arange(36) / 36), rtol=1e-12, atol=0)
    assert rate_at(0, DistillSettings(steps=1)) == 1.0


def test_a_pass_takes_each_sequence_once() -> None:
    batches = Batches([TEXT], 5, seed=3)
    for number in range(3):
        taken = np.concatenate([batches[4 * number + i] for i in range(4)])
        assert len(np.unique(taken, axis=0)) == 20  # of 24: what is short of a batch is left out, others each time
        assert {tuple(row) for row in taken} <= {tuple(row) for row in TEXT}
    again = Batches([TEXT], 5, seed=3)
    assert all(np.array_equal(again[i], batches[i]) for i in (7, 0, 11))
    assert not np.array_equal(batches[0], batches[4]) and not np.array_equal(Batches([TEXT], 5, seed=4)[0], batches[0])
    assert len(Batches([TEXT], 99, seed=3)[5]) == 24


def test_batches_of_several_lengths_stay_as_they_are() -> None:
    text = [np.full((n, n + 1), n) for n in (2, 3, 4)]
    batches = Batches(text, 99, seed=0)
    for number in range(4):
        assert sorted(len(batches[3 * number + i]) for i in range(3)) == [2, 3, 4]
    assert len({tuple(len(batches[3 * number + i]) for i in range(3)) for number in range(8)}) > 1


def test_large_logits_come_in_parts(monkeypatch: pytest.MonkeyPatch, teacher: nn.Module) -> None:
    settings = DistillSettings(steps=1, batch=8, codes=False)
    device = torch.device("cpu")
    whole = [ids for ids, _ in micro_batches(*own_rows(TEXT[:8], device), 97)]
    assert [len(ids) for ids in whole] == [8]
    wanted = validate(teacher, student_of(teacher, False).model, VALIDATION, settings)
    (line,) = train(teacher, student_of(teacher, False), [TEXT], VALIDATION, settings)[1:]
    monkeypatch.setitem(training._LOGITS, "cpu", 3 * 97 * 10)
    parts = list(micro_batches(*own_rows(TEXT[:8], device), 97))
    assert [(len(ids), real) for ids, real in parts] == [(3, 3), (3, 3), (2, 2)]
    assert torch.equal(torch.cat([ids for ids, _ in parts]), whole[0])
    in_parts = validate(teacher, student_of(teacher, False).model, VALIDATION, settings)
    (other,) = train(teacher, student_of(teacher, False), [TEXT], VALIDATION, settings)[1:]
    # Only the order of sums differs: some ulps of the logits, which are a few units, through three blocks.
    assert abs(in_parts - wanted) < 1e-5 * wanted and abs(other.loss - line.loss) < 1e-5 * line.loss
    assert abs(other.validation - line.validation) < 1e-5 * line.validation
    monkeypatch.setitem(training._LOGITS, "cpu", 1)
    assert len(list(micro_batches(*own_rows(TEXT[:8], device), 97))) == 8


@pytest.mark.parametrize(("count", "size"), [(8, 2), (5, 2), (7, 4), (1, 3), (9, 3)])
def test_processes_share_the_rows_of_a_batch(count: int, size: int) -> None:
    shares = [Ranks(rank, size).rows(count) for rank in range(size)]
    assert {len(rows) for rows, _ in shares} == {-(-count // size)}  # all stay in step
    assert [int(row) for rows, real in shares for row in rows[:real]] == list(range(count))
    assert all(rows.min() >= 0 and rows.max() < count for rows, _ in shares)
    if count == 5:
        parts = list(micro_batches(*own_rows(TEXT[:5], torch.device("cpu"), Ranks(1, 2)), 97))
        assert [(len(ids), real) for ids, real in parts] == [(3, 2)]
        assert np.array_equal(parts[0][0][:2].numpy(), TEXT[3:5])


def test_processes_share_matrices_by_their_size() -> None:
    sizes = [3, 100, 50, 50, 1, 1]
    shares = [Ranks(rank, 2).share("abcdef", sizes) for rank in range(2)]
    assert sorted(shares[0] + shares[1]) == list("abcdef")
    loads = [sum(sizes["abcdef".index(item)] for item in share) for share in shares]
    assert max(loads) - min(loads) <= 1
    assert ALONE.share("abcdef", sizes) == list("abcdef")
    assert ALONE.gather("x") == ["x"] and ALONE.agree("x") == "x" and ALONE.total(2.5) == 2.5


def test_float_blocks_stand_in_and_go_from_the_first_on(teacher: nn.Module) -> None:
    student = student_of(teacher, False)
    settings = DistillSettings(steps=12, batch=4, codes=False, swap=0.5)
    quantised: list[list[bool]] = []
    forward = student.model.model.layers[0].register_forward_pre_hook(  # type: ignore[union-attr, index]
        lambda *_: (
            quantised.append([not members[0].bypass for members in student.blocks()])
            if torch.is_grad_enabled()
            else None
        )
    )
    log = train(teacher, student, [TEXT], VALIDATION, settings)
    forward.remove()
    assert all(len({bases.bypass for bases in members}) == 1 for members in student.blocks())
    # Half of the 12 steps for three blocks: one more after every two steps.
    assert quantised == [[True, step >= 2, step >= 4] for step in range(12)]
    assert not any(bases.bypass for members in student.blocks() for bases in members)
    # On the validation text all blocks are quantised, in every step.
    assert log[0].validation == validate(teacher, student_of(teacher, False).model, VALIDATION, settings)
    assert log[1].loss < 0.8 * log[0].loss  # with two float blocks
    assert all(line.validation > 0.9 * log[0].validation for line in log)
    with pytest.raises(QbbError, match="only while codes are fixed"):
        DistillSettings(swap=0.5)


def test_a_block_that_is_passed_by_gives_the_float_weights(teacher: nn.Module) -> None:
    student = student_of(teacher, False)
    for members in student.blocks():
        for bases in members:
            bases.bypass = True
    ids = torch.from_numpy(TEXT[:2])
    with torch.no_grad():
        assert torch.equal(student.model(input_ids=ids).logits, teacher(input_ids=ids).logits)


@pytest.mark.parametrize("codes", [False, True])
def test_a_stopped_training_goes_on(teacher: nn.Module, codes: bool, tmp_path: Path) -> None:
    settings = DistillSettings(steps=5, batch=4, codes=codes, swap=0.0 if codes else 0.8)
    shelf = Shelf()

    def run(journal: Shelf | None, stop: int) -> tuple[Any, list[LogLine]]:
        def tell(done: int, *_: Any) -> None:
            if done == stop:
                raise Stopped

        student = student_of(teacher, codes)
        log = train(teacher, student, [TEXT], VALIDATION, settings, journal=journal, tell=tell)
        return [p.detach() for group in student.parameter_groups(1, 1) for p in group["params"]], log

    for stop in (1, 2, 4):
        with pytest.raises(Stopped):
            run(shelf, stop)
    resumed, whole, ended = run(shelf, 0), run(None, 0), run(shelf, 0)
    for found in (resumed, ended):
        assert all(torch.equal(a, b) for a, b in zip(found[0], whole[0], strict=True))
        assert found[1] == whole[1]
