"""Small sound models that the corruption tests damage."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from qbb_export import artifact
from qbb_export.format import LAYOUT_ROWS, LAYOUT_TILED
from tests.passes.graphs import binarized, graph, integers

K, N = 8, 4


def small() -> ir.Model:
    """At most 4 KB in one file: nine tenths of it are the function body."""
    text = f"g (float[b, {K}] x) => (float[b, {N}] y) {{ h = MatMul (x, w) y = Softmax <axis = 1> (h) }}"
    return binarized(graph(text, {"w": np.ones((K, N), np.float32)}), layout=LAYOUT_ROWS)[0]


def larger() -> ir.Model:
    """Two layers, a bias, constants, a subgraph that reads our node's output; planes in a data file."""
    text = """g (float[b, 96] x, bool c) => (float[b, 24] y) {
        h = MatMul (x, w)
        i = Add (h, bias)
        j = If (c) <then_branch = t () => (float[b, 64] k) { k = Relu (i) },
                    else_branch = e () => (float[b, 64] l) { l = Neg (i) }>
        low = Constant <value = float {-4.0}> ()
        m = Clip (j, low)
        y = MatMul (m, v)
    }"""
    rng = np.random.default_rng(0)
    weights = {"w": integers(rng, 96, 64), "v": integers(rng, 64, 24), "bias": integers(rng, 64)}
    return binarized(graph(text, weights), bases=6, group_size=32, layout=LAYOUT_TILED)[0]


BASES = {"small": small, "larger": larger}


def write(name: str, folder: Path) -> Path:
    """Write one of ``BASES`` as an artefact of ours."""
    path = folder / f"{name}.onnx"
    artifact.save(BASES[name](), path)
    return path


@functools.cache
def varied(seed: int) -> tuple[bytes, dict[str, int]]:
    """One of many shapes with what a kind of damage may want to know: K, N, bases, group_size, layout."""
    rng = np.random.default_rng(seed)
    k, n, bases = int(rng.integers(33, 130)), int(rng.integers(2, 40)), int(rng.integers(1, 8))
    group, layout = int(rng.choice([0, 32])), int(seed % 2)
    text = f"g (float[b, {k}] x) => (float[b, {n}] y) {{ h = MatMul (x, w) y = Relu (h) }}"
    model = graph(text, {"w": integers(rng, k, n)})
    ours, _ = binarized(model, bases=bases, group_size=group, layout=layout, offset=True)
    node = next(node for node in ours.graph if node.domain == "qbb")
    node.name = "layer"
    for value, letter in zip(node.inputs[1:], "BSZC", strict=True):
        if value is not None:
            value.name = letter
    attributes = {name: attribute.as_int() for name, attribute in node.attributes.items()}
    return ir.to_proto(ours).SerializeToString(), attributes


def varied_proto(seed: int) -> tuple[onnx.ModelProto, dict[str, int]]:
    content, attributes = varied(seed)
    return onnx.load_model_from_string(content), attributes
