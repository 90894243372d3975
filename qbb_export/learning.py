"""From a graph's linear layers to a recipe that needs the whole PyTorch model, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qbb_export.checkpoint import QuantizedCheckpoint
from qbb_export.distill.settings import MODEL_RECIPES, LearningOptions, ModelRecipe, gptq_before
from qbb_export.errors import QbbError
from qbb_export.passes.linears import Linear
from qbb_export.quantize import RECIPES, Quantized, QuantizeSettings, dequantize
from qbb_export.record import Record
from qbb_export.source import TorchModel

if TYPE_CHECKING:
    from qbb_export.distill.run import Progress
    from qbb_export.distill.student import Target

RECIPE_NAMES = (*MODEL_RECIPES, *RECIPES, "float")


def can_learn(model: TorchModel | None) -> bool:
    """Whether inputs can be made up for a model: it is one of transformers that takes token ids."""
    return model is not None and model.pretrained and model.module.main_input_name == "input_ids"


def default_recipe(model: TorchModel | None) -> str:
    """Of a model, or of an .onnx file."""
    return "best" if can_learn(model) else "fast"


def check_can_learn(model: TorchModel | None, recipe: str, source: str) -> TorchModel:
    """The model, if ``recipe`` can be run on it.

    Raises:
        QbbError: it cannot.
    """
    if model is None or not can_learn(model):
        raise QbbError(
            "this recipe needs a transformers model that takes token ids",
            where=f"--recipe {recipe}",
            expected=f"--recipe {' or '.join(RECIPES)} for {source}",
        )
    return model


def targets_of(linears: Sequence[Linear], chosen: Mapping[str, QuantizeSettings]) -> list[Target]:
    """Layers as the recipes that learn know them, one for each weight."""
    from qbb_export.distill.student import Target

    return [
        Target(linear.name, linear.weight.name or "", not linear.transposed, chosen[linear.name])
        for linear in {linear.name: linear for linear in linears}.values()
    ]


def learn(
    model: TorchModel,
    linears: Sequence[Linear],
    chosen: Mapping[str, QuantizeSettings],
    recipe: str,
    options: LearningOptions,
    device: str,
    record_path: Path,
    tell: Progress,
) -> tuple[Record | None, dict[str, Quantized]]:
    """Quantise layers by a recipe in ``distill.settings.MODEL_RECIPES``.

    Args:
        model: the float model.
        linears: its layers.
        chosen: settings by layer.
        recipe: its name.
        options: changes to it.
        device: PyTorch device; of several processes each takes the GPU of its number.
        record_path: folder of the record; several processes have to see the same.
        tell: progress.

    Returns:
        The record, closed but readable (None in all but the first of several processes), and the layers by name.

    Raises:
        QbbError: an option that does not fit, an unknown recipe, no such device, a record that cannot be written.
    """
    from qbb_export.distill.ranks import Ranks
    from qbb_export.distill.run import Work, run_recipe
    from qbb_export.module import to_device

    if recipe not in MODEL_RECIPES:
        raise QbbError("unknown recipe", where="--recipe", expected=f"one of {', '.join(RECIPE_NAMES)}", got=recipe)
    plan = options.apply(recipe, device)
    targets = targets_of(linears, chosen)
    place = Ranks.device(device)
    to_device(np.zeros(1, dtype=np.float32), place)  # no such device: told before anything is done
    ranks = Ranks.of_environment(place)
    record = Record.open(record_path, recipe=recipe) if ranks.first else None
    ranks.wait()
    try:
        shared = record or Record.join(record_path)
        weights = _start_from(options.start, model, targets, plan, shared, place, tell, ranks)
        work = Work(model, targets, plan, shared, place, tell, options.calibration, weights, ranks)
        layers = run_recipe(work)
    except QbbError as error:
        if not ranks.first:
            error.add_note(f"in process {ranks.rank}")
        raise
    finally:
        if record is not None:
            record.close()
    ranks.leave()
    model.module.to("cpu")
    return record, layers


def _start_from(
    start: str | None,
    model: TorchModel,
    targets: Sequence[Target],
    plan: ModelRecipe,
    record: Record,
    device: str,
    tell: Progress,
    ranks: Any,
) -> Callable[[str], Any] | None:
    """What gives the matrices to approximate, if not the model itself."""
    if start is None:
        return None
    if start != "gptq":
        checkpoint = QuantizedCheckpoint.open(Path(start))
        return checkpoint.weight
    from qbb_export.distill.run import Work, run_recipe

    work = Work(model, targets, gptq_before(plan), record.branch("gptq"), device, tell, ranks=ranks)
    names = {t.parameter: t.name for t in targets}
    layers = run_recipe(work)
    return lambda parameter: dequantize(layers[names[parameter]])
