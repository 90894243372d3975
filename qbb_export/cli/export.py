"""``qbb-export MODEL -o model.onnx``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from qbb_export.cli.terminal import EXIT_DISAGREES, SPEAKS, progress_bars
from qbb_export.errors import QbbError
from qbb_export.format import MODES

if TYPE_CHECKING:
    from qbb_export.pipeline import ExportReport
    from qbb_export.verification import Comparison


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``qbb-export`` and ``qbb export``."""
    add = parser.add_argument
    add("source", metavar="MODEL", help="Hugging Face folder or hub id, .onnx, .safetensors, .pt, .pt2")
    add("-o", "--output", type=Path, required=True, metavar="FILE.onnx|DIR", help="where to write; a DIR can generate")
    add("--force", action="store_true", help="replace an existing output")
    add("--no-verify", action="store_true", help="do not open and compare the written file")
    add("--record", type=Path, metavar="DIR", help="per-layer results, for resuming (default: FILE.qbb)")
    add("--plan", action="store_true", help="only say what it would take: memory, disk, time; nothing is written")
    add("--json", action="store_true", help="with --plan: as JSON")
    quantize = parser.add_argument_group("quantisation")
    quantize.add_argument(
        "--recipe",
        choices=("best", "sweep", "qbb", "gptq", "fast", "settled", "refine", "greedy", "rtn", "float"),
        help="best, sweep, qbb, gptq: with the text that the model writes; the others: weights alone "
        "(default: best for transformers models that take token ids, fast for all others)",
    )
    quantize.add_argument("--bases", type=int, metavar="N", help="binary matrices per layer, 1..8 (default: 4)")
    quantize.add_argument(
        "--group-size", type=int, metavar="G", help="inputs per scale: 0 (whole row), 32, 64, … (default: 128)"
    )
    quantize.add_argument(
        "--offset",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="one more number per group, that shifts its levels (default: as the recipe has it)",
    )
    quantize.add_argument("--device", help="cpu, cuda, cuda:1, … (default: a GPU where PyTorch sees one)")
    learning = parser.add_argument_group("learning (recipes best and qbb)")
    learning.add_argument(
        "--budget", choices=("full", "reduced"), help="how much to write and learn (default: full on a GPU)"
    )
    learning.add_argument("--steps", type=int, metavar="N", help="steps of the optimizer; 0: no distillation")
    learning.add_argument("--calibration", type=Path, metavar="FILE", help="real text to learn from, too")
    learning.add_argument(
        "--start", metavar="gptq|DIR", help="approximate GPTQ's weights, or a GPTQ or AWQ checkpoint's"
    )
    layers = parser.add_argument_group(
        "layers (default: the linear layers of all blocks; not embeddings, not the head)"
    )
    layers.add_argument("--include", action="append", default=[], metavar="PATTERN", help="also these, e.g. lm_head")
    layers.add_argument("--exclude", action="append", default=[], metavar="PATTERN", help="not these, e.g. '*.0.*'")
    layers.add_argument("--layer", action="append", default=[], metavar="PATTERN:KEY=VALUE,…", help="other settings")
    layers.add_argument(
        "--head-bases", type=int, metavar="N", help="quantise the output head, too (default: it is not)"
    )
    layers.add_argument(
        "--embedding-bases",
        type=int,
        metavar="N",
        help="quantise the embeddings, too; one matrix with the head is stored once (default: no)",
    )
    loading = parser.add_argument_group("opening MODEL")
    loading.add_argument("--model", metavar="MODULE:CALLABLE", help="builds the module for a state dict")
    loading.add_argument("--config", type=Path, metavar="DIR", help="Hugging Face folder that fits a state dict")
    loading.add_argument("--input", action="append", default=[], metavar="NAME:DTYPE[DIMS]", help="a graph input")
    loading.add_argument("--trust-pickle", action="store_true", help="allow a file that runs code when it is loaded")
    parser.add_argument(
        "--mode",
        choices=MODES,
        default="exact",
        help="activations: as they are, or rounded per group to 8 or 16 bits: faster on CPUs (default: exact)",
    )
    folder = parser.add_argument_group("a folder for onnxruntime-genai (-o DIR, decoders only)")
    folder.add_argument(
        "--dtype", choices=("float32", "float16"), help="of activations and cache (default: float32, on GPUs float16)"
    )
    folder.add_argument("--provider", choices=("cpu", "cuda"), default="cpu", help="where it will run (default: cpu)")
    folder.add_argument("--portable", action="store_true", help="without our library: any machine, slower")
    parser.add_argument("--layout", choices=("tiled", "rows"), default="tiled", help="order of the packed words")
    parser.add_argument("--no-fuse", action="store_true", help="keep layers apart that share their input (q, k, v)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Export and print the report; returns the exit code."""
    from qbb_export.destination import FolderOptions
    from qbb_export.distill.settings import LearningOptions
    from qbb_export.format import LAYOUT_ROWS, LAYOUT_TILED
    from qbb_export.pipeline import ExportOptions, export
    from qbb_export.quantize import QuantizeSettings
    from qbb_export.select import Override, Selection
    from qbb_export.source import InputSpec, LoadOptions

    given = {"bases": options.bases, "group_size": options.group_size, "offset": options.offset}
    settings = QuantizeSettings(**{key: value for key, value in given.items() if value is not None})
    export_options = ExportOptions(
        recipe=options.recipe,
        settings=settings,
        selection=Selection(
            tuple(options.include),
            tuple(options.exclude),
            tuple(Override.parse(text) for text in options.layer),
            options.head_bases,
            options.embedding_bases,
        ),
        load=LoadOptions(
            options.model, options.config, options.trust_pickle, tuple(InputSpec.parse(text) for text in options.input)
        ),
        mode=options.mode,
        layout=LAYOUT_TILED if options.layout == "tiled" else LAYOUT_ROWS,
        fuse=not options.no_fuse,
        device=options.device or default_device(options.source),
        learning=LearningOptions(options.budget, options.steps, options.calibration, options.start),
        folder=FolderOptions(options.dtype, options.provider, options.portable),
        record=options.record,
        force=options.force,
        verify=not options.no_verify,
    )
    if options.json and not options.plan:
        raise QbbError("only with --plan", where="--json")
    if options.plan:
        from qbb_export.cli.plan import print_plan
        from qbb_export.plan import make_plan

        print_plan(make_plan(options.source, options.output, export_options), as_json=options.json)
        return 0
    with progress_bars() as progress:
        tasks: dict[str, int] = {}

        def tell(stage: str, done: int, total: int, note: str) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=total, note="")
            progress.update(tasks[stage], completed=done, total=total, note=note)  # type: ignore[arg-type]

        report = export(options.source, options.output, export_options, tell)
    if not SPEAKS:
        return 0
    _print_report(report, verified=export_options.verify)
    return 0 if report.ok else EXIT_DISAGREES


