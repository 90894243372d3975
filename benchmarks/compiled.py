"""What TVM makes of our operator and of whole models, against ONNX Runtime: time on this CPU.

    python benchmarks/compiled.py --model minilm.onnx:minilm-float.onnx --json docs/tvm.json

``--model ours:float`` takes an exported file and the same model as ``--recipe float`` writes it, ``--decoder`` two
folders that generate. All contenders of a case run in one process, in turns; the figure is the median of the turns that
got the processors for at least 90 % of their time, see timing.py. Weights of a single product stay in the last-level
cache. (Not called tvm.py: Python would take it for TVM.)
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console
from rich.table import Table

import timing
from qbb_export import format as fmt
from qbb_export.custom_ops import library_path
from qbb_export.passes.function_body import AttachFunctionBody

PROMPT, NEW = 64, 32  # tokens that a decoder reads at once, then writes
OURS, FLOAT, COMPILED, DEFAULT = "our ORT kernels", "ORT fp32", "TVM", "TVM fp32, as it comes"


@dataclass(frozen=True)
class Row:
    """One contender in one case; ``ratio``: its time over that of the first."""

    case: str
    contender: str
    threads: int
    median_ms: float
    ratio: float
    turns: int
    undisturbed: int


def one_product(K: int, N: int, bases: int, group: int) -> onnx.ModelProto:
    """A model of one node with random bits."""
    rng = np.random.default_rng(bases)
    spec = fmt.Spec(K, N, bases, group)
    planes = rng.integers(0, 2**32, spec.planes_shape, dtype=np.uint32)
    scales = rng.random((bases, spec.tiles, spec.groups, fmt.TILE_ROWS)).astype(np.float16)
    arrays = {"B": planes, "S": scales, "Z": np.zeros((1, 1), np.float32), "C": np.zeros(1, np.float32)}
    attributes = {name: getattr(spec, name) for name in ("K", "N", "bases", "group_size", "layout", "format")}
    node = helper.make_node(fmt.OP_TYPE, ["X", *arrays], ["Y"], domain=fmt.DOMAIN, **attributes)
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["M", size]) for n, size in (("X", K), ("Y", N))]
    graph = helper.make_graph(
        [node], "one", values[:1], values[1:], [numpy_helper.from_array(a, name) for name, a in arrays.items()]
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(fmt.DOMAIN, fmt.OPSET_VERSION)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)


def ort_call(path: Path, feeds: dict[str, np.ndarray], threads: int, mode: str | None) -> Callable[[], object]:
    """A run in ONNX Runtime; with our library if there is a mode."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    if mode is not None:
        options.add_session_config_entry("qbb.mode", mode)
        options.register_custom_ops_library(str(library_path()))
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = {value.name for value in session.get_inputs()}
    binding = session.io_binding()
    for name, array in feeds.items():
        if name in names:
            binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(array))
    for value in session.get_outputs():
        binding.bind_output(value.name)
    return lambda: session.run_with_iobinding(binding)


def tvm_call(path: Path, feeds: dict[str, np.ndarray], folder: Path, mode: str | None) -> Callable[[], object]:
    """A run of the compiled file; it is compiled once for all sizes."""
    from qbb_export.runtimes.tvm import load
    from qbb_export.runtimes.tvm.build import compile_model

    if not folder.exists():
        compile_model(path, "native", folder, mode=mode)
    compiled = load(folder)
    tensors = {v["name"]: compiled.tensor(feeds[v["name"]]) for v in compiled.manifest["inputs"]}
    return lambda: compiled.run_tensors(tensors)


def default_call(path: Path, feeds: dict[str, np.ndarray]) -> Callable[[], object]:
    """A float model through TVM's own pipeline."""
    import tvm
    from tvm import relax

    from qbb_export.runtimes.tvm.importer import import_model
    from qbb_export.runtimes.tvm.targets import TARGETS, describe

    module, graph = import_model(path)
    executable = tvm.compile(module, tvm.target.Target(describe(TARGETS["native"])))
    machine = relax.VirtualMachine(executable, tvm.cpu())
    known = {value.name for value in graph.initializer}
    tensors = [tvm.runtime.tensor(feeds[value.name]) for value in graph.input if value.name not in known]
    return lambda: machine["main"](*tensors)


def measure(case: str, calls: dict[str, Callable[[], object]], threads: int, turns: int) -> list[Row]:
    """All contenders of a case; the first is what the others are held against."""
    counts = []
    for call in calls.values():
        call()
        counts.append(timing.turns_for(timing.timed(call, threads).seconds, turns))
    taken = timing.alternate(list(calls.values()), counts, threads)
    first = timing.median(taken[0])
    return [
        Row(case, name, threads, 1e3 * timing.median(t), timing.median(t) / first, len(t), len(timing.undisturbed(t)))
        for name, t in zip(calls, taken, strict=True)
    ]


