"""Everything that a report shows, read from a record without changing it."""

from __future__ import annotations

import json
import math
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qbb_export.errors import QbbError
from qbb_export.format import bits_per_weight
from qbb_export.record import RECORD_FORMAT, LayerHead, read_layers
from qbb_export.studies import Series, Study, cost_study
from qbb_export.studies.study import DAMAGE


@dataclass(frozen=True)
class LogLine:
    """One line of ``distill/log.jsonl``: losses and the learning rate at a step; None for a loss that is no number.

    Steps count through all phases.
    """

    phase: int
    step: int
    loss: float | None
    validation: float | None
    rate: float


@dataclass(frozen=True)
class ReportData:
    """What a report shows.

    Args:
        record: name of the folder.
        manifest: what ``manifest.json`` says, nested values as ``settings.bases``.
        layers: finished layers, in their natural order.
        cost: of the layers.
        charts: of the layers' errors.
        studies: from ``studies/*.json``, by name.
        training: from ``distill/log.jsonl``.
        missing: what is not there and how to get it, a sentence each.
    """

    record: str
    manifest: dict[str, Any]
    layers: tuple[LayerHead, ...]
    cost: Study
    charts: tuple[Study, ...]
    studies: tuple[Study, ...]
    training: tuple[LogLine, ...]
    missing: tuple[str, ...]

    def as_json(self) -> str:
        """JSON that depends on the values only."""
        value = {
            "record": self.record,
            "manifest": self.manifest,
            "layers": [{**asdict(layer), "bits_per_weight": layer_bits(layer)} for layer in self.layers],
            "cost": asdict(self.cost),
            "charts": [asdict(study) for study in self.charts],
            "studies": [asdict(study) for study in self.studies],
            "training": [asdict(line) for line in self.training],
            "missing": self.missing,
        }
        return json.dumps(value, sort_keys=True, indent=1, allow_nan=False) + "\n"


def layer_bits(layer: LayerHead) -> float:
    """Bits per weight as they are stored in the record, scales, offset and padding counted."""
    return bits_per_weight(layer.spec, scale_bits=layer.scale_bits, offset=layer.offset)


def collect(folder: Path) -> ReportData:
    """Read a record.

    Args:
        folder: ``MODEL.qbb``.

    Raises:
        QbbError: it is no record, or a file in it is damaged or cannot be read.
    """
    manifest = _manifest(folder)
    layers = tuple(read_layers(folder))
    studies = tuple(Study.from_json(_read(path), path) for path in sorted(folder.glob("studies/*.json")))
    training = _training(folder / "distill" / "log.jsonl")
    charts = (_errors_by_layer(layers), *_errors_by_stage(folder, layers, manifest.get("recipe"))) if layers else ()
    return ReportData(
        record=folder.resolve().name,
        manifest=manifest,
        layers=layers,
        cost=cost_study(layers),
        charts=charts,
        studies=studies,
        training=training,
        missing=_missing(folder, layers, studies, training),
    )


def training_studies(training: tuple[LogLine, ...], most: int = 600) -> list[Study]:
    """Charts of the loss and of the rate; of more than ``most`` lines every second, third, … and all validations."""
    if not training:
        return []
    every = math.ceil(len(training) / most)
    phases = sorted({line.phase for line in training})
    loss, rate = [], []
    for phase in phases:
        lines = [line for line in training if line.phase == phase]
        suffix = f", phase {phase}" if len(phases) > 1 else ""
        some, checks = lines[::every], [line for line in lines if line.validation is not None]
        steps = tuple(line.step for line in some)
        loss.append(Series(f"training{suffix}", steps, tuple(line.loss for line in some)))
        if checks:
            seen = tuple(line.validation for line in checks)
            loss.append(Series(f"validation{suffix}", tuple(line.step for line in checks), seen))
        rate.append(Series(f"rate{suffix}", steps, tuple(line.rate for line in some)))
    note = f"{len(training)} lines of the log, {'all' if every == 1 else f'one of {every}'} drawn."
    return [
        Study("training-loss", "Loss", "lines", "step", "loss", tuple(loss), note=note),
        Study("training-rate", "Learning rate", "lines", "step", "rate", tuple(rate)),
    ]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise QbbError("cannot read the record", where=path, got=error) from error


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    if not path.is_file():
        raise QbbError("not a record", where=folder, expected="a folder that qbb-export made, with manifest.json")
    try:
        manifest = json.loads(_read(path))
        version = manifest["format"]
        plain = _flat(manifest)
        json.dumps(plain, allow_nan=False)
    except DAMAGE as error:
        raise QbbError("manifest.json is damaged", where=folder, got=error) from error
    if version != RECORD_FORMAT:
        raise QbbError("record of another format", where=folder, expected=RECORD_FORMAT, got=version)
    return plain


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    plain: dict[str, Any] = {}
    for key, inner in value.items():
        if isinstance(inner, dict):
            plain |= _flat(inner, f"{prefix}{key}.")
        else:
            plain[prefix + key] = inner
    return plain


