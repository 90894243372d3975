"""Short trials of what a recipe does most, on the device that it would run on."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import numpy as np
import torch
from torch import nn

from qbb_export.distill import text as texts
from qbb_export.distill.cost import ModelFacts, Speeds
from qbb_export.distill.objective import distance, run, text_config, vocabulary_size, writes_text
from qbb_export.distill.settings import DistillSettings, ModelRecipe, SweepSettings, TextSettings
from qbb_export.distill.student import BinaryBases, Target, to_codes
from qbb_export.distill.sweeps import sweep_layers
from qbb_export.distill.text import Vocabulary, precision, write_text
from qbb_export.distill.timing import seconds_at
from qbb_export.distill.train import micro_batches, own_rows
from qbb_export.module import to_device
from qbb_export.quantize import quantize

_WRITTEN: Final = 4  # tokens in a trial of writing
_COLUMNS: Final = 32  # in a trial of the sweep
_PRODUCT: Final = 512  # size of a matrix product
_LONGEST_INPUT: Final = 66  # of an encoder: see ``inputs.LENGTHS``


class _StandIn(nn.Module):
    """The configuration of a model on a device, without its weights."""

    def __init__(self, model: nn.Module, device: str) -> None:
        super().__init__()
        self.config = model.config
        self.place = nn.Parameter(torch.empty(0, device=device))


def model_facts(model: nn.Module, recipe: ModelRecipe, device: str) -> ModelFacts:
    """Look at a transformers model, wherever it lies, as if it were on a device.

    Raises:
        QbbError: no such device.
    """
    to_device(np.zeros(1), device)
    there = _StandIn(model, device)
    parameters = list(model.parameters())
    decoder = writes_text(model)
    length = texts.context_length(model, recipe.text.length if decoder else _LONGEST_INPUT)
    rows = max([recipe.text.validation, *(d.batch for d in recipe.distill)])
    batch = np.zeros((rows if decoder else max(1, rows * recipe.text.length // length), length), dtype=np.int64)
    micro_batch, _ = next(micro_batches(*own_rows(batch, there.place.device), vocabulary_size(model)))
    return ModelFacts(
        elements=sum(p.numel() for p in parameters),
        own_bytes=sum(p.numel() * p.element_size() for p in parameters),
        vocabulary=vocabulary_size(model),
        decoder=decoder,
        length=length,
        rows_at_once=len(micro_batch),
        written_at_once=texts.batch_size(there, recipe.text),
        cached=texts.cached_numbers(model),
        layers=getattr(text_config(model), "num_hidden_layers", 1),
        cuda=torch.device(device).type == "cuda",
    )


def try_speeds(model: nn.Module, target: Target, recipe: ModelRecipe, facts: ModelFacts, device: str) -> Speeds:
    """Try everything once, a few seconds in all. The model moves to the device.

    Args:
        model: the float model; of float32 afterwards on a CPU.
        target: a matrix to try, best a large one.
        recipe: what would be run.
        facts: of the model.
        device: PyTorch device.

    Returns:
        NaN for what comes after the device's memory was full.
    """
    found = Speeds()
    try:
        model.requires_grad_(False).to(device)
        if device == "cpu":
            model.float()
        weight = target.weight(model)
        found = replace(found, start=_start(weight, target, recipe))
        if recipe.sweep is None and not recipe.distill:
            return found
        found = replace(found, forward=_forward(model, facts), product=_product(weight.device))
        if facts.decoder:
            found = replace(found, write=_write(model, facts))
        if recipe.sweep is not None:
            found = replace(found, column=_column(weight, target, recipe.sweep))
        if recipe.distill:
            found = replace(found, bases=_bases(weight, target, codes=any(d.codes for d in recipe.distill)))
    except torch.OutOfMemoryError:
        pass
    return found


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _start(weight: torch.Tensor, target: Target, recipe: ModelRecipe) -> float:
    def quantise(rows: int) -> None:
        quantize(weight[:rows], target.settings, recipe.start)

    return seconds_at(quantise, len(weight)) / weight.numel()


def _forward(model: nn.Module, facts: ModelFacts) -> float:
    device = next(model.parameters()).device
    tokens, length = facts.rows_at_once * facts.length, facts.length

    def forward(count: int) -> None:
        ids = torch.zeros(max(1, count // length), min(count, length), dtype=torch.long, device=device)
        with torch.no_grad(), precision(device):
            outputs = run(model, ids, blocks=not facts.decoder)
            if outputs.logits is not None or outputs.hidden is not None:
                distance(outputs, outputs, DistillSettings(), ids)
        _wait(device)

    return seconds_at(forward, tokens) / tokens


def _write(model: nn.Module, facts: ModelFacts) -> float:
    vocabulary = Vocabulary.of(None, facts.vocabulary)

    def write(count: int) -> None:
        write_text(model, vocabulary, TextSettings(sequences=count, length=1 + _WRITTEN))

    return seconds_at(write, facts.written_at_once) / _WRITTEN


def _product(device: torch.device) -> float:
    a = torch.ones(_PRODUCT, _PRODUCT, device=device)

    def multiply(count: int) -> None:
        for _ in range(count):
            torch.mm(a, a)
        _wait(device)

    return seconds_at(multiply, 16) / (16 * _PRODUCT**3)


def _bases(weight: torch.Tensor, target: Target, *, codes: bool) -> float:
    layer = quantize(weight[:1], replace(target.settings, rounds=0, shakes=0), "rtn")
    state = to_codes(layer, weight.device)

    def there_and_back(rows: int) -> None:
        more = replace(
            state,
            codes=state.codes.expand(rows, -1),
            scales=state.scales.expand(rows, -1, -1),
            offset=None if state.offset is None else state.offset.expand(rows, -1),
        )
        bases = BinaryBases(more, weight[:rows], transposed=False, train_codes=codes)
        latent = nn.Parameter(bases.start, requires_grad=codes)
        bases(latent).sum().backward()
        _wait(weight.device)

    return seconds_at(there_and_back, len(weight)) / weight.numel()


def _column(weight: torch.Tensor, target: Target, settings: SweepSettings) -> float:
    part = weight[:, :_COLUMNS].contiguous()
    layer = quantize(part, replace(target.settings, rounds=0, shakes=0), "rtn")
    hessian = torch.eye(part.shape[1], device=weight.device)

    def sweep(_: int) -> None:
        sweep_layers([part], hessian, [layer], settings)
        _wait(weight.device)

    return seconds_at(sweep, 1) / part.numel()
