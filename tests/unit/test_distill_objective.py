"""How far float model and copy are apart: against float64, part by part, and which sequences it picks."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from qbb_export.distill.filter import most_different  # noqa: E402
from qbb_export.distill.objective import Outputs, distance, embedding_distance, logits_distance, run  # noqa: E402
from qbb_export.distill.settings import DistillSettings  # noqa: E402

EPS = float(np.finfo(np.float32).eps)
Array = np.ndarray[Any, Any]


def pair(shape: tuple[int, ...], scale: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    teacher = scale * torch.randn(shape, generator=generator)
    return teacher + 0.3 * torch.randn(shape, generator=generator), teacher


def log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_losses_of_logits_against_float64(scale: float) -> None:
    ids = torch.from_numpy(np.random.default_rng(1).integers(0, 50, (3, 7)))
    student, teacher = pair((3, 7, 50), scale)
    s, t = student.double().numpy(), teacher.double().numpy()
    log_s, log_t = log_softmax(s), log_softmax(t)
    rows, columns = np.arange(3)[:, None], np.arange(6)
    wanted = {
        "kl": float((np.exp(log_t) * (log_t - log_s)).sum(-1).mean()),
        "mse": float(np.square(s - t).mean()),
        "ce": float(-log_s[rows, columns, ids[:, 1:].numpy()].mean()),
    }
    # log_softmax is off by a few ulps of the largest logarithm and of the logits; the means add 50 * 3 * 7 such terms,
    # whose weights come to one.
    largest = max(np.abs(log_s).max(), np.abs(log_t).max(), np.abs(s).max(), np.abs(t).max())
    errors = {"kl": 16 * EPS * largest, "ce": 16 * EPS * largest, "mse": 16 * EPS * (wanted["mse"] + largest * 0.3)}
    for kind, value in wanted.items():
        assert abs(float(logits_distance(student, teacher, kind, ids)) - value) <= errors[kind], kind
    # Half precision is widened before anything is computed.
    half = logits_distance(student.bfloat16(), teacher.bfloat16(), "kl", ids)
    assert float(half) == float(logits_distance(student.bfloat16().float(), teacher.bfloat16().float(), "kl", ids))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_the_divergence_is_none_for_equals_and_never_negative(scale: float) -> None:
    ids = torch.zeros(40, 2, dtype=torch.int64)
    for seed in range(20):
        student, teacher = pair((40, 2, 50), scale, seed)
        assert float(logits_distance(teacher, teacher, "kl", ids)) == 0.0
        near = teacher + 1e-6 * (student - teacher)  # its true divergence is far below the rounding of its terms
        assert float(logits_distance(near, teacher, "kl", ids)) >= -16 * EPS * float(teacher.abs().max() + 4)
        assert float(logits_distance(student, teacher, "kl", ids)) > 0


def test_the_distance_of_embeddings_against_float64() -> None:
    student, teacher = pair((3, 7, 20), 1.0)
    s, t = student.double().numpy(), teacher.double().numpy()

    def cosine(a: Array, b: Array) -> Array:
        return np.asarray((a * b).sum(-1) / np.sqrt(np.square(a).sum(-1) * np.square(b).sum(-1)))

    wanted = (1 - cosine(s, t)).mean() + (1 - cosine(s.mean(1), t.mean(1))).mean()
    # Sums of 20 terms whose magnitudes come to at most one, twice; means of 7 before.
    assert abs(float(embedding_distance(student, teacher)) - wanted) <= 2 * (20 + 7 + 4) * EPS
    assert abs(float(embedding_distance(3 * teacher, teacher))) <= 2 * (20 + 7 + 4) * EPS


@pytest.mark.parametrize("form", ["logits", "hidden"])
def test_a_batch_may_be_taken_in_parts(form: str) -> None:
    student, teacher = pair((6, 5, 30), 1.0)
    ids = torch.from_numpy(np.random.default_rng(1).integers(0, 30, (6, 5)))

    def outputs(tensor: torch.Tensor) -> Outputs:
        whole = tensor if form == "logits" else None
        blocks = (tensor * torch.arange(1.0, 7.0)[:, None, None], tensor.square())  # sequences of other sizes
        return Outputs(whole, None if form == "logits" else tensor, blocks)

    s, t = outputs(student), outputs(teacher)
    settings = DistillSettings(codes=False, features=0.7)
    whole = float(distance(s, t, settings, ids))
    parts = [slice(0, 4), slice(4, 5), slice(5, 6)]
    mean = sum(float(distance(s.rows(p), t.rows(p), settings, ids[p])) * (p.stop - p.start) for p in parts) / 6
    assert abs(mean - whole) <= 64 * EPS * whole
    plain = float(distance(s, t, replace(settings, features=0.0), ids))
    blocks = [
        float((a.double() - b.double()).square().mean() / b.double().var())
        for x, y in zip(s.blocks, t.blocks, strict=True)
        for a, b in zip(x, y, strict=True)
    ]
    assert abs(whole - plain - 0.7 * np.mean(blocks)) <= (150 + 8) * EPS * whole


class Steps(nn.Module):
    """Logits of eight tokens from a table; where the first token is even, ``off`` is added to one of them."""

    def __init__(self, off: float) -> None:
        super().__init__()
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=8))
        self.off = nn.Parameter(torch.tensor([off]))
        self.calls: list[int] = []

    def forward(self, input_ids: torch.Tensor, **_: object) -> SimpleNamespace:
        self.calls.append(len(input_ids))
        logits = nn.functional.one_hot(input_ids, 8).float()
        logits[..., 0] += self.off * (input_ids[:, :1] % 2 == 0) * input_ids[:, :1]
        return SimpleNamespace(logits=logits)


@pytest.mark.parametrize("count", [3, 8, 19])
def test_the_filter_keeps_the_most_different(count: int) -> None:
    rng = np.random.default_rng(count)
    text = rng.integers(0, 8, (count, 6))
    difference = np.where(text[:, 0] % 2 == 0, text[:, 0], 0)  # grows with an even first token
    kept = most_different(Steps(0.0), Steps(0.5), text, 0.5, DistillSettings())
    assert len(kept) == round(0.5 * count)
    threshold = np.sort(difference)[::-1][len(kept) - 1]
    must = text[difference > threshold]
    rows = [row.tolist() for row in kept]
    assert all(row.tolist() in rows for row in must)
    assert all(row[0] % 2 == 0 and row[0] >= threshold for row in rows) or threshold == 0
    order = [text.tolist().index(row) for row in rows]
    assert order == sorted(order)
    assert len(most_different(Steps(0.0), Steps(0.5), text, 1e-9, DistillSettings())) == 1


class Classifier(Steps):
    """Gives two classes, and the states of its blocks if asked."""

    def forward(self, input_ids: torch.Tensor, output_hidden_states: bool = False, **_: object) -> SimpleNamespace:
        self.calls.append(len(input_ids))
        states = tuple(torch.full((*input_ids.shape, 4), float(i)) for i in range(3))
        logits = torch.zeros(len(input_ids), 2)
        return SimpleNamespace(logits=logits, hidden_states=states if output_hidden_states else None)


def test_of_a_classifier_the_last_block_counts() -> None:
    model, ids = Classifier(0.0), torch.zeros(2, 3, dtype=torch.int64)
    for _ in range(3):
        found = run(model, ids)
        assert found.logits is None and found.hidden is not None and not found.blocks
        assert torch.equal(found.hidden, torch.full((2, 3, 4), 2.0))
    assert len(model.calls) == 4  # it is asked twice the first time only
    assert len(run(model, ids, blocks=True).blocks) == 2
