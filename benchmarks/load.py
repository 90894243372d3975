"""Opening a file: seconds, and memory that it takes, with weights read in place and with weights that are repacked.

    python benchmarks/load.py --layers 44 --bases 3

Each file is opened in a process of its own. Pages of a mapped file are counted apart: they are the file's, shared by
all processes that map it, and given back when memory is short.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import onnx_ir as ir
from rich.console import Console
from rich.table import Table

from qbb_export.artifact import save
from qbb_export.format import DOMAIN, LAYOUT_ROWS, LAYOUT_TILED, OP_TYPE, OPSET_VERSION, Spec
from qbb_export.passes.function_body import AttachFunctionBody


def write(path: Path, size: int, layers: int, bases: int, layout: int) -> int:
    """A chain of square layers in one file; returns the bytes of their weights."""
    spec = Spec(size, size, bases, 128, layout)
    rng = np.random.default_rng(0)
    x = ir.Value(name="x", shape=ir.Shape(["m", size]), type=ir.TensorType(ir.DataType.FLOAT))
    zero = [constant("z", np.zeros((1, 1), np.float32)), constant("c", np.zeros(1, np.float32))]
    value, nodes, initializers = x, [], list(zero)
    for i in range(layers):
        planes = constant(f"b{i}", rng.integers(0, 2**32, spec.planes_shape, dtype=np.uint32))
        scales = constant(f"s{i}", np.full(spec.scales_shape, 1 / size, np.float16))
        node = ir.node(OP_TYPE, [value, planes, scales, *zero], asdict(spec), domain=DOMAIN, name=f"linear{i}")
        value = node.outputs[0]
        value.name, value.type = f"y{i}", ir.TensorType(ir.DataType.FLOAT)
        value.shape = ir.Shape(["m", size])
        nodes.append(node)
        initializers += [planes, scales]
    opsets = {"": 20, DOMAIN: OPSET_VERSION}
    graph = ir.Graph([x], [value], nodes=nodes, initializers=initializers, opset_imports=opsets, name="layers")
    model = ir.Model(graph, ir_version=10)
    AttachFunctionBody()(model)
    save(model, path)
    return sum(v.const_value.nbytes for v in initializers if v.const_value is not None)


def constant(name: str, array: np.ndarray) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    return ir.Value(name=name, shape=ir.Shape(tensor.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)


def resident() -> dict[str, int]:
    """Bytes that this process holds: its own, and of mapped files."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(fields[key].split()[0]) * 1024 for name, key in (("own", "RssAnon"), ("files", "RssFile"))}


def measure(path: Path, size: int) -> None:
    """Open the file and print what that took, before and after a run."""
    from qbb_export.runtimes.ort import session

    x = np.ones((1, size), np.float32)
    before, start = resident(), time.perf_counter()
    opened = session(path, check_data=False)
    seconds, loaded = time.perf_counter() - start, resident()
    opened.run(None, {"x": x})
    stages = (("load", loaded), ("run", resident()))
    added = {f"{when} {name}": after[name] - before[name] for when, after in stages for name in after}
    print(json.dumps({"seconds": seconds, **added}))


def main() -> None:
    """Write the files, open each, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=44)
    parser.add_argument("--bases", type=int, default=3)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.measure, options.size)
        return
    table = Table(title="opening a file; MB that the process then holds more than before")
    for column in ("layout", "weights MB", "load s", "own", "mapped", "own, after a run", "own / weights"):
        table.add_column(column, justify="right")
    for name, layout in (("tiled, in place", LAYOUT_TILED), ("rows, repacked", LAYOUT_ROWS)):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "m.onnx"
            size = write(path, options.size, options.layers, options.bases, layout)
            command = [sys.executable, __file__, "--measure", str(path), "--size", str(options.size)]
            row = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        figures = (size, row["load own"], row["load files"], row["run own"])
        weights, own, mapped, ran = (f"{value / 1e6:.0f}" for value in figures)
        table.add_row(name, weights, f"{row['seconds']:.2f}", own, mapped, ran, f"{row['run own'] / size:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
