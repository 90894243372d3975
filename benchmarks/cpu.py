"""One operator against what ONNX Runtime has for the same product: time per call on the CPU.

    python benchmarks/cpu.py --shapes 4096x4096 --batch 1,8,128 --threads 1,2 --json cpu.json

All kernels run in one process, in turns, so that they meet the same noise; each turn uses the next of several copies
of the weights, which together exceed the last-level cache. The figure is the median of the turns that got the processor
for at least 90 % of their time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
from rich.console import Console
from rich.progress import track
from rich.table import Table

from qbb_export.custom_ops import library_info, library_path
from qbb_export.format import DOMAIN, OP_TYPE, OPSET_VERSION, Spec
from qbb_export.passes.function_body import AttachFunctionBody

CACHE_BYTES = 96 << 20
TURNS = 40
GROUP_SIZE = 128


@dataclass
class Row:
    """One line of the table and one object of the JSON file."""

    kernel: str  # "qbb", "fp32", or "body": the function body in stock ONNX Runtime
    bases: int | None
    mode: str  # activations: "exact" is float
    shape: str  # KxN
    batch: int
    threads: int
    median_ms: float
    gbps: float  # bytes of weights over time


def constant(name: str, array: Any) -> ir.Value:
    """An initializer."""
    tensor = ir.tensor(array, name=name)
    return ir.Value(name=name, shape=ir.Shape(tensor.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)


def model(kernel: str, k: int, n: int, bases: int | None) -> tuple[bytes, int]:
    """A model of one node, and the bytes of its weights."""
    rng = np.random.default_rng(0)
    x = ir.Value(name="x", shape=ir.Shape(["m", k]), type=ir.TensorType(ir.DataType.FLOAT))
    if bases is None:
        weights = [constant("w", rng.standard_normal((k, n), dtype=np.float32))]
        node = ir.node("MatMul", [x, *weights])
    else:
        spec = Spec(k, n, bases, GROUP_SIZE)
        weights = [
            constant("b", rng.integers(0, 2**32, spec.planes_shape, dtype=np.uint32)),
            constant("s", rng.random(spec.scales_shape, dtype=np.float32).astype(np.float16)),
            constant("z", np.zeros((1, 1), np.float32)),
            constant("c", np.zeros(1, np.float32)),
        ]
        node = ir.node(OP_TYPE, [x, *weights], asdict(spec), domain=DOMAIN)
    y = node.outputs[0]
    y.name, y.shape, y.type = "y", ir.Shape(["m", n]), ir.TensorType(ir.DataType.FLOAT)
    opsets = {"": 20, DOMAIN: OPSET_VERSION}
    graph = ir.Graph([x], [y], nodes=[node], initializers=weights, opset_imports=opsets, name="bench")
    size = sum(value.const_value.nbytes for value in weights if value.const_value is not None)
    result = ir.Model(graph, ir_version=10)
    if kernel == "body":
        AttachFunctionBody()(result)
    return ir.to_proto(result).SerializeToString(), size


class Contender:
    """A kernel at one shape and thread count: sessions over copies of the weights that are used in turn."""

    def __init__(self, kernel: str, k: int, n: int, bases: int | None, threads: int) -> None:
        self.kernel, self.bases, self.shape, self.threads = kernel, bases, f"{k}x{n}", threads
        data, self.bytes = model(kernel, k, n, bases)
        self.copies = max(2, -(-CACHE_BYTES // self.bytes))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        # Idle threads of one session would otherwise spin on the processors that the next one needs.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if kernel == "qbb":
            options.register_custom_ops_library(str(library_path()))
        providers = ["CPUExecutionProvider"]
        self.sessions = [onnxruntime.InferenceSession(data, options, providers=providers) for _ in range(self.copies)]
        self.turn = 0
        self.times: list[tuple[float, float]] = []

    def run(self, x: Any) -> None:
        """One timed call on the next copy: wall time, and share of the processors that it got."""
        session = self.sessions[self.turn % self.copies]
        self.turn += 1
        wall, cpu = time.perf_counter(), time.process_time()
        session.run(None, {"x": x})
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        self.times.append((wall, cpu / wall / self.threads))

    def row(self, batch: int) -> Row:
        """The median of the undisturbed turns."""
        good = [wall for wall, share in self.times if share >= 0.9] or [wall for wall, _ in self.times]
        seconds = statistics.median(good)
        gbps = self.bytes / seconds / 1e9
        return Row(self.kernel, self.bases, "exact", self.shape, batch, self.threads, 1e3 * seconds, gbps)


def measure(k: int, n: int, batch: int, threads: int, bases: list[int], *, body: bool) -> list[Row]:
    """All contenders at one shape, taking turns."""
    kinds = [("fp32", None), *(("qbb", b) for b in bases), *(("body", b) for b in bases if body)]
    contenders = [Contender(kernel, k, n, b, threads) for kernel, b in kinds]
    x = np.random.default_rng(1).standard_normal((batch, k), dtype=np.float32)
    turns = TURNS if batch < 32 else TURNS // 2
    for turn in range(turns + 3):
        for contender in contenders:
            contender.run(x)
            if turn < 3:
                contender.times.clear()
    return [contender.row(batch) for contender in contenders]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="4096x4096", help="KxN,…")
    parser.add_argument("--batch", default="1", help="rows of X,…")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--bases", default="2,3,4")
    parser.add_argument("--body", action="store_true", help="also the function body in stock ONNX Runtime")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    bases = [int(b) for b in options.bases.split(",")]
    cases = [
        (*(int(v) for v in shape.split("x")), int(batch), int(threads))
        for shape in options.shapes.split(",")
        for batch in options.batch.split(",")
        for threads in options.threads.split(",")
    ]
    rows: list[Row] = []
    for k, n, batch, threads in track(cases, "measuring", console=Console(stderr=True), transient=True):
        rows += measure(k, n, batch, threads, bases, body=options.body)
    isa = next(name for name, available in library_info().isas.items() if available)
    table = Table(title=f"ONNX Runtime {onnxruntime.__version__}, our kernels: {isa}, groups of {GROUP_SIZE}")
    for column in ("shape", "batch", "threads", "kernel", "ms", "GB/s", "against fp32"):
        table.add_column(column, justify="left" if column in ("shape", "kernel") else "right")
    for row in rows:
        case = (row.shape, row.batch, row.threads)
        base = next(r for r in rows if r.kernel == "fp32" and (r.shape, r.batch, r.threads) == case)
        kernel = "fp32 MatMul" if row.bases is None else f"{row.bases} bases"
        kernel += ", function body" if row.kernel == "body" else ""
        figures = (f"{row.median_ms:.3f}", f"{row.gbps:.1f}", f"{base.median_ms / row.median_ms:.2f}x")
        table.add_row(row.shape, str(row.batch), str(row.threads), kernel, *figures)
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps({"rows": [asdict(row) for row in rows]}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
