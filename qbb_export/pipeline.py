"""MODEL to ``model.onnx``: capture, quantise layer by layer, rewrite the graph, write it, verify what was written."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes import common

from qbb_export.comparing import compare_all, float_outputs, student_of
from qbb_export.destination import FolderOptions, destination
from qbb_export.distill.settings import MODEL_RECIPES, LearningOptions
from qbb_export.format import LAYOUT_TILED, Spec, bits_per_weight, mode_number, to_layout
from qbb_export.learning import check_can_learn, default_recipe, learn
from qbb_export.passes.binarize import BinarizeLinears, PackedLayer
from qbb_export.passes.function_body import AttachFunctionBody
from qbb_export.passes.fuse import FuseLinears
from qbb_export.passes.linears import Linear, find_linears
from qbb_export.passes.lookups import BinarizeLookups, find_lookups
from qbb_export.passes.normalize import NormalizeLinears
from qbb_export.passes.prepare import prepare_passes
from qbb_export.passes.verify import VerifyBinaryBasis
from qbb_export.quantize import RECIPES, Quantized, QuantizeSettings
from qbb_export.record import Record
from qbb_export.select import Selection, select_layers, select_lookups
from qbb_export.source import LoadOptions, parameter_owners
from qbb_export.verification import Array, Comparison
from qbb_export.weights import InitializerRows

# Called with the name of a stage, steps done, steps in all, and a few words on how it goes.
Progress = Callable[[str, int, int, str], None]

# Packed layers in memory while the file is written: a node's initializers come one after the other, and each of them
# wants all the layers that were fused. q, k and v are three; of more, each is read once for each initializer.
_KEPT_LAYERS = 3


@dataclass(frozen=True)
class ExportOptions:
    """What to make of a model.

    Args:
        recipe: a name in ``quantize.RECIPES`` (weights alone) or ``distill.settings.MODEL_RECIPES`` (the model's own
            text, too), or ``"float"`` to leave every layer as it is. None: ``"best"`` for transformers models that
            take token ids, ``"fast"`` for all others.
        settings: bases, group size and so on, for all layers that no override names.
        selection: which layers.
        load: how to open MODEL.
        layout: ``LAYOUT_TILED`` or ``LAYOUT_ROWS``.
        fuse: make one node of layers that share their input and settings.
        mode: name in ``format.MODES``: what kernels may do to activations.
        device: ``"cpu"``, or a PyTorch device such as ``"cuda"`` to quantise and learn on.
        learning: for recipes that learn from the model's own text.
        folder: for an output that is a folder.
        record: folder of the per-layer results; default: ``OUTPUT`` with the suffix ``.qbb``.
        force: replace an existing output.
        verify: open the written file and compare.
    """

    recipe: str | None = None
    settings: QuantizeSettings = field(default_factory=QuantizeSettings)
    selection: Selection = field(default_factory=Selection)
    load: LoadOptions = field(default_factory=LoadOptions)
    layout: int = LAYOUT_TILED
    fuse: bool = True
    mode: str = "exact"
    device: str = "cpu"
    learning: LearningOptions = field(default_factory=LearningOptions)
    folder: FolderOptions = field(default_factory=FolderOptions)
    record: Path | None = None
    force: bool = False
    verify: bool = True


@dataclass(frozen=True)
class LayerReport:
    """One quantised matrix: its attributes as a node of its own, types of what is stored, relative squared error."""

    name: str
    spec: Spec
    scale_type: ir.DataType
    offset: bool
    relative_error: float

    @property
    def bits_per_weight(self) -> float:
        """Scales, offsets and padding counted."""
        return bits_per_weight(self.spec, scale_bits=self.scale_type.bitwidth, offset=self.offset)


@dataclass(frozen=True)
class ExportReport:
    """What :func:`export` did.

    Attributes:
        output: the written .onnx file or folder.
        file_bytes: graph and data together.
        float_bytes: what the quantised matrices would take as float32.
        packed_bytes: what they take now.
        layers: one entry per quantised matrix.
        comparisons: the verification table; empty if it was skipped.
    """

    output: Path
    file_bytes: int
    float_bytes: int
    packed_bytes: int
    layers: tuple[LayerReport, ...]
    comparisons: tuple[Comparison, ...]

    @property
    def bits_per_weight(self) -> float:
        """Of all quantised matrices together."""
        return 32.0 * self.packed_bytes / self.float_bytes if self.float_bytes else 32.0

    @property
    def ok(self) -> bool:
        """All comparisons within their bounds."""
        return all(row.ok for row in self.comparisons)


def export(source: str, output: Path, options: ExportOptions, progress: Progress | None = None) -> ExportReport:
    """Quantise a model and write it as ONNX. A run that was interrupted goes on from the layers it had finished.

    Args:
        source: MODEL; see ``capture``.
        output: a path that ends in ``.onnx``, or a folder to make for a decoder; see ``destination``.
        options: what to make of it.
        progress: told what is going on.

    Raises:
        QbbError: anything wrong with the input or the output place; nothing is written then but finished layers in the
            record.
    """
    report = progress or (lambda stage, done, total, note: None)

    def tell(stage: str, done: int, total: int, note: str = "") -> None:
        report(stage, done, total, note)

    mode = mode_number(options.mode)
    first = os.environ.get("RANK", "0") == "0"  # of several processes one writes; see distill.ranks
    place = destination(output, options.folder)
    if first:
        place.check(force=options.force)
    tell("reading the model", 0, 1)
    model, torch_model = place.open(source, options.load)
    tell("reading the model", 1, 1)
    prepare_passes()(model)
    VerifyBinaryBasis()(model)  # what would be refused at the end is refused before the work
    recipe = options.recipe or default_recipe(torch_model)
    if not first and recipe not in MODEL_RECIPES:
        return ExportReport(output, 0, 0, 0, (), ())  # nothing to share
    if recipe == "float":
        layers: dict[str, LayerReport] = {}
        linears: list[Linear] = []
        lookups: list[Linear] = []
        record = None
    else:
        linears, rejected = find_linears(model)
        owners = None if torch_model is None else parameter_owners(torch_model)
        chosen = select_layers(model, linears, rejected, options.selection, options.settings, owners)
        lookups = find_lookups(model)
        tables = select_lookups(lookups, linears, chosen, options.selection, options.settings)
        linears = [linear for linear in linears if linear.name in chosen]
        lookups = [lookup for lookup in lookups if lookup.name in tables]
        record_path = options.record or place.record
        if recipe in RECIPES:
            options.learning.refuse(recipe)
            with Record.open(record_path, recipe=recipe, settings=options.settings) as record:
                layers = _quantize_all([*linears, *lookups], {**chosen, **tables}, options, recipe, record, tell)
        else:
            record, quantized = learn(
                check_can_learn(torch_model, recipe, source),
                linears,
                chosen,
                recipe,
                options.learning,
                options.device,
                record_path,
                report,
            )
            if record is None:  # another process of this run writes the file
                return ExportReport(output, 0, 0, 0, (), ())
            layers = {name: _layer_report(name, layer, options) for name, layer in quantized.items()}
            tables = {name: settings for name, settings in tables.items() if name not in layers}
            if tables:  # no recipe learns them: they are quantised by their weights
                own = [lookup for lookup in lookups if lookup.name in tables]
                with Record.open(record_path, recipe=recipe) as writable:
                    layers |= _quantize_all(own, tables, options, "fast", writable, tell)
        _rewrite(model, linears, lookups, layers, record, mode, fuse=options.fuse)
    common.ClearMetadataAndDocStringPass()(model)
    model.producer_name, model.producer_version = "qbb-export", None
    VerifyBinaryBasis()(model)
    comparisons: list[Comparison] = []
    feeds, expected = float_outputs(model, source, torch_model) if options.verify else (None, None)
    try:
        file_bytes = place.write(model, torch_model, lambda done, total: tell("writing", done, total))
        if options.verify:
            tell("verifying", 0, 1)
            student = student_of(torch_model, linears, lookups, record)
            comparisons = compare_all(model, place.file, student, feeds, expected, options.mode)
            tell("verifying", 1, 1)
    except BaseException:
        place.abandon()
        raise
    place.commit()
    packed = sum(r.bits_per_weight * r.spec.K * r.spec.N / 8 for r in layers.values())
    return ExportReport(
        output=output,
        file_bytes=file_bytes,
        float_bytes=sum(4 * r.spec.K * r.spec.N for r in layers.values()),
        packed_bytes=round(packed),
        layers=tuple(layers.values()),
        comparisons=tuple(comparisons),
    )


def _quantize_all(
    linears: list[Linear],
    chosen: Mapping[str, QuantizeSettings],
    options: ExportOptions,
    recipe: str,
    record: Record,
    tell: Callable[[str, int, int], None],
) -> dict[str, LayerReport]:
    """Quantise each weight once, in execution order; finished ones are taken from the record."""
    by_name = {linear.name: linear for linear in linears}
    total = sum(linear.in_features * linear.out_features for linear in by_name.values())
    done = 0
    reports: dict[str, LayerReport] = {}
    for name, linear in by_name.items():
        settings = chosen[name]
        source = InitializerRows(linear, options.device)
        rows = linear.in_features

        def on_rows(finished: int, _: int, base: int = done, row: int = rows) -> None:
            tell("quantising weights", base + finished * row, total)

        try:
            layer = record.quantized(name, source, settings, recipe, on_rows)
        finally:
            source.close()
        done += linear.in_features * linear.out_features
        tell("quantising weights", done, total)
        reports[name] = _layer_report(name, layer, options)
    return reports


def _layer_report(name: str, layer: Quantized, options: ExportOptions) -> LayerReport:
    spec = replace(layer.spec, layout=options.layout)
    scale_type = ir.DataType.from_numpy(layer.scales.dtype)
    return LayerReport(name, spec, scale_type, layer.offset is not None, layer.relative_error)


def _rewrite(
    model: ir.Model,
    linears: list[Linear],
    lookups: list[Linear],
    layers: Mapping[str, LayerReport],
    record: Record,
    mode: int,
    *,
    fuse: bool,
) -> None:
    @functools.lru_cache(maxsize=_KEPT_LAYERS)
    def initializers(name: str) -> tuple[Array, ...]:
        layer = record.load(name)
        return to_layout(layer.words, layer.scales, layer.offset, layers[name].spec)

    NormalizeLinears(linears)(model)
    packed = {name: _packed(report, initializers) for name, report in layers.items()}
    BinarizeLinears({linear.name: packed[linear.name] for linear in linears}, mode)(model)
    BinarizeLookups({lookup.name: packed[lookup.name] for lookup in lookups})(model)
    if fuse:
        FuseLinears()(model)
    AttachFunctionBody()(model)


def _packed(report: LayerReport, initializers: Callable[[str], tuple[Array, ...]]) -> PackedLayer:
    """The initializers (B, S, Z) of a layer, read when they are written."""

    def lazy(index: int, shape: tuple[int, ...], dtype: ir.DataType) -> ir.LazyTensor:
        def read() -> ir.TensorProtocol:
            return ir.tensor(initializers(report.name)[index])

        return ir.LazyTensor(read, dtype=dtype, shape=ir.Shape(shape))

    spec = report.spec
    return PackedLayer(
        spec,
        planes=lazy(0, spec.planes_shape, ir.DataType.UINT32),
        scales=lazy(1, spec.scales_shape, report.scale_type),
        offset=lazy(2, spec.offset_shape, ir.DataType.FLOAT) if report.offset else None,
    )
