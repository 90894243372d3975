"""The optimizer's loop: Adam on the student, the best state on the validation text kept, resumable byte by byte."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import nn

from qbb_export.distill.deterministic import deterministic
from qbb_export.distill.gradients import Gradients
from qbb_export.distill.objective import Outputs, distance, run, vocabulary_size
from qbb_export.distill.ranks import ALONE, Ranks, spread_like, whole
from qbb_export.distill.settings import DistillSettings
from qbb_export.distill.student import Student
from qbb_export.distill.text import Tokens, precision

# Elements of the logits held at once; larger batches are split and their gradients added.
_LOGITS = {"cuda": 1 << 29, "cpu": 1 << 26}
_VALIDATIONS = 20  # times during a phase
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # what Adam remembers of a parameter


@dataclass(frozen=True)
class LogLine:
    """One line of the training log; ``validation`` is None between validations."""

    step: int
    loss: float
    validation: float | None
    rate: float


class Journal(Protocol):
    """Where a phase keeps its state, so that a killed one goes on."""

    def load(self) -> dict[str, torch.Tensor] | None:
        """What was kept last, or None."""
        ...

    def save(self, state: dict[str, torch.Tensor]) -> None:
        """Keep it (now or later, as the journal sees fit)."""
        ...

    def due(self) -> bool:
        """Whether it is time to."""
        ...


class Batches:
    """Batches in a fixed random order: batch ``i`` is the same whenever it is asked for.

    Args:
        text: one array ``[sequences, length]``, whose rows are mixed anew in every pass; or several, which are the
            batches.
        batch: sequences of a batch, for one array.
        seed: of the order.
    """

    def __init__(self, text: Sequence[Tokens], batch: int, seed: int) -> None:
        self._text, self._batch, self._seed = text, min(batch, len(text[0])), seed
        self._per_pass = len(text) if len(text) > 1 else len(text[0]) // self._batch

    def __getitem__(self, index: int) -> Tokens:
        number, place = divmod(index, self._per_pass)
        rng = np.random.default_rng([self._seed, number])
        if len(self._text) > 1:
            return np.asarray(self._text[rng.permutation(self._per_pass)[place]])
        rows = rng.permutation(len(self._text[0]))[place * self._batch : (place + 1) * self._batch]
        return np.asarray(self._text[0][rows])


def rate_at(step: int, settings: DistillSettings) -> float:
    """Share of the peak rate: a linear rise, then a cosine to zero."""
    rise = max(1, round(settings.warmup * settings.steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1.0 + math.cos(math.pi * (step - rise) / max(1, settings.steps - rise)))


def own_rows(batch: Tokens, device: torch.device, ranks: Ranks = ALONE) -> tuple[torch.Tensor, int]:
    """This process's rows of a batch, and how many of them count (see :meth:`Ranks.rows`)."""
    rows, real = ranks.rows(len(batch))
    return torch.from_numpy(batch[rows]).to(device), real


