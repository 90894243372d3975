"""The QBB paper's choice of text: the sequences on which the float model and its copy differ most."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Final

import numpy as np
import torch
from torch import nn

from qbb_export.distill.objective import distance, run
from qbb_export.distill.ranks import ALONE, Ranks
from qbb_export.distill.settings import DistillSettings
from qbb_export.distill.text import Tokens, precision

# Sequences that a process compares at once.
_AT_ONCE: Final = 8


def most_different(
    teacher: nn.Module,
    student: nn.Module,
    text: Tokens,
    keep: float,
    settings: DistillSettings,
    tell: Callable[[int, int], None] | None = None,
    ranks: Ranks = ALONE,
) -> Tokens:
    """A share of the sequences, by their loss without the features.

    Args:
        teacher: the float model.
        student: its copy, on the same device.
        text: int64 ``[sequences, length]``.
        keep: share to keep, above 0; one sequence at least.
        settings: say which loss.
        tell: called with (sequences compared, in all).
        ranks: processes that share the work; they all get the same sequences.

    Returns:
        The sequences kept, in their old order.
    """
    scores = np.zeros(len(text))
    device = next(teacher.parameters()).device
    plain, at_once = replace(settings, features=0.0), _AT_ONCE * ranks.size
    for start in range(0, len(text), at_once):
        part = text[start : start + at_once]
        rows = np.minimum(ranks.rows(at_once)[0], len(part) - 1)  # always as many, so that all stay in step
        ids = torch.from_numpy(part[rows]).to(device)
        with torch.no_grad(), precision(device):
            got, wanted = run(student, ids), run(teacher, ids)
            each = [slice(row, row + 1) for row in range(len(ids))]
            found = [float(distance(got.rows(row), wanted.rows(row), plain, ids[row])) for row in each]
        scores[start : start + at_once] = np.concatenate(ranks.gather(found))[: len(part)]
        if tell is not None:
            tell(start + len(part), len(text))
    count = max(1, round(keep * len(text)))
    chosen = np.sort(np.argsort(-scores, kind="stable")[:count])
    return np.asarray(text[chosen])
