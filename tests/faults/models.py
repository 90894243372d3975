"""Models of linear layers in a row."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser


def chain(path: Path, layers: int, size: int, seed: int = 0) -> Path:
    """An .onnx file of ``layers`` matrices ``[size, size]``."""
    body = " ".join(f"x{i + 1} = MatMul (x{i}, layers_{i}_weight)" for i in range(layers))
    text = (
        f'<ir_version: 8, opset_import: ["": 17]> g (float[m, {size}] x0) => (float[m, {size}] x{layers}) {{ {body} }}'
    )
    proto = onnx.parser.parse_model(text)
    rng = np.random.default_rng(seed)
    for i in range(layers):
        weights = rng.standard_normal((size, size), dtype=np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(weights, f"layers_{i}_weight"))
    onnx.save(proto, path)
    return path
