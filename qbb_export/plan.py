"""``--plan``: what an export would take in memory, disk and time, told before anything starts."""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from qbb_export.destination import destination
from qbb_export.distill.cost import Matrix, Need, needs, start_need
from qbb_export.distill.settings import ModelRecipe, gptq_before
from qbb_export.distill.timing import seconds_at
from qbb_export.learning import check_can_learn, default_recipe, targets_of
from qbb_export.opening import OpenModel, largest_of, matrices_of, open_model
from qbb_export.passes.linears import Linear
from qbb_export.pipeline import ExportOptions
from qbb_export.quantize import RECIPES, quantize
from qbb_export.quantize.matrix import OFFSET_DEFAULTS
from qbb_export.weights import InitializerRows

if TYPE_CHECKING:
    from qbb_export.source import TorchModel

# Seconds a byte of the output: written and hashed; opened twice, unpacked and run.
_WRITING: Final = 7e-9
_VERIFYING: Final = 6e-8
# Bytes that verifying takes for each weight of the largest node: bits, signs and sums of it as floats.
_DENSE_BYTES: Final = 32
# What CUDA itself keeps on a GPU.
_CUDA_CONTEXT: Final = 600 << 20


@dataclass(frozen=True)
class Stage:
    """One stage of an export.

    Args:
        name: of the stage.
        host: bytes of memory at the peak, program and model included.
        device: the same on a GPU; 0 where none is used.
        disk: bytes written.
        removed: of these, gone when the run is over.
        seconds: about; None where it could not be tried.
    """

    name: str
    host: int
    device: int
    disk: int
    removed: int
    seconds: float | None


@dataclass(frozen=True)
class Plan:
    """An export that has not started.

    Args:
        output: what would be written.
        recipe: its name.
        device: that the recipe would run on.
        layers: matrices to quantise.
        weights: of them, in all.
        stages: in order.
    """

    output: Path
    recipe: str
    device: str
    layers: int
    weights: int
    stages: tuple[Stage, ...]

    @property
    def total(self) -> Stage:
        """Largest memory, all disk and all time."""
        seconds = [stage.seconds for stage in self.stages if stage.seconds is not None]
        return Stage(
            "in all",
            max(stage.host for stage in self.stages),
            max(stage.device for stage in self.stages),
            sum(stage.disk for stage in self.stages),
            sum(stage.removed for stage in self.stages),
            sum(seconds) if len(seconds) == len(self.stages) else None,
        )

    def as_json(self) -> str:
        """Bytes and seconds by stage, and in all."""
        value = {**asdict(self), "output": str(self.output), "total": asdict(self.total)}
        return json.dumps(value, indent=1, allow_nan=False)


def make_plan(source: str, output: Path, options: ExportOptions) -> Plan:
    """Read the model, try its parts for a few seconds, and say what the export would take. Nothing is written.

    Memory and disk follow from shapes and settings (``distill.cost`` says how), on top of what this process holds after
    reading the model. Time is taken from the trials. Results in a record that is there already are not looked at.

    Args:
        source: MODEL.
        output: what would be written.
        options: of the export.

    Raises:
        QbbError: whatever the export would refuse before its work.
    """
    destination(output, options.folder).check(force=options.force)
    began = time.perf_counter()
    model = open_model(source, options.load, options.selection, options.settings)
    base = _resident()
    read = Stage("read the model", base, 0, 0, 0, time.perf_counter() - began)
    recipe = options.recipe or default_recipe(model.torch_model)
    found, matrices = _needs(model, recipe, options, source)
    cuda = options.device != "cpu"
    size = sum(matrix.packed for matrix in matrices) + _rest(model, model.linears if matrices else ())
    memory, largest = base + _own_bytes(model), largest_node(matrices, fuse=options.fuse)
    stages = [read, *(_stage(need, base, cuda=cuda) for need in found)]
    stages.append(Stage("write the file", memory, 0, size, 0, _WRITING * size))
    if options.verify:
        stages.append(Stage("verify", memory + 2 * size + _DENSE_BYTES * largest, 0, 0, 0, _VERIFYING * size))
    weights = sum(matrix.weights for matrix in matrices)
    return Plan(output, recipe, options.device, len(matrices), weights, tuple(stages))


