"""One table of all methods on one language model: bits per weight, perplexity and KL to the float model.

    python benchmarks/methods.py MODEL TEXT --work DIR [--only 'best*'] [--device cuda]
    python benchmarks/methods.py MODEL TEXT --work DIR --table docs/methods.json

Each method is what `qbb-export MODEL --recipe R …` writes and `qbb eval FILE --reference MODEL` says of it. Results are
kept in DIR, one file each, so that several processes can share the work with `--only`, and an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from qbb_export.evaluate import evaluate
from qbb_export.pipeline import ExportOptions, export
from qbb_export.quantize import QuantizeSettings


@dataclass(frozen=True)
class Method:
    """A recipe with its settings; 0 as group size is one scale a row."""

    recipe: str
    bases: int
    group_size: int = 128

    @property
    def name(self) -> str:
        """``best-3``, or ``best-3-row``."""
        return f"{self.recipe}-{self.bases}" + ("-row" if self.group_size == 0 else "")


METHODS = (
    *(
        Method(recipe, bases)
        for recipe in ("rtn", "gptq", "greedy", "refine", "settled", "fast", "sweep", "qbb", "best")
        for bases in (4, 3, 2)
    ),
    *(Method(recipe, bases, 0) for recipe in ("greedy", "refine", "settled", "qbb") for bases in (4, 3)),
    *(Method(recipe, 3, 0) for recipe in ("rtn", "gptq", "fast", "sweep", "best")),
)


def measure(method: Method, model: str, text: Path, work: Path, device: str) -> dict[str, Any]:
    """Export and evaluate one method."""
    folder = work / method.name
    folder.mkdir(parents=True, exist_ok=True)
    settings = QuantizeSettings(bases=method.bases, group_size=method.group_size)
    options = ExportOptions(recipe=method.recipe, settings=settings, device=device, force=True)
    start = time.monotonic()
    report = export(model, folder / "model.onnx", options)
    seconds = time.monotonic() - start
    reference, ours = evaluate([str(folder / "model.onnx")], text, reference=model, device=device)
    return {
        "name": method.name,
        **asdict(method),
        "export_seconds": round(seconds, 1),
        "verified": report.ok,
        "bits_per_weight": round(report.bits_per_weight, 4),
        "float_perplexity": reference.perplexity,
        **{key: value for key, value in asdict(ours).items() if key not in ("model", "bits_per_weight")},
    }


def show(results: list[dict[str, Any]]) -> None:
    """The table, by bits per weight and perplexity."""
    table = Table()
    for column in ("method", "bits per weight", "perplexity", "against float", "KL (nats)", "export s"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for r in sorted(results, key=lambda r: (r["bases"], r["group_size"] == 0, -r["perplexity"])):
        ratio = r["perplexity"] / r["float_perplexity"]
        figures = (f"{r['bits_per_weight']:.3f}", f"{r['perplexity']:.2f}", f"{ratio:.4f}x", f"{r['kl']:.4f}")
        table.add_row(r["name"], *figures, f"{r['export_seconds']:.0f}")
    Console().print(table)


def main() -> None:
    """Measure what is missing, then print all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--only", default="*", help="comma-separated name patterns")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--table", type=Path, help="measure nothing; write all results there")
    options = parser.parse_args()
    console = Console()
    kept = options.work / "results"
    kept.mkdir(parents=True, exist_ok=True)
    for method in METHODS if options.table is None else ():
        path = kept / f"{method.name}.json"
        if not any(fnmatchcase(method.name, pattern) for pattern in options.only.split(",")) or path.exists():
            continue
        with console.status(method.name):
            result = measure(method, options.model, options.text, options.work, options.device)
        path.write_text(json.dumps(result) + "\n", encoding="utf-8")
    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(kept.glob("*.json"))]
    show(results)
    if options.table is not None:
        options.table.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
