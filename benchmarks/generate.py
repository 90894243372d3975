"""Language models token by token in onnxruntime-genai: time of a prompt, tokens per second after it, memory, size.

    python benchmarks/generate.py --shape llama-1b --work DIR --threads 2 --json generate.json
    python benchmarks/generate.py FOLDER FOLDER@int8 … --threads 2

With ``--shape``, a model of that shape with random weights is made in DIR, and from it: float32, 4 bits as the model
builder of onnxruntime-genai makes them (int8 activations), and ours at 4, 3 and 2 bases, head and embeddings at 4
(recipe ``rtn``: speed does not depend on what the bits say). All are open at the same time and take turns; the figure
is the median. Memory is what opening a folder and a first answer add to the process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

import timing
from qbb_export.cli import export_main
from qbb_export.runtimes.genai import open_folder

MODES = ("exact", "int8")
HEAD = ("--head-bases", "4", "--embedding-bases", "4")  # the builder's 4 bits are for the head, too
# Hidden size, feed-forward size, layers, heads, heads of keys and values, vocabulary.
SHAPES = {
    "llama-1b": (2048, 8192, 16, 32, 8, 128256),
    "llama-8b": (4096, 14336, 32, 32, 8, 128256),
    "tiny": (256, 512, 2, 4, 2, 1024),
}


@dataclass(frozen=True)
class Row:
    """One folder in one mode."""

    folder: str
    mode: str  # of our operator; empty where there is none
    threads: int
    size_mb: float
    memory_mb: float
    prompt_tokens: int
    prompt_ms: float
    tokens_per_second: float


class Talker:
    """A folder, open in onnxruntime-genai."""

    def __init__(self, folder: Path, mode: str, threads: int, length: int) -> None:
        self.folder, self.mode, self._length = folder, mode, length
        entries: dict[str, Any] = {"intra_op_num_threads": threads, "session.force_spinning_stop": "1"}
        if mode:
            entries["qbb.mode"] = mode
        self._model = open_folder(folder, entries)

    def answer(self, prompt: list[int], new: int) -> tuple[float, list[float]]:
        """Seconds of the prompt, and of each token after it."""
        import onnxruntime_genai as genai

        params = genai.GeneratorParams(self._model)
        params.set_search_options(max_length=self._length, min_length=self._length, do_sample=False)
        generator = genai.Generator(self._model, params)
        start = time.perf_counter()
        generator.append_tokens(prompt)
        generator.generate_next_token()
        first = time.perf_counter() - start
        taken = []
        for _ in range(new):
            start = time.perf_counter()
            generator.generate_next_token()
            taken.append(time.perf_counter() - start)
        return first, taken


def make_model(shape: str, folder: Path) -> None:
    """A Llama of random weights with a tokenizer of as many tokens."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models

    hidden, inner, layers, heads, shared, vocabulary = SHAPES[shape]
    config = transformers.LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=shared,
        vocab_size=vocabulary,
        max_position_embeddings=4096,
        tie_word_embeddings=shape == "llama-1b",
        bos_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    torch.set_default_dtype(torch.float32)
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocabulary)}, unk_token="w0"))
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}', encoding="utf-8")


def make_folders(shape: str, work: Path) -> list[str]:
    """The contenders of a shape, made where they are not there yet."""
    source = work / "model"
    if not (source / "tokenizer.json").is_file():
        make_model(shape, source)
    folders = {"float32": ["--recipe", "float"]}
    folders |= {f"{n}-bases": ["--recipe", "rtn", "--bases", str(n), "--no-offset", *HEAD] for n in (4, 3, 2)}
    for name, options in folders.items():
        if not (work / name).is_dir():
            code = export_main([str(source), "-o", str(work / name), "--no-verify", "--device", "cpu", *options])
            if code != 0:
                sys.exit(code)
    if not (work / "int4").is_dir():
        command = ["-i", str(source), "-o", str(work / "int4"), "-p", "int4", "-e", "cpu", "-c", str(work / "cache")]
        extra = ["--extra_options", "int4_accuracy_level=4"]
        subprocess.run([sys.executable, "-m", "onnxruntime_genai.models.builder", *command, *extra], check=True)
    ours = [f"{work / name}@{mode}" for name in folders if name != "float32" for mode in MODES]
    return [str(work / "float32"), str(work / "int4"), *ours]


def measure(folders: list[str], options: argparse.Namespace) -> list[Row]:
    """All folders in turns."""
    process = psutil.Process()
    talkers, memory = [], []
    prompt = np.random.default_rng(0).integers(2, 1000, options.prompt).tolist()
    for name in folders:
        folder, _, mode = name.partition("@")
        before = process.memory_info().rss
        talkers.append(Talker(Path(folder), mode, options.threads, options.prompt + options.new + 2))
        talkers[-1].answer(prompt, 2)
        memory.append(process.memory_info().rss - before)
    firsts: list[list[float]] = [[] for _ in talkers]
    nexts: list[list[float]] = [[] for _ in talkers]
    rng = np.random.default_rng(0)
    for _ in range(options.turns):
        for i in rng.permutation(len(talkers)):
            first, taken = talkers[i].answer(prompt, options.new)
            firsts[i].append(first)
            nexts[i] += taken
    rows = []
    for i, talker in enumerate(talkers):
        size = sum(file.stat().st_size for file in talker.folder.iterdir() if file.suffix in (".onnx", ".data"))
        figures = (options.prompt, 1e3 * statistics.median(firsts[i]), 1 / statistics.median(nexts[i]))
        rows.append(Row(talker.folder.name, talker.mode, options.threads, size / 1e6, memory[i] / 1e6, *figures))
    return rows


def show(rows: list[Row]) -> Table:
    """A line for each; ratios are to the first."""
    table = Table()
    for column in (
        "folder",
        "mode",
        "file MB",
        "memory MB",
        f"{rows[0].prompt_tokens} tokens, ms",
        "tokens/s",
        "times",
    ):
        table.add_column(column, justify="left" if column in ("folder", "mode") else "right")
    for row in rows:
        times = f"{row.tokens_per_second / rows[0].tokens_per_second:.2f}"
        figures = (row.size_mb, row.memory_mb, row.prompt_ms)
        table.add_row(row.folder, row.mode, *(f"{v:.0f}" for v in figures), f"{row.tokens_per_second:.2f}", times)
    return table


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", metavar="FOLDER[@MODE]")
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=16)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.shape is not None and options.work is None:
        parser.error("--shape needs --work")
    folders = options.folders + (make_folders(options.shape, options.work) if options.shape else [])
    if not folders:
        parser.error("no folders")
    rows = measure(folders, options)
    console = Console(width=120)
    console.print(timing.processor())
    console.print(show(rows))
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
