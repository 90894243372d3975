"""A small student and a journal, for tests of training."""

from __future__ import annotations

import torch
from torch import nn

from qbb_export.distill.student import Student, Target
from qbb_export.quantize import QuantizeSettings, quantize

SETTINGS = QuantizeSettings(2, 32, True, rounds=2, shakes=0)


def student_of(teacher: nn.Module, train_codes: bool) -> Student:
    """A copy of a decoder with all matrices of its blocks quantised."""
    names = [name for name, p in teacher.named_parameters() if p.ndim == 2 and ".layers." in name]
    targets = [Target(name, name, False, SETTINGS) for name in names]
    start = {t.name: quantize(t.weight(teacher), SETTINGS, "rtn") for t in targets}
    return Student(teacher, targets, start, train_codes=train_codes)


class Shelf:
    """A journal in memory that is due every so many steps."""

    def __init__(self, every: int = 1) -> None:
        self.kept: dict[str, torch.Tensor] | None = None
        self._every, self._steps = every, 0

    def load(self) -> dict[str, torch.Tensor] | None:
        return self.kept

    def save(self, state: dict[str, torch.Tensor]) -> None:
        self.kept = {name: tensor.clone() for name, tensor in state.items()}

    def due(self) -> bool:
        self._steps += 1
        return self._steps % self._every == 0


class Stopped(Exception):
    """Ends a training."""
