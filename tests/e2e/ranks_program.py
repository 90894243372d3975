"""What ``test_ranks`` runs in one process and in two: short trainings of small models, told as JSON."""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from qbb_export.distill.ranks import Ranks, end_process, whole
from qbb_export.distill.run import RecordJournal
from qbb_export.distill.settings import DistillSettings
from qbb_export.distill.student import Student, Target
from qbb_export.distill.text import Tokens
from qbb_export.distill.train import train
from qbb_export.load import load_torch
from qbb_export.quantize import QuantizeSettings, quantize
from qbb_export.record import Record
from qbb_export.source import LoadOptions

SETTINGS = QuantizeSettings(bases=2, group_size=32, offset=True, rounds=2, shakes=0)
# By model: what is special about it, and how it is trained. Five sequences a batch do not divide by two.
SCALES = DistillSettings(steps=6, batch=5, codes=False)
CASES = {
    "llama": DistillSettings(steps=6, batch=5, codes=False, loss="mse", features=1.0, swap=0.7),  # the paper's
    "gpt2": SCALES,  # transposed matrices, the head tied to the embedding
    "albert": SCALES,  # all blocks are one
}


class Killed(Exception):
    """Ends a training in the middle."""


def student_of(family: str, folder: Path, codes: bool, ranks: Ranks) -> tuple[nn.Module, Student]:
    """The float model and its copy, spread over the processes if there are several."""

    def load() -> nn.Module:
        return load_torch(str(folder / family), LoadOptions()).module.float().requires_grad_(False)

    model = load()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 4 if parameter.ndim == 2 else 1  # a random model's outputs are nearly even otherwise
    targets = [
        Target(name, name, family == "gpt2" and ".h." in name, SETTINGS)
        for name, parameter in model.named_parameters()
        if parameter.ndim == 2 and (any(f".{block}." in name for block in ("layers", "h", "albert_layers")))
    ]
    if family == "gpt2":
        targets.append(Target("head", "transformer.wte.weight", False, SETTINGS))
    start = {t.name: quantize(t.weight(model), t.settings, "rtn") for t in targets}
    student = Student(model, targets, start, train_codes=codes)
    if ranks.size > 1:
        student.model = ranks.sharded(student.model, "cpu")
        model = ranks.sharded(model, "cpu")
    return model, student


def batches_of(order: int) -> list[Tokens]:
    """The same batches for any ``order``; their rows in another one each time."""
    ids = np.random.default_rng(0).integers(1, 60, (4, 5, 12))
    rng = np.random.default_rng(order)
    return [batch[rng.permutation(len(batch))] for batch in ids]


def run_case(family: str, folder: Path, ranks: Ranks, order: int = 0) -> list[float]:
    """Losses and gradient norms of each step, and losses on the validation text."""
    teacher, student = student_of(family, folder, CASES[family].codes, ranks)
    *text, validation = batches_of(order)
    norms: list[float] = []
    clip = nn.utils.clip_grad_norm_

    def noted(parameters: Sequence[torch.Tensor], limit: float) -> torch.Tensor:
        norms.append(float(whole(clip(parameters, limit))))
        return torch.zeros(())

    nn.utils.clip_grad_norm_ = noted
    try:
        log = train(teacher, student, text, [validation], CASES[family], ranks=ranks)
    finally:
        nn.utils.clip_grad_norm_ = clip
    return [line.loss for line in log] + norms + [line.validation or 0.0 for line in log]


def digest(student: Student) -> str:
    """SHA-256 of all that trains."""
    result = hashlib.sha256()
    for group in student.parameter_groups(1.0, 1.0):
        for parameter in group["params"]:
            result.update(whole(parameter.detach()).contiguous().numpy().data)
    return result.hexdigest()


def interrupted_and_not(folder: Path, ranks: Ranks, settings: DistillSettings) -> list[str]:
    """Digests of a training that was killed twice, and of one that was not."""
    *text, validation = batches_of(0)
    place = ranks.agree(tempfile.mkdtemp())
    Path(place).mkdir(exist_ok=True)

    def once(name: str, stop: int) -> str:
        teacher, student = student_of("llama", folder, settings.codes, ranks)
        journal = RecordJournal(Record.join(Path(place)), name, "key", ranks)
        journal.due = lambda: True  # type: ignore[method-assign]

        def tell(done: int, *_: Any) -> None:
            if done == stop:
                raise Killed

        train(teacher, student, text, [validation], settings, journal=journal, tell=tell, ranks=ranks)
        return digest(student)

    for stop in (2, 4):
        try:
            once("killed", stop)
            raise AssertionError("ran to its end")
        except Killed:
            ranks.wait()
    return [once("killed", 0), once("whole", 0)]


def everything(folder: Path, ranks: Ranks) -> dict[str, Any]:
    """All cases."""
    found: dict[str, Any] = {family: run_case(family, folder, ranks) for family in CASES}
    codes = DistillSettings(steps=5, batch=5)
    for name, settings in (("codes", codes), ("swap", CASES["llama"])):
        found[name] = interrupted_and_not(folder, ranks, settings)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    processes = Ranks.of_environment()
    result = everything(Path(sys.argv[1]), processes)
    if processes.first:
        Path(sys.argv[2]).write_text(json.dumps(result))
    processes.leave()
    end_process(0)
