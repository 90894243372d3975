"""``qbb study MODEL --record RECORD``."""

from __future__ import annotations

import argparse
from pathlib import Path

from qbb_export.cli.export import default_device
from qbb_export.cli.terminal import progress_bars


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``qbb study``."""
    add = parser.add_argument
    add("source", metavar="MODEL", help="Hugging Face folder or hub id; for the studies of weights also .onnx")
    add("--record", type=Path, required=True, metavar="RECORD", help="where results go, e.g. an export's model.qbb")
    add("--text", type=Path, metavar="FILE", help="UTF-8 text: measure the perplexity on it, too")
    add("--windows", type=int, default=32, metavar="N", help="windows of the text at most (default 32)")
    add("--only", metavar="NAME,…", help="of weights, cost, components, losses, samples, starts (default: all)")
    add("--steps", type=int, metavar="N", help="of each distillation (default: 200 on a GPU, 20 on a CPU)")
    add("--device", help="cpu, cuda, cuda:1, … (default: a GPU where PyTorch sees one)")
    add("--bases", type=int, metavar="N", help="binary matrices per layer, 1..8 (default: 4)")
    add("--group-size", type=int, metavar="G", help="inputs per scale: 0 (whole row), 32, 64, … (default: 128)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the studies and print their files; returns the exit code."""
    from qbb_export.quantize import QuantizeSettings
    from qbb_export.studying import ALL, StudyOptions, run_studies

    given = {"bases": options.bases, "group_size": options.group_size}
    study_options = StudyOptions(
        only=tuple(name for name in (options.only or "").split(",") if name),
        settings=QuantizeSettings(**{key: value for key, value in given.items() if value is not None}),
        steps=options.steps,
        device=options.device or default_device(options.source),
        text=options.text,
        windows=options.windows,
    )
    with progress_bars() as progress:
        whole = progress.add_task(ALL, total=None, note="")
        current, shown = progress.add_task("", total=None, note=""), ""

        def tell(stage: str, done: int, total: int, note: str) -> None:
            nonlocal shown
            if stage == ALL:
                progress.update(whole, completed=done, total=total, note=note)
                return
            if stage != shown:
                progress.reset(current, description=stage, total=total)
                shown = stage
            progress.update(current, completed=done, total=total, note=note)

        files = run_studies(options.source, options.record, study_options, tell)
    for file in files:
        print(file)
    return 0
