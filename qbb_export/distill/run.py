"""A recipe from its first stage to its last, every stage kept in the record."""

from __future__ import annotations

import copy
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from qbb_export.distill import text as texts
from qbb_export.distill.deterministic import deterministic
from qbb_export.distill.filter import most_different
from qbb_export.distill.inputs import make_inputs
from qbb_export.distill.objective import predicts_tokens, vocabulary_size, writes_text
from qbb_export.distill.ranks import ALONE, Ranks
from qbb_export.distill.settings import DistillSettings, ModelRecipe
from qbb_export.distill.student import Student, Target
from qbb_export.distill.sweeps import SweptModel, sweep_all
from qbb_export.distill.text import Tokens, Vocabulary
from qbb_export.distill.train import LogLine, train
from qbb_export.errors import QbbError
from qbb_export.quantize import Quantized
from qbb_export.record import REVISION, Record
from qbb_export.source import TorchModel

# Seconds between two copies of a training run's state. A killed run repeats at most so much.
SAVE_SECONDS: Final = 60.0

# Called with a stage, steps done, steps in all, and a few words on how it goes.
Progress = Callable[[str, int, int, str], None]


@dataclass
class Work:
    """Everything that the stages share.

    Args:
        loaded: the float model; moved to the device, otherwise not changed.
        targets: the matrices to quantise.
        recipe: what to do.
        record: where results are kept.
        device: PyTorch device.
        calibration: a text file to learn from besides the written text, or None.
        weights: gives another float32 ``[N, K]`` to approximate instead of a parameter's own (the result of another
            quantiser), or None.
        tell: progress.
        ranks: the processes that share the work.
        text: what to learn from and what to validate on, if not written for this work (:func:`learning_text`).
        start: layers by name to go on from, instead of quantising the weights.
    """

    loaded: TorchModel
    targets: Sequence[Target]
    recipe: ModelRecipe
    record: Record
    device: str
    tell: Progress
    calibration: Path | None = None
    weights: Callable[[str], Any] | None = None
    ranks: Ranks = ALONE
    text: tuple[list[Tokens], list[Tokens]] | None = None
    start: Mapping[str, Quantized] | None = None

    def __post_init__(self) -> None:
        self.model: nn.Module = self.loaded.module.requires_grad_(False)
        self.model.to(self.device)
        if self.device == "cpu":
            self.model.float()
        self.targets = [
            replace(t, settings=replace(t.settings, offset=_with_offset(t, self.recipe))) for t in self.targets
        ]
        self.decoder = writes_text(self.model)
        self.vocabulary = Vocabulary.of(self.loaded.tokenizer, vocabulary_size(self.model))
        self._float, self._given = self._float_model(), self._given_beside()

    def key(self, stage: str) -> str:
        """SHA-256 of all that a stage depends on: what came before it counts, not what comes after.

        A record is thus gone on from where another number of bases, or of steps, makes the first difference.
        """
        head: dict[str, Any] = {"stage": stage, "revision": REVISION, "float": self._float}
        if stage == "text":
            text = asdict(self.recipe.text)
            for name in ("validation", "keep"):  # how it is used
                del text[name]
            head["text"] = text
        else:
            recipe = self.recipe.as_dict()
            if stage == "sweep":
                del recipe["distill"]
            targets = [[t.name, t.parameter, t.settings.as_dict()] for t in self.targets]
            head |= {"recipe": recipe, "targets": targets, "given": self._given}
        return hashlib.sha256(json.dumps(head, sort_keys=True).encode()).hexdigest()

    def _float_model(self) -> str:
        """Digest of the model, the tokens it knows, and the kind of device."""
        known = self.vocabulary
        digest = hashlib.sha256(repr((torch.device(self.device).type, known.before, known.after, known.mask)).encode())
        for ids in (known.ordinary, known.words):
            digest.update(repr(ids.shape).encode() + ids.tobytes())
        for name, tensor in self.model.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def _given_beside(self) -> str:
        """Digest of what was given beside the model."""
        digest = hashlib.sha256()
        if self.calibration is not None:
            digest.update(self.calibration.read_bytes())
        if self.weights is not None:
            for target in self.targets:
                digest.update(np.ascontiguousarray(self.weights(target.parameter)).data)
        given: list[npt.NDArray[Any]] = [part for parts in self.text or () for part in parts]
        for layer in (self.start or {}).values():
            given += [array for array in (layer.words, layer.scales, layer.offset) if array is not None]
        for array in given:
            digest.update(f"{array.dtype.str}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


def run_recipe(work: Work) -> dict[str, Quantized]:
    """Take all targets through the stages of a recipe.

    Returns:
        The layers by name; they are in the record, too.

    Raises:
        QbbError: the record cannot be written, or a text cannot be read.
    """
    final = {t.name: work.record.get(t.name, work.key("layers")) for t in work.targets}
    if None not in final.values():
        _tidy(work)
        return {name: layer for name, layer in final.items() if layer is not None}
    layers = _start(work)
    recipe = work.recipe
    with deterministic(gradients=False):
        if recipe.sweep is not None or recipe.distill:
            text, validation = learning_text(work)
        if recipe.sweep is not None:
            layers = _sweep(work, layers, text)
        logs: list[dict[str, Any]] = []
        for number, settings in enumerate(recipe.distill, 1):
            layers, log = _distill(work, layers, text, validation, settings, number)
            logs += [{"phase": number, **asdict(line)} for line in log]
    if work.ranks.first:
        if logs:
            work.record.put_text("log.jsonl", "".join(json.dumps(line) + "\n" for line in logs))
        for name, layer in layers.items():
            work.record.put(name, work.key("layers"), layer)
        _tidy(work)
    work.ranks.wait()
    return layers


def _tidy(work: Work) -> None:
    """Remove what only an unfinished run needs; once more where a run was killed just before."""
    if work.ranks.first:
        for number in range(1, len(work.recipe.distill) + 1):
            work.record.drop_tensors(f"phase-{number}")


def _with_offset(target: Target, recipe: ModelRecipe) -> bool:
    asked = target.settings.offset
    return target.settings.bases <= recipe.offset_up_to if asked is None else asked


def _start(work: Work) -> dict[str, Quantized]:
    """Each matrix from its weights alone, shared out over the processes."""
    if work.start is not None:
        return dict(work.start)
    record, done = work.record.stage("start"), 0
    sizes = [work.model.get_parameter(t.parameter).numel() for t in work.targets]
    total = sum(sizes)
    mine = work.ranks.share(work.targets, sizes)
    layers = {}
    for target in mine:
        weight = _weight(work, target)
        layers[target.name] = record.quantized(target.name, weight, target.settings, work.recipe.start)
        done += weight.numel()
        work.tell("quantising weights", min(total, done * work.ranks.size), total, "")
    work.ranks.wait()
    return {t.name: layers.get(t.name) or record.load(t.name) for t in work.targets}


def _weight(work: Work, target: Target) -> torch.Tensor:
    """The matrix to approximate, float32 ``[N, K]`` on the device."""
    own = target.weight(work.model)
    if work.weights is None:
        return own
    other = torch.from_numpy(np.array(work.weights(target.parameter), dtype=np.float32)).to(own.device)
    if other.shape != own.shape:
        raise QbbError(
            "matrix of another shape", where=target.parameter, expected=list(own.shape), got=list(other.shape)
        )
    return other


def learning_text(work: Work) -> tuple[list[Tokens], list[Tokens]]:
    """What to learn from, and what to validate on; written now, unless it is given or in the record."""
    if work.text is not None:
        return work.text
    settings = work.recipe.text
    if not work.decoder:
        batch = max((d.batch for d in work.recipe.distill), default=8)
        context = texts.context_length(work.model, settings.length)
        embeddings: Any = work.model.get_input_embeddings()  # type: ignore[operator]
        known = work.vocabulary if predicts_tokens(work.model) else replace(work.vocabulary, mask=None)
        parts = make_inputs(known, embeddings.weight, settings, context, batch * settings.length)
        if work.calibration is not None:
            parts += _calibration(work, context)
        share = max(1, len(parts) * settings.validation // settings.sequences)
        return parts[:-share] or parts, parts[-share:]
    saved = work.record.get_tensors("text", work.key("text"))
    if saved is None:
        batches = texts.batch_count(work.model, settings)
        mine = range(work.ranks.rank, batches, work.ranks.size)

        def tell(done: int, total: int) -> None:
            work.tell("writing text", done, total, "sequences")

        written = texts.write_text(work.model, work.vocabulary, settings, mine, tell)
        if work.device != "cpu":
            torch.cuda.empty_cache()  # half of the memory, in pieces that nothing else fits into
        ids = work.ranks.gather_batches(written, batches, texts.batch_size(work.model, settings))
        saved = {"ids": ids.astype(np.int32)}
        if work.ranks.first:
            work.record.put_tensors("text", work.key("text"), saved)
        work.ranks.wait()
    ids = saved["ids"].astype(np.int64)
    held = min(settings.validation, max(1, len(ids) // 4))
    parts = [ids[:-held]]
    if work.calibration is not None:
        parts = [np.concatenate([*parts, *_calibration(work, ids.shape[1])])]
    return parts, [ids[-held:]]


def _calibration(work: Work, length: int) -> list[Tokens]:
    assert work.calibration is not None
    return [texts.read_sequences(work.calibration, work.loaded.tokenizer, length)]


def _sweep(work: Work, start: Mapping[str, Quantized], text: Sequence[Tokens]) -> dict[str, Quantized]:
    """Codes and levels again, with the layers' inputs in view."""
    settings = work.recipe.sweep
    assert settings is not None
    record, key = work.record.stage("sweep"), work.key("sweep")
    if work.ranks.agree(all(record.get(t.name, key) is not None for t in work.targets)):
        return {t.name: record.load(t.name) for t in work.targets}
    wanted, chosen = settings.sequences * work.recipe.text.length, []
    for part in text:  # as many tokens as asked for
        chosen.append(part[: max(1, wanted // part.shape[1])])
        wanted -= chosen[-1].size
        if wanted <= 0:
            break

    def load(target: Target) -> Quantized | None:
        done = work.ranks.agree(record.get(target.name, key) is not None)  # another process may be writing it
        return record.load(target.name) if done else None

    return sweep_all(
        SweptModel(work.model, work.targets, chosen),
        start,
        settings,
        load=load,
        save=lambda target, layer: record.put(target.name, key, layer),
        tell=lambda done, total: work.tell("sweeping layers", done, total, ""),
        ranks=work.ranks,
    )


def _distill(
    work: Work,
    start: Mapping[str, Quantized],
    text: Sequence[Tokens],
    validation: Sequence[Tokens],
    settings: DistillSettings,
    number: int,
) -> tuple[dict[str, Quantized], list[LogLine]]:
    """One phase of learning."""
    if work.ranks.size > 1:
        work.model.to("cpu")  # whole, for what follows; each process has room for its part only
    teacher, student = work.model, Student(work.model, list(work.targets), start, train_codes=settings.codes)
    if work.ranks.size > 1:
        teacher = work.ranks.sharded(copy.deepcopy(work.model), work.device)
        student.model = work.ranks.sharded(student.model, work.device)
    if work.recipe.text.keep < 1 and len(text) == 1:
        text = [
            most_different(
                teacher,
                student.model,
                text[0],
                work.recipe.text.keep,
                settings,
                lambda done, total: work.tell("filtering text", done, total, ""),
                work.ranks,
            )
        ]
    journal = RecordJournal(work.record, f"phase-{number}", work.key(f"phase-{number}"), work.ranks)
    began, seen = time.monotonic(), 0

    def tell(done: int, total: int, line: LogLine, tokens: int) -> None:
        nonlocal seen
        seen = seen or done
        speed = (done - seen) * tokens / max(1e-9, time.monotonic() - began)
        work.tell(f"distilling ({number})", done, total, f"loss {line.loss:.4f}  {speed:,.0f} tokens/s")

    log = train(
        teacher,
        student,
        text,
        validation,
        settings,
        seed=work.recipe.text.seed + number,
        journal=journal,
        tell=tell,
        ranks=work.ranks,
    )
    return student.quantized(start, work.model), log


class RecordJournal:
    """Keeps the state of one phase in the record."""

    def __init__(self, record: Record, name: str, key: str, ranks: Ranks) -> None:
        self._record, self._name, self._key, self._ranks = record, name, key, ranks
        self._last = time.monotonic()

    def load(self) -> dict[str, torch.Tensor] | None:
        """The state kept last, or None."""
        found = self._record.get_tensors(self._name, self._key)
        return None if found is None else {name: torch.from_numpy(array.copy()) for name, array in found.items()}

    def save(self, state: dict[str, torch.Tensor]) -> None:
        """Keep a state."""
        if self._ranks.first:
            self._record.put_tensors(self._name, self._key, {name: t.numpy() for name, t in state.items()})
        self._last = time.monotonic()

    def due(self) -> bool:
        """Whether the state kept last is old; the first process's clock counts."""
        return self._ranks.agree(time.monotonic() - self._last >= SAVE_SECONDS)
