"""Language models token by token in onnxruntime-genai: time of a prompt, tokens per second after it, memory, size.

    python benchmarks/generate.py --shape llama-1b --work DIR --threads 2 --json generate.json
    python benchmarks/generate.py --shape llama-8b --work DIR --device cuda --jobs 5 [--graph]
    python benchmarks/generate.py FOLDER FOLDER@int8 … --threads 2 [--device cuda]

With ``--shape``, a model of that shape with random weights is made in DIR, and from it the contenders. Ours are made
with the recipe ``rtn``: speed does not depend on what the bits say.

* CPU: float32, 4 bits as the model builder of onnxruntime-genai makes them (int8 activations), and ours at 4, 3 and 2
  bases, head and embeddings at 4.
* GPU: float16 and 4 bits as that builder makes them, and ours at 4, 3 and 2 bases, the head at 4. Embeddings stay
  float16, as in the builder's 4 bits where they are not the head, too: a token reads one row. Making them needs no GPU.

All are open at the same time and take turns; the figure is the median. Memory is what opening a folder and a first
answer add to the process, or with ``--device cuda`` to what is taken of the GPU.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

import timing
from qbb_export.runtimes.genai import open_folder

# What a folder may be opened with: modes of our operator, and the builder's 4 bits on ONNX Runtime's other kernels.
MODES: dict[str, dict[str, str]] = {
    "": {},
    "exact": {"qbb.mode": "exact"},
    "int8": {"qbb.mode": "int8"},
    "fpA_intB": {"ep.cuda.fpa_intb_gemm": "1"},
}
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
    mode: str  # a name in MODES
    device: str
    graph: bool  # a token is one CUDA graph
    threads: int
    size_mb: float
    memory_mb: float
    prompt_tokens: int
    prompt_ms: float
    tokens_per_second: float


class Talker:
    """A folder, open in onnxruntime-genai."""

    def __init__(self, folder: Path, mode: str, options: argparse.Namespace) -> None:
        self.folder, self.mode = folder, mode
        self._length = options.prompt + options.new + 2
        entries = {"intra_op_num_threads": options.threads, "session.force_spinning_stop": "1", **MODES[mode]}
        self._model = open_folder(folder, entries, {"enable_cuda_graph": "1"} if options.graph else None)

    def answer(self, prompt: list[int], new: int) -> tuple[float, list[float]]:
        """Seconds of the prompt, and of each token after it."""
        import onnxruntime_genai as genai

        params = genai.GeneratorParams(self._model)
        params.set_search_options(max_length=self._length, min_length=self._length, do_sample=False)
        generator = genai.Generator(self._model, params)
        taken = []
        for i in range(1 + new):
            start = time.perf_counter()
            if i == 0:
                generator.append_tokens(prompt)
            generator.generate_next_token()
            generator.get_next_tokens()  # a GPU has not finished before somebody asks
            taken.append(time.perf_counter() - start)
        return taken[0], taken[1:]


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
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = transformers.LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder, max_shard_size="2GB")  # from a GPU, so much at a time is in memory
    del model
    torch.cuda.empty_cache()
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocabulary)}, unk_token="w0"))
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}', encoding="utf-8")


def recipes(device: str, source: Path) -> dict[str, list[str]]:
    """How the contenders are made, in the order of the table: modules and arguments, without the folder to write."""
    builder = ["onnxruntime_genai.models.builder", "-i", str(source), "-e", device]
    export = ["qbb_export", str(source), "--no-verify"]
    head = ["--head-bases", "4"]  # the builder's 4 bits are for the head, too
    if device == "cuda":
        export += ["--provider", "cuda"]
        found = {"float16": [*builder, "-p", "fp16"], "int4": [*builder, "-p", "int4"]}
    else:
        export += ["--device", "cpu"]
        head += ["--embedding-bases", "4"]
        int4 = [*builder, "-p", "int4", "--extra_options", "int4_accuracy_level=4"]
        found = {"float32": [*export, "--recipe", "float"], "int4": int4}
    for n in (4, 3, 2):
        found[f"{n}-bases"] = [*export, "--recipe", "rtn", "--bases", str(n), "--no-offset", *head]
    return found


def make(recipe: list[str], folder: Path) -> bool:
    """Make a contender in a process of its own; the folder has its name when it is complete. Says whether it is."""
    scratch, record = folder.with_suffix(".making"), folder.parent / "unfinished" / folder.name
    shutil.rmtree(scratch, ignore_errors=True)  # what a killed run left
    record.parent.mkdir(exist_ok=True)
    start = time.perf_counter()
    command = [sys.executable, "-m", *recipe, "-o", str(scratch)]
    command += ["--record" if recipe[0] == "qbb_export" else "-c", str(record)]
    run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(f"{folder.name}: {time.perf_counter() - start:.0f} s", flush=True)
    if run.returncode != 0:
        print(run.stdout[-2000:], flush=True)
        return False
    shutil.rmtree(record, ignore_errors=True)  # as large as the folder
    scratch.rename(folder)
    return True


def make_folders(options: argparse.Namespace) -> list[str]:
    """The contenders of a shape, made where they are not there yet."""
    source = options.work / "model"
    found = recipes(options.device, source)
    names = options.names.split(",") if options.names else list(found)
    missing = [name for name in names if not (options.work / name).is_dir()]
    if missing and not (source / "tokenizer.json").is_file():  # written last
        start = time.perf_counter()
        make_model(options.shape, source)
        print(f"model: {time.perf_counter() - start:.0f} s", flush=True)
    with ThreadPoolExecutor(options.jobs) as pool:
        if not all(list(pool.map(lambda name: make(found[name], options.work / name), missing))):
            sys.exit(1)
    modes = {name: ("exact", "int8") if name.endswith("-bases") else ("",) for name in names}
    return [f"{options.work / name}@{mode}" for name in names for mode in modes[name]]


def memory_counter(device: str) -> Callable[[], int]:
    """Tells the bytes that are taken: of the GPU, or by this process."""
    if device == "cpu":
        return lambda: int(psutil.Process().memory_info().rss)
    import torch  # it also opens the CUDA libraries that ONNX Runtime needs

    def taken() -> int:
        free, total = torch.cuda.mem_get_info()
        return total - free

    return taken


def measure(folders: list[str], options: argparse.Namespace) -> list[Row]:
    """All folders in turns."""
    taken_memory = memory_counter(options.device)
    talkers, memory = [], []
    prompt = np.random.default_rng(0).integers(2, 1000, options.prompt).tolist()
    for name in folders:
        folder, _, mode = name.partition("@")
        before = taken_memory()
        talkers.append(Talker(Path(folder), mode, options))
        talkers[-1].answer(prompt, 2)
        memory.append(taken_memory() - before)
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
        how = (talker.mode, options.device, options.graph, options.threads)
        figures = (options.prompt, 1e3 * statistics.median(firsts[i]), 1 / statistics.median(nexts[i]))
        rows.append(Row(talker.folder.name, *how, size / 1e6, memory[i] / 1e6, *figures))
    return rows


def gpu_name() -> str:
    """Of the first NVIDIA GPU."""
    import torch

    return torch.cuda.get_device_name()


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
    parser.add_argument("folders", nargs="*", metavar="FOLDER[@MODE]", help=f"MODE: {', '.join(filter(None, MODES))}")
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--folders", dest="names", metavar="NAME,…", help="such as int4,3-bases (default: all)")
    parser.add_argument("--jobs", type=int, default=1, help="contenders that are made at a time")
    parser.add_argument("--make", action="store_true", help="make them and stop")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--graph", action="store_true", help="run each token as one CUDA graph")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=16)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.shape is not None and options.work is None:
        parser.error("--shape needs --work")
    folders = options.folders + (make_folders(options) if options.shape else [])
    if options.make:
        return
    if not folders:
        parser.error("no folders")
    rows = measure(folders, options)
    console = Console(width=120)
    console.print(timing.processor() if options.device == "cpu" else gpu_name())
    console.print(show(rows))
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