def default_device(source: str) -> str:
    """A GPU where PyTorch is there and sees one; .onnx files are read without PyTorch."""
    if source.endswith(".onnx"):
        return "cpu"
    try:
        from qbb_export.module import best_device
    except ImportError:
        return "cpu"
    return best_device()


def _print_report(report: ExportReport, *, verified: bool) -> None:
    out = Console()
    summary = Table(title=str(report.output), show_header=False, title_style="bold")
    summary.add_row("quantised layers", str(len(report.layers)))
    if report.layers:
        worst = max(report.layers, key=lambda layer: layer.relative_error)
        mean = sum(layer.relative_error for layer in report.layers) / len(report.layers)
        summary.add_row("bits per weight", f"{report.bits_per_weight:.3f} (scales counted)")
        summary.add_row("their size", f"{_size(report.packed_bytes)} (float32: {_size(report.float_bytes)})")
        summary.add_row("mean squared error", f"{mean:.2e} of the weights' energy")
        summary.add_row("worst layer", f"{worst.name} ({worst.relative_error:.2e})")
    summary.add_row("file, data included", _size(report.file_bytes))
    out.print(summary)
    if not verified:
        out.print("not verified (--no-verify)")
        return
    out.print(
        comparison_table(
            report.comparisons,
            "library: our kernels; body: the operator in plain ONNX; student: PyTorch with the same weights",
        )
    )


def comparison_table(rows: Sequence[Comparison], caption: str | None = None) -> Table:
    """The verification table; of several outputs the worst is shown."""
    table = Table(title="verification", title_style="bold", caption=caption)
    for column in ("comparison", "difference", "cosine", "bound", ""):
        table.add_column(column, justify="left" if column in ("comparison", "") else "right", no_wrap=True)
    worst_of: dict[str, Comparison] = {}
    for row in rows:
        if row.what not in worst_of or not row.error <= worst_of[row.what].error:
            worst_of[row.what] = row
    for row in worst_of.values():
        mark = "" if row.bound is None else "ok" if row.ok else f"FAILED ({row.output})"
        bound = "-" if row.bound is None else f"{row.bound:.0e}"
        table.add_row(row.what, f"{row.error:.1e}", f"{row.cosine:.6f}", bound, mark)
    return table


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.1f} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1000
    return f"{count:.2f} GB"