def micro_batches(ids: torch.Tensor, real: int, vocabulary: int) -> Iterator[tuple[torch.Tensor, int]]:
    """Rows in parts whose logits fit into memory, and how many rows of each count."""
    room = max(1, _LOGITS.get(ids.device.type, 1 << 26) // max(1, vocabulary * ids.shape[1]))
    for start in range(0, len(ids), room):
        part = ids[start : start + room]
        yield part, min(len(part), max(0, real - start))


def validate(
    teacher: nn.Module, student: nn.Module, text: Sequence[Tokens], settings: DistillSettings, ranks: Ranks = ALONE
) -> float:
    """Mean loss on the validation text, without the features; the same number in all processes."""
    plain = replace(settings, features=0.0)
    device = next(teacher.parameters()).device
    total, count = 0.0, 0
    with torch.no_grad(), precision(device):
        for batch in text:
            for ids, real in micro_batches(*own_rows(batch, device, ranks), vocabulary_size(teacher)):
                found = _loss(run(student, ids), run(teacher, ids), plain, ids, real)
                total += float(found) * real * ids.shape[1]
            count += batch.size
    return ranks.total(total) / count


def _loss(got: Outputs, wanted: Outputs, settings: DistillSettings, ids: torch.Tensor, real: int) -> torch.Tensor:
    """The mean loss over the first ``real`` sequences, one at least."""
    if real < len(ids):
        rows = slice(0, max(1, real))
        got, wanted, ids = got.rows(rows), wanted.rows(rows), ids[rows]
    return distance(got, wanted, settings, ids)


def train(
    teacher: nn.Module,
    student: Student,
    text: Sequence[Tokens],
    validation: Sequence[Tokens],
    settings: DistillSettings,
    *,
    seed: int = 0,
    journal: Journal | None = None,
    tell: Callable[[int, int, LogLine, int], None] | None = None,
    ranks: Ranks = ALONE,
) -> list[LogLine]:
    """Train a student; it ends in the state that was best on the validation text, its start included.

    Args:
        teacher: the float model.
        student: on the same device; changed in place.
        text: one array ``[sequences, length]``, or batches of equal length each.
        validation: not learnt from.
        settings: of this phase.
        seed: of the order of the text.
        journal: keeps the state of a run that may be killed.
        tell: called with (steps done, in all, log line, tokens of the step).
        ranks: processes that share every batch; both models are spread over them then (:meth:`Ranks.sharded`). What
            they end with is what one process ends with, but for the rounding of sums.

    Returns:
        The log. It and the student are the same whether or not the run was interrupted.
    """
    model = student.model
    device = next(teacher.parameters()).device
    groups = student.parameter_groups(settings.code_rate, settings.scale_rate)
    optimizer = torch.optim.Adam(groups, betas=settings.betas, eps=1e-12, fused=device.type == "cuda")
    peaks = [group["lr"] for group in optimizer.param_groups]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    batches = Batches(text, settings.batch, seed)
    every = max(1, settings.steps // _VALIDATIONS)
    log: list[LogLine] = []
    best = [p.detach().clone() for p in parameters]

    def compute(ids: torch.Tensor, real: int, size: int, _quantised: int) -> torch.Tensor:
        loss = torch.zeros((), device=device)
        for part, counted in micro_batches(ids, real, vocabulary_size(teacher)):
            with precision(device):
                with torch.no_grad():
                    wanted = run(teacher, part, blocks=settings.features > 0)
                got = run(model, part, blocks=settings.features > 0)
                share = _loss(got, wanted, settings, part, counted) * (counted / size)
            mine = share * ranks.size  # gradients are averaged over the processes
            mine.backward()  # type: ignore[no-untyped-call]
            loss += share.detach()
        return loss

    gradients = Gradients(compute, parameters, graphs=device.type == "cuda" and ranks.size == 1)
    first = 0
    saved = None if journal is None else journal.load()
    if saved is not None:
        first = _restore(saved, parameters, best, optimizer, log)
        least = min(line.validation for line in log if line.validation is not None)
    else:
        least = validate(teacher, model, validation, settings, ranks)
        log.append(LogLine(0, least, least, 0.0))
    with deterministic():
        for step in range(first, settings.steps):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * rate_at(step, settings)
            batch = batches[step]
            loss = gradients(*own_rows(batch, device, ranks), len(batch), _swap_blocks(student, step, settings))
            nn.utils.clip_grad_norm_(parameters, settings.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)  # room for validation and a copy of the state
            done = step + 1
            if done % every == 0 or done == settings.steps:
                _swap_blocks(student, settings.steps, settings)
                found = validate(teacher, model, validation, settings, ranks)
                log.append(LogLine(done, ranks.total(float(loss)), found, rate_at(step, settings)))
                if found < least:
                    least = found
                    for kept, now in zip(best, parameters, strict=True):
                        kept.copy_(now.detach())
                if tell is not None:
                    tell(done, settings.steps, log[-1], batch.size)
            elif tell is not None and done % 10 == 0:
                line = LogLine(done, ranks.total(float(loss)), None, rate_at(step, settings))
                tell(done, settings.steps, line, batch.size)
            if journal is not None and (journal.due() or done == settings.steps):
                journal.save(_snapshot(done, parameters, best, optimizer, log, ranks))
    with torch.no_grad():
        for now, kept in zip(parameters, best, strict=True):
            now.copy_(kept)
    return log


def _snapshot(
    step: int,
    parameters: list[nn.Parameter],
    best: list[torch.Tensor],
    optimizer: torch.optim.Optimizer,
    log: list[LogLine],
    ranks: Ranks,
) -> dict[str, torch.Tensor]:
    """The state in one piece, on the host; in the first process only."""
    lines = [[line.step, line.loss, line.validation, line.rate] for line in log]  # all of these have been validated
    state = {"log": torch.tensor(lines, dtype=torch.float64), "step": torch.tensor(step)}
    for i, parameter in enumerate(parameters):
        state |= {f"{i}.now": parameter.detach(), f"{i}.best": best[i]}
        if moments := optimizer.state.get(parameter):  # none before a block's first turn
            state |= {f"{i}.{name}": moments[name].detach() for name in _MOMENTS}
    result = {}
    for name, tensor in state.items():
        full = whole(tensor)  # all processes take part
        if ranks.first:
            result[name] = full.contiguous().cpu()
    return result


def _restore(
    saved: dict[str, torch.Tensor],
    parameters: list[nn.Parameter],
    best: list[torch.Tensor],
    optimizer: torch.optim.Optimizer,
    log: list[LogLine],
) -> int:
    """The inverse of :func:`_snapshot`; the step to go on with."""
    step = int(saved["step"])
    with torch.no_grad():
        for i, parameter in enumerate(parameters):
            parameter.copy_(spread_like(saved[f"{i}.now"], parameter))
            best[i].copy_(spread_like(saved[f"{i}.best"], parameter))
            if f"{i}.step" in saved:
                count = saved[f"{i}.step"]
                moments = {name: spread_like(saved[f"{i}.{name}"], parameter) for name in _MOMENTS[1:]}
                moments["step"] = count.to(parameter.device) if optimizer.defaults["fused"] else count
                optimizer.state[parameter] = moments
    for number, loss, validation, rate in saved["log"].tolist():
        log.append(LogLine(int(number), loss, validation, rate))
    return step


def _swap_blocks(student: Student, step: int, settings: DistillSettings) -> int:
    """Let float blocks stand in for quantised ones: all at the start, none after ``swap`` of the steps.

    Returns:
        The number of quantised blocks; 0 without a swap.
    """
    if not settings.swap:
        return 0
    blocks = student.blocks()
    share = step / max(1.0, settings.swap * settings.steps)
    quantised = len(blocks) if share >= 1 else int(share * len(blocks)) + 1
    for number, members in enumerate(blocks):
        for bases in members:
            bases.bypass = number >= quantised
    return quantised