def products(options: argparse.Namespace, folder: Path) -> list[Row]:
    """Single products, TVM against our ORT kernels."""
    rows = []
    for size in options.shapes:
        for bases in options.bases:
            path = folder / f"{size}-{bases}.onnx"
            model = ir.from_proto(one_product(size, size, bases, 128))
            AttachFunctionBody()(model)
            ir.save(model, path)
            for mode in options.modes:
                for batch in options.batch:
                    x = {"X": np.random.default_rng(1).standard_normal((batch, size), dtype=np.float32)}
                    calls = {
                        OURS: ort_call(path, x, options.threads, mode),
                        COMPILED: tvm_call(path, x, folder / f"{path.stem}-{mode}", mode),
                    }
                    case = f"{size}², {bases} base{'s' * (bases > 1)}, {batch} row{'s' * (batch > 1)}, {mode}"
                    rows += measure(case, calls, options.threads, options.turns)
    return rows


def models(options: argparse.Namespace, folder: Path) -> list[Row]:
    """Whole models on one sentence."""
    rows = []
    for (i, pair), tokens in itertools.product(enumerate(options.model), options.tokens):
        ours, _, plain = pair.partition(":")
        ids = np.random.default_rng(0).integers(5, 8000, (1, tokens))
        feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
        calls = {FLOAT: ort_call(Path(plain), feeds, options.threads, None)}
        for mode in options.modes:
            calls[f"{OURS}, {mode}"] = ort_call(Path(ours), feeds, options.threads, mode)
            calls[f"{COMPILED}, {mode}"] = tvm_call(Path(ours), feeds, folder / f"model{i}-{mode}", mode)
        if options.default:
            calls[DEFAULT] = default_call(Path(plain), feeds)
        rows += measure(f"{Path(ours).stem}, 1×{tokens}", calls, options.threads, options.turns)
    return rows


def decoders(options: argparse.Namespace, folder: Path) -> list[Row]:
    """Folders that generate: a prompt, then token by token with the cache."""
    from qbb_export.runtimes import tvm
    from qbb_export.runtimes.decoder import Decoder
    from qbb_export.runtimes.ort import session

    def write(start: Callable[[], Any]) -> Callable[[], object]:
        def call() -> None:
            decoder = start()
            logits = decoder.step(np.arange(5, 5 + PROMPT)[None])
            for _ in range(NEW):
                logits = decoder.step(logits[:, -1:].argmax(-1))

        return call

    def ort(path: str, mode: str | None) -> Callable[[], object]:
        opened = session(Path(path) / "model.onnx", mode=mode, threads=options.threads)
        return write(lambda: Decoder(opened, PROMPT + NEW))

    rows = []
    for i, pair in enumerate(options.decoder):
        ours, _, plain = pair.partition(":")
        calls = {FLOAT: ort(plain, None)}
        for mode in options.modes:
            calls[f"{OURS}, {mode}"] = ort(ours, mode)
            built = folder / f"decoder{i}-{mode}"
            tvm.compile(Path(ours) / "model.onnx", "native", built, mode=mode)
            compiled = tvm.load(built)
            calls[f"{COMPILED}, {mode}"] = write(lambda compiled=compiled: tvm.Decoder(compiled))
        rows += measure(f"{Path(ours).name}, {PROMPT} + {NEW}", calls, options.threads, options.turns)
    return rows


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=numbers, default=[4096], help="square matrices")
    parser.add_argument("--bases", type=numbers, default=[1, 2, 3, 4])
    parser.add_argument("--batch", type=numbers, default=[1])
    parser.add_argument("--modes", type=lambda text: text.split(","), default=["int8", "exact"])
    parser.add_argument("--model", action="append", default=[], metavar="OURS:FLOAT")
    parser.add_argument("--tokens", type=numbers, default=[16], help="of that sentence")
    parser.add_argument("--decoder", action="append", default=[], metavar="OURS:FLOAT")
    parser.add_argument("--default", action="store_true", help="also the float model through TVM's own pipeline")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--turns", type=int, default=200)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    os.environ["TVM_NUM_THREADS"] = str(options.threads)  # read when TVM is first used
    with TemporaryDirectory(prefix="qbb-bench.") as folder:
        place = Path(folder)
        rows = [*products(options, place), *models(options, place), *decoders(options, place)]
    table = Table(title=f"{timing.processor()}, our kernels: {timing.isa()}, {options.threads} thread(s)")
    for column in ("case", "contender", "ms", "ratio", "turns", "undisturbed"):
        table.add_column(column, justify="left" if column in ("case", "contender") else "right")
    for row in rows:
        figures = (f"{row.median_ms:.3f}", f"{row.ratio:.2f}", str(row.turns), str(row.undisturbed))
        table.add_row(row.case, row.contender, *figures)
    Console(width=110).print(table)
    if options.json is not None:
        facts: dict[str, Any] = {
            "processor": timing.processor(),
            "isa": timing.isa(),
            "rows": [asdict(r) for r in rows],
        }
        options.json.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
