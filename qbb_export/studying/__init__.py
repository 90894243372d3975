"""``qbb study``: the figures of the QBB paper for one model, kept in a record for ``qbb report`` to draw.

``runs`` says what is run, ``bench`` runs and measures it, ``figures`` makes studies of the numbers; here they are kept.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from qbb_export import __version__
from qbb_export.distill.settings import MODEL_RECIPES
from qbb_export.errors import QbbError
from qbb_export.files import write_whole
from qbb_export.learning import can_learn
from qbb_export.opening import OpenModel, matrices_of, open_model
from qbb_export.quantize import QuantizeSettings
from qbb_export.quantize.matrix import OFFSET_DEFAULTS
from qbb_export.record import REVISION, LayerHead, Record, layer_key
from qbb_export.select import Selection
from qbb_export.source import LoadOptions
from qbb_export.studies import Study, cost_study, weight_studies
from qbb_export.studying.runs import ALL, PLANS, StudyPlan
from qbb_export.weights import InitializerRows

__all__ = ["ALL", "STUDIES", "StudyOptions", "run_studies"]

# From weights alone, then those that run recipes.
STUDIES: Final = ("weights", "cost", *PLANS)

# Called with what is going on, steps done, steps in all, and a few words; ALL is the sum of all runs.
Progress = Callable[[str, int, int, str], None]


@dataclass(frozen=True)
class StudyOptions:
    """What to study, and on what.

    Args:
        only: names in :data:`STUDIES`; empty: all that the model allows.
        settings: bases, group size and so on, of all layers.
        selection: which layers.
        load: how to open MODEL.
        steps: of each distillation; None: 200, on a CPU 20.
        device: ``"cpu"`` or a PyTorch device.
        text: a UTF-8 file for the perplexity of language models, too.
        windows: of the text, at most.

    Raises:
        QbbError: an unknown name, or a number out of range.
    """

    only: tuple[str, ...] = ()
    settings: QuantizeSettings = field(default_factory=QuantizeSettings)
    selection: Selection = field(default_factory=Selection)
    load: LoadOptions = field(default_factory=LoadOptions)
    steps: int | None = None
    device: str = "cpu"
    text: Path | None = None
    windows: int = 32

    def __post_init__(self) -> None:
        for name in self.only:
            if name not in STUDIES:
                raise QbbError("unknown study", where="--only", expected=f"of {', '.join(STUDIES)}", got=name)
        for option, number in (("--steps", self.steps), ("--windows", self.windows)):
            if number is not None and number < 1:
                raise QbbError("out of range", where=option, expected=">= 1", got=number)

    @property
    def steps_here(self) -> int:
        """Steps of each distillation on the device."""
        return self.steps or (20 if self.device == "cpu" else 200)


def run_studies(source: str, folder: Path, options: StudyOptions, tell: Progress) -> list[Path]:
    """Run studies and keep them in ``folder/studies``; those that are there and would be the same are not run again.

    The recipes' runs are kept in ``folder/branches``, so an interrupted study goes on where it stopped.

    Args:
        source: MODEL.
        folder: a record; made if it is not there. What an export keeps in it stays.
        options: which studies.
        tell: progress.

    Returns:
        The files of all studies asked for.

    Raises:
        QbbError: the model cannot be opened or does not take token ids, the record cannot be written, or the text does
            not fit.
    """
    tell("reading the model", 0, 1, "")
    model = open_model(source, options.load, options.selection, options.settings)
    tell("reading the model", 1, 1, "")
    able = can_learn(model.torch_model)
    names = options.only or (STUDIES if able else STUDIES[:2])
    runs = [name for name in names if name in PLANS]
    if runs and not able:
        what, expected = "these studies need a transformers model that takes token ids", ",".join(STUDIES[:2])
        raise QbbError(what, where=source, expected=f"--only {expected}", got=",".join(runs))
    with _record(folder) as record:
        shelf = _Shelf(folder, options, _weights_digest(model))
        found = [
            path
            for name in names
            if name not in PLANS
            for path in shelf.study(name, _simple(name, model, options, tell))
        ]
        if runs:
            from qbb_export.studying.bench import Bench

            bench = Bench(model, record, options, tell)
            plans = {name: PLANS[name](bench.scale) for name in runs}
            wanted = {name: plan for name, plan in plans.items() if not shelf.has(name, bench.key)}
            bench.expect([run for plan in wanted.values() for run in plan.runs()])
            for name, plan in plans.items():
                found += shelf.study(name, _measured(plan, bench), bench.key)
    return found


def _simple(name: str, model: OpenModel, options: StudyOptions, tell: Progress) -> Callable[[], list[Study]]:
    """What needs no run of a recipe."""
    if name == "cost":
        return lambda: [cost_study(_heads(model))]
    layers = _Layers(model)
    return lambda: weight_studies(layers, options.settings, lambda stage, done, total: tell(stage, done, total, ""))


def _measured(plan: StudyPlan, bench: Any) -> Callable[[], list[Study]]:
    return lambda: plan.studies({run.name: bench.measure(run) for run in plan.runs()}, bench.scale, bench.float_model())


class _Layers(Mapping[str, Any]):
    """The chosen weights, opened when they are asked for."""

    def __init__(self, model: OpenModel) -> None:
        self._linears = {linear.name: linear for linear in model.linears}

    def __getitem__(self, name: str) -> InitializerRows:
        return InitializerRows(self._linears[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._linears)

    def __len__(self) -> int:
        return len(self._linears)


def _heads(model: OpenModel) -> list[LayerHead]:
    """The layers as the default recipe would store them, with float16 scales."""
    learns = can_learn(model.torch_model)
    matrices = matrices_of(model, MODEL_RECIPES["best"].offset_up_to if learns else OFFSET_DEFAULTS["fast"])
    return [
        LayerHead(linear.name, matrix.spec, 16, matrix.offset, (0.0,))
        for linear, matrix in zip(model.linears, matrices, strict=True)
    ]


def _weights_digest(model: OpenModel) -> str:
    """SHA-256 of all chosen weights and their settings."""
    digest = hashlib.sha256()
    for linear in model.linears:
        rows = InitializerRows(linear)
        digest.update(f"{linear.name}:{layer_key(rows, model.chosen[linear.name], 'study')}".encode())
        rows.close()
    return digest.hexdigest()


@contextmanager
def _record(folder: Path) -> Iterator[Record]:
    """The record under its lock; the manifest goes on saying what the export said."""
    manifest = folder / "manifest.json"
    before = manifest.read_bytes() if manifest.is_file() else None
    with Record.open(folder, recipe="study") as record:
        if before is not None:
            write_whole(manifest, before)
        yield record


class _Shelf:
    """``studies/<study>.json``, and beside them ``<name>.key`` for a name in STUDIES: what its files were made of."""

    def __init__(self, folder: Path, options: StudyOptions, weights: str) -> None:
        self._folder, self._options, self._weights = folder / "studies", options, weights

    def study(self, name: str, make: Callable[[], list[Study]], more: str = "") -> list[Path]:
        """The files of a name, made now unless they are there."""
        if self.has(name, more):
            return [self._folder / file for file in self._files(name)]
        made = make()
        try:
            self._folder.mkdir(exist_ok=True)
            old = self._files(name)
            files = {f"{study.name}.json": study.as_json().encode("ascii") for study in made}
            for file, data in files.items():
                write_whole(self._folder / file, data)
            for file in old.keys() - files.keys():
                (self._folder / file).unlink(missing_ok=True)
            sums = {file: hashlib.sha256(data).hexdigest() for file, data in files.items()}
            head = {"files": sums, "key": self._key(name, more)}
            write_whole(self._folder / f"{name}.key", json.dumps(head, sort_keys=True).encode("ascii"))
        except OSError as error:
            raise QbbError("cannot write the study", where=self._folder, got=error) from error
        return [self._folder / file for file in files]

    def has(self, name: str, more: str = "") -> bool:
        """Whether all files are there, whole, and made of the same things."""
        try:
            head = json.loads((self._folder / f"{name}.key").read_bytes())
            sums = {file: hashlib.sha256((self._folder / file).read_bytes()).hexdigest() for file in head["files"]}
            return bool(head == {"files": sums, "key": self._key(name, more)})
        except (OSError, LookupError, TypeError, ValueError):
            return False

    def _files(self, name: str) -> dict[str, str]:
        """File names that the key file lists."""
        try:
            files = json.loads((self._folder / f"{name}.key").read_bytes())["files"]
            return {file: str(mark) for file, mark in files.items() if Path(file).name == file}
        except (OSError, LookupError, TypeError, ValueError, AttributeError):
            return {}

    def _key(self, name: str, more: str) -> str:
        head: Sequence[object] = (name, more, self._weights, self._options.settings.as_dict(), REVISION, __version__)
        return hashlib.sha256(json.dumps(head, sort_keys=True).encode()).hexdigest()
