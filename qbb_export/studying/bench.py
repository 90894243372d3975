"""Runs recipes on one model and one text, and measures what they end with. Everything is kept in the record."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from qbb_export.distill.cost import needs
from qbb_export.distill.measure import MeasuredModel
from qbb_export.distill.objective import writes_text
from qbb_export.distill.run import Work, learning_text, run_recipe
from qbb_export.distill.student import Target, block_of
from qbb_export.distill.text import Tokens, context_length
from qbb_export.distill.trials import model_facts, try_speeds
from qbb_export.errors import QbbError
from qbb_export.evaluate.metrics import token_nll
from qbb_export.evaluate.text import windows
from qbb_export.format import bits_per_weight
from qbb_export.learning import targets_of
from qbb_export.module import to_device
from qbb_export.opening import OpenModel, largest_of, matrices_of
from qbb_export.quantize import Quantized, dequantize
from qbb_export.record import Record
from qbb_export.studying.runs import ALL, Measured, Run, Scale
from qbb_export.tokens import read_text

if TYPE_CHECKING:
    from qbb_export.studying import Progress, StudyOptions

_WINDOW: Final = 1024  # tokens


class _Stored(Mapping[str, Quantized]):
    """The layers in a record, read one by one when they are asked for."""

    def __init__(self, record: Record, names: Sequence[str]) -> None:
        self._record, self._names = record, names

    def __getitem__(self, name: str) -> Quantized:
        return self._record.load(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class Bench:
    """One model, its written text, and the results so far.

    Args:
        model: a transformers model.
        record: open.
        options: of the studies.
        tell: progress.

    Raises:
        QbbError: no such device, or the text file does not fit the model.
    """

    def __init__(self, model: OpenModel, record: Record, options: StudyOptions, tell: Progress) -> None:
        assert model.torch_model is not None
        to_device(np.zeros(1), options.device)
        self._model, self._loaded, self._record, self._options = model, model.torch_model, record, options
        self._tell = tell
        self._targets = targets_of(model.linears, model.chosen)
        small = options.device == "cpu"
        self.scale = Scale(
            steps=options.steps_here,
            learn=256 if small else 4096,
            validation=16 if small else 64,
            held_out=32 if small else 128,
            reduced=small,
            decoder=writes_text(self._loaded.module),
            bases=options.settings.bases,
        )
        self._windows = self._read_windows()
        self._writing = self._work("study-text", self._text_recipe(), [])
        digest = hashlib.sha256(self._writing.key("study").encode())
        digest.update(repr((self.scale, [w.tobytes() for w in self._windows])).encode())
        self.key = digest.hexdigest()
        self._works: dict[str, Work] = {}
        self._finished: set[str] = set()
        self._text: tuple[list[Tokens], list[Tokens], list[Tokens]] | None = None
        self._measuring: MeasuredModel | None = None
        self._expected: dict[str, float] = {}
        self._done = 0.0

    def expect(self, runs: Sequence[Run]) -> None:
        """Say which runs are to come, so that the time left can be told; tries their parts for some seconds."""
        chain = {run.name: run for last in runs for run in _chain(last)}
        if chain:
            self._expected = self._seconds(list(chain.values()))

    def measure(self, run: Run) -> Measured:
        """How far the result of a run is from the float model."""
        layers, work = self._run(run), self._work_of(run)
        branch, key = work.record, hashlib.sha256(f"{work.key('measure')}:{self.key}".encode()).hexdigest()
        saved = branch.get_tensors("measure", key)
        if saved is None:
            saved = {"figures": np.array(self._measure(layers, run.name))}
            branch.put_tensors("measure", key, saved)
        return _measured(saved["figures"])

    def float_model(self) -> Measured:
        """What the float model itself gives."""
        saved = self._writing.record.get_tensors("measure", self.key)
        if saved is None:
            saved = {"figures": np.array(self._measure(None, "float model"))}
            self._writing.record.put_tensors("measure", self.key, saved)
        return _measured(saved["figures"])

    def _text_recipe(self) -> Any:
        scale, recipe = self.scale, self.scale.recipe("qbb")
        held = scale.validation + scale.held_out
        text = replace(recipe.text, sequences=scale.learn + held, validation=held, keep=1.0)
        return replace(recipe, text=text, distill=tuple(replace(phase, steps=1) for phase in recipe.distill))

    def _parts(self) -> tuple[list[Tokens], list[Tokens], list[Tokens]]:
        """The text to learn from, to validate on and to measure on; written at the first call."""
        if self._text is None:
            learn, rest = learning_text(self._writing)
            share = self.scale.validation / (self.scale.validation + self.scale.held_out)
            if len(rest) > 1:  # batches of an encoder's inputs
                count = max(1, round(share * len(rest)))
                self._text = learn, rest[:count], rest[count:]
            else:
                count = max(1, round(share * len(rest[0])))
                self._text = learn, [rest[0][:count]], [rest[0][count:]]
        return self._text

    def _work(self, name: str, recipe: Any, targets: Sequence[Target], **more: Any) -> Work:
        branch = self._record.branch(name)
        return Work(self._loaded, targets, recipe, branch, self._options.device, self._telling(name), **more)

    def _work_of(self, run: Run) -> Work:
        if run.name not in self._works:
            self._works[run.name] = self._new_work(run)
        return self._works[run.name]

    def _new_work(self, run: Run) -> Work:
        learn, validation, _ = self._parts()
        more: dict[str, Any] = {"text": (_first(learn, run.sequences), validation)}
        if run.after is not None:
            more["start"] = self._run(run.after)
        if run.instead is not None:
            other, names = self._run(run.instead), {t.parameter: t.name for t in self._targets}
            more["weights"] = lambda parameter: dequantize(other[names[parameter]])
        return self._work(f"study-{run.name}", run.recipe, self._targets, **more)

    def _run(self, run: Run) -> _Stored:
        """The layers that a run ends with."""
        work = self._work_of(run)
        if run.name not in self._finished:
            run_recipe(work)
            self._finished.add(run.name)
            self._done += self._expected.pop(run.name, 0.0)
            self._tell_all(0.0, run.name)
        return _Stored(work.record, [target.name for target in self._targets])

    def _measure(self, layers: _Stored | None, name: str) -> tuple[float, float, float]:
        """Distance on held-out text, nats per token of the text file, bits per weight; NaN for what there is not."""
        if self._measuring is None:
            self._measuring = MeasuredModel(self._loaded.module, self._targets)
        self._measuring.put(layers)
        distance = self._measuring.distance(self._parts()[2])
        nll = []
        for number, ids in enumerate(self._windows, 1):
            nll.append(float(token_nll(self._measuring.logits(ids), ids[0]).mean()))
            self._telling(f"study-{name}")("reading the text", number, len(self._windows), "")
        return distance, float(np.mean(nll)) if nll else math.nan, math.nan if layers is None else _bits(layers)

    def _read_windows(self) -> list[Tokens]:
        """The text file, as the model reads it."""
        file, tokenizer = self._options.text, self._loaded.tokenizer
        if file is None:
            return []
        if not self.scale.decoder:
            raise QbbError("only language models have a perplexity", where=f"--text {file}")
        if tokenizer is None:
            raise QbbError("the model has no tokenizer.json to read a text with", where=f"--text {file}")
        length = context_length(self._loaded.module, _WINDOW)
        return windows(read_text(file), tokenizer, length)[: self._options.windows]

    def _seconds(self, runs: Sequence[Run]) -> dict[str, float]:
        """About how long each run takes, from short trials."""
        found: dict[str, float] = {}
        largest = largest_of(self._model.linears)
        starts: dict[str, float] = {}
        speeds = None
        for run in sorted(runs, key=lambda run: -len(run.recipe.distill)):
            matrices = matrices_of(self._model, run.recipe.offset_up_to, block_of)
            facts = model_facts(self._loaded.module, run.recipe, self._options.device)
            offset = matrices[self._model.linears.index(largest)].offset
            settings = replace(self._model.chosen[largest.name], offset=offset)
            [target] = targets_of([largest], {largest.name: settings})
            if speeds is None:
                full = replace(run.recipe, sweep=self.scale.recipe("best").sweep)
                speeds = try_speeds(self._loaded.module, target, full, facts, self._options.device)
            if run.after is None and run.recipe.start not in starts:
                alone = replace(run.recipe, sweep=None, distill=())
                starts[run.recipe.start] = try_speeds(
                    self._loaded.module, target, alone, facts, self._options.device
                ).start
            here = replace(speeds, start=starts[run.recipe.start] if run.after is None else 0.0, write=0.0)
            seconds = sum(need.seconds for need in needs(facts, matrices, run.recipe, here))
            found[run.name] = seconds if math.isfinite(seconds) else 1.0
        return found

    def _telling(self, branch: str) -> Callable[[str, int, int, str], None]:
        name = branch.removeprefix("study-")

        def tell(stage: str, done: int, total: int, note: str) -> None:
            self._tell(f"{name}: {stage}", done, total, note)
            if stage.startswith("distilling") and total:
                self._tell_all(self._expected.get(name, 0.0) * done / total, name)

        return tell

    def _tell_all(self, inside: float, name: str) -> None:
        """Estimated seconds done and in all; how fast they pass tells the time left."""
        total = self._done + sum(self._expected.values())
        if total:
            left = len(self._expected)
            self._tell(ALL, round(self._done + inside), max(1, round(total)), f"{name}; {left} to come")


def _chain(run: Run) -> list[Run]:
    """A run and all that it needs."""
    return [run, *(r for other in (run.after, run.instead) if other is not None for r in _chain(other))]


def _first(text: list[Tokens], sequences: int | None) -> list[Tokens]:
    """The first so many sequences, of batches as many as it takes."""
    if sequences is None:
        return text
    if len(text) == 1:
        return [text[0][:sequences]]
    counts = np.cumsum([len(batch) for batch in text])
    return text[: int(np.searchsorted(counts, sequences)) + 1]


def _bits(layers: Mapping[str, Quantized]) -> float:
    """Bits per weight of all layers together, as they are stored."""
    bits, weights = 0.0, 0
    for layer in layers.values():
        spec, size = layer.spec, layer.spec.N * layer.spec.K
        scale_bits = 8 * layer.scales.dtype.itemsize
        bits += size * bits_per_weight(spec, scale_bits=scale_bits, offset=layer.offset is not None)
        weights += size
    return bits / weights


def _measured(figures: Any) -> Measured:
    distance, nll, bits = (float(value) for value in figures)
    perplexity = None if math.isnan(nll) else math.exp(min(nll, 709.0))
    return Measured(distance, perplexity, None if math.isnan(bits) else bits)