def _training(path: Path) -> tuple[LogLine, ...]:
    """The log, without a last line that a kill cut off."""
    if not path.is_file():
        return ()
    whole, _, _ = _read(path).rpartition(b"\n")
    lines: list[LogLine] = []
    before = last = 0  # steps of the phases before this one, and step of the line before
    for number, text in enumerate(whole.splitlines(), 1):
        try:
            entry = json.loads(text)
            phase, step = int(entry.get("phase", 1)), int(entry["step"])
            loss, validation, rate = (_loss(entry[key]) for key in ("loss", "validation", "rate"))
        except DAMAGE as error:
            raise QbbError("damaged line", where=f"{path}, line {number}", got=error) from error
        if lines and phase != lines[-1].phase:
            before = last
        last = before + step
        lines.append(LogLine(phase, last, loss, validation, rate or 0.0))
    return tuple(lines)


def _loss(value: Any) -> float | None:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"expected a number, got {value!r}")
    return value


def _errors_by_layer(layers: tuple[LayerHead, ...]) -> Study:
    series = []
    for bases in sorted({layer.spec.bases for layer in layers}):
        chosen = [layer for layer in layers if layer.spec.bases == bases]
        names, errors = tuple(layer.name for layer in chosen), tuple(layer.errors[-1] for layer in chosen)
        series.append(Series(f"N = {bases}", names, errors))
    return Study("layers-error", "Error of each layer", "bars", "layer", "relative squared error", tuple(series))


def _errors_by_stage(folder: Path, layers: tuple[LayerHead, ...], recipe: Any) -> list[Study]:
    """Mean error as the recipe went on, one line for all layers with as many stages."""
    earlier = {
        name: {layer.name: len(layer.errors) for layer in read_layers(folder, name)} for name in ("start", "sweep")
    }
    series = []
    for count in sorted({len(layer.errors) for layer in layers} - {1}):
        chosen = [layer for layer in layers if len(layer.errors) == count]
        mean = tuple(sum(column) / len(chosen) for column in zip(*(layer.errors for layer in chosen), strict=True))
        # A record may hold stages of another recipe that ran before: only what fits is believed.
        lengths = {name: found.get(chosen[0].name, 0) for name, found in earlier.items()}
        names = stage_names(str(recipe), count, lengths["start"], lengths["sweep"])
        first = int(names[0] == "no basis")  # its error is 1, far above all others
        series.append(Series(f"{len(chosen)} layers", names[first:], mean[first:]))
    if not series:
        return []
    note = "Mean over the layers; the last is what is stored. Learning goes by the model's outputs, and may raise it."
    title, y_label = "Error of the weights as the recipe went on", "relative squared error"
    return [Study("stages-error", title, "lines", "stage", y_label, tuple(series), note=note)]


def stage_names(recipe: str, count: int, start: int = 0, sweep: int = 0) -> tuple[str, ...]:
    """What the errors of a layer stand for.

    Args:
        recipe: as in the manifest.
        count: how many errors there are.
        start: how many there were after the stage that looks at weights alone; 0: it was the only one.
        sweep: how many after the Hessian-aware sweep; 0: there was none.
    """
    start = start if 0 < start <= count else count
    sweep = sweep if start < sweep <= count else start
    if recipe == "greedy" and start >= 3:
        names = ["no basis", *(f"basis {i}" for i in range(1, start - 1)), "stored"]
    elif recipe in ("refine", "settled", "qbb") and start >= (5 if recipe == "refine" else 7):
        last = ["stored"] if recipe == "refine" else ["rounded", "alternating", "stored"]
        stages = (f"stage {i}" for i in range(1, start - 2 - len(last)))
        names = ["no basis", "initialisation", *stages, "least squares", *last]
    elif start >= 3:
        names = [*(f"round {i}" for i in range(start - 2)), "shakes", "stored"]
    else:
        names = [*(f"step {i}" for i in range(start - 1)), "stored"]
    swept = [f"sweep {i}" if sweep - start > 1 else "sweep" for i in range(1, sweep - start + 1)]
    return (*names, *swept, *(f"learnt {i}" for i in range(1, count - sweep + 1)))


def _missing(
    folder: Path, layers: tuple[LayerHead, ...], studies: tuple[Study, ...], training: tuple[LogLine, ...]
) -> tuple[str, ...]:
    record = shlex.quote(str(folder))
    missing = []
    if not layers:
        missing.append(f"No layer is finished yet: qbb-export MODEL -o FILE.onnx --record {record} makes them.")
    if not any(study.name.startswith("weights-") for study in studies):
        missing.append(f"No studies of the weights: qbb study MODEL --record {record} makes them.")
    if not training:
        missing.append("No training curve: qbb-export with a recipe that distils (--recipe best or qbb) writes one.")
    return tuple(missing)