def _needs(model: OpenModel, recipe: str, options: ExportOptions, source: str) -> tuple[list[Need], list[Matrix]]:
    """The stages of a recipe, and the layers as it stores them."""
    if recipe == "float":
        return [], []
    if recipe in RECIPES:
        options.learning.refuse(recipe)
        matrices = matrices_of(model, OFFSET_DEFAULTS.get(recipe, 0))
        return [_weights_need(model, matrices, recipe, options.device)], matrices
    loaded = check_can_learn(model.torch_model, recipe, source)
    chosen, device = options.learning.apply(recipe, options.device), options.device
    found, matrices = _recipe_needs(model, loaded, chosen, device)
    if options.learning.start == "gptq":
        before, _ = _recipe_needs(model, loaded, gptq_before(chosen), device)
        found = [*(replace(need, stage=f"gptq: {need.stage}") for need in before), *found]
    return found, matrices


def largest_node(matrices: Sequence[Matrix], *, fuse: bool) -> int:
    """Weights of the largest node, if all layers with the same input become one."""
    sizes: Counter[object] = Counter()
    for index, matrix in enumerate(matrices):
        sizes[matrix.reads if fuse else index] += matrix.weights
    return max(sizes.values(), default=0)


def _resident() -> int:
    """Bytes of memory that this process holds; its peak where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize()
    except (OSError, ValueError, IndexError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def _stage(need: Need, base: int, *, cuda: bool) -> Stage:
    """On a CPU all memory is the host's."""
    host = base + need.host + (0 if cuda else need.working)
    device = _CUDA_CONTEXT + need.working if cuda else 0
    seconds = None if math.isnan(need.seconds) else need.seconds
    return Stage(need.stage, host, device, need.disk, need.removed, seconds)


def _rest(model: OpenModel, linears: Sequence[Linear]) -> int:
    """Bytes of the initializers that stay as they are."""
    replaced = {linear.weight.name for linear in linears}
    return sum(
        value.const_value.nbytes
        for name, value in model.graph.graph.initializers.items()
        if name not in replaced and value.const_value is not None
    )


def _own_bytes(model: OpenModel) -> int:
    """Bytes of the model's parameters; files are mapped, so reading them took no memory yet. None of an .onnx file
    stays: it is read layer by layer.
    """
    if model.torch_model is None:
        return 0
    return sum(p.numel() * p.element_size() for p in model.torch_model.module.parameters())


def _weights_need(model: OpenModel, matrices: Sequence[Matrix], recipe: str, device: str) -> Need:
    """The one stage of a recipe that looks at weights alone."""
    largest = largest_of(model.linears)
    rows = InitializerRows(largest, device)
    try:
        seconds = seconds_at(
            lambda count: quantize(rows.rows(0, count), model.chosen[largest.name], recipe), largest.out_features
        )
    finally:
        rows.close()
    each = seconds / (largest.in_features * largest.out_features)
    return start_need(matrices, each, _own_bytes(model) if device == "cpu" else 0, cuda=device != "cpu")


def _recipe_needs(
    model: OpenModel, loaded: TorchModel, recipe: ModelRecipe, device: str
) -> tuple[list[Need], list[Matrix]]:
    """The stages of a recipe that learns."""
    from qbb_export.distill.student import block_of
    from qbb_export.distill.trials import model_facts, try_speeds

    matrices = matrices_of(model, recipe.offset_up_to, block_of)
    facts = model_facts(loaded.module, recipe, device)
    largest = largest_of(model.linears)
    settings = replace(model.chosen[largest.name], offset=matrices[model.linears.index(largest)].offset)
    [target] = targets_of([largest], {largest.name: settings})
    return needs(facts, matrices, recipe, try_speeds(loaded.module, target, recipe, facts, device)), matrices
