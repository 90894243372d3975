"""Cosines and sines of rotary embeddings: by the model's own frequencies, and computed when a file is opened."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

TABLES = {"cos_cache": "Cos", "sin_cache": "Sin"}


@dataclass(frozen=True)
class Rotation:
    """How a model turns its heads: by ``position * frequencies``; cosines and sines are multiplied by ``scale``.

    Attributes:
        frequencies: float32 ``[pairs]``.
        scale: of the attention, as some kinds of scaling have it; 1 for most models.
    """

    frequencies: np.ndarray[Any, np.dtype[np.float32]]
    scale: float


def rotation_of(module: Any) -> Rotation | None:
    """The rotation of a transformers model; None where frequencies depend on the text's length or on the layer.

    *Why:* the builder computes its tables anew, and leaves out linear scaling, and YaRN's bounds.
    """
    parts = [part for part in module.modules() if hasattr(getattr(part, "inv_freq", None), "numpy")]
    if len(parts) != 1 or getattr(parts[0], "rope_type", "") in ("dynamic", "longrope"):
        return None
    frequencies = parts[0].inv_freq.detach().float().cpu().numpy()
    return Rotation(frequencies, float(getattr(parts[0], "attention_scaling", 1.0)))


def compute_tables(model: ir.Model, rotation: Rotation | None) -> None:
    """Replace the builder's tables by what makes them: ``cos(position * frequencies) * scale``.

    *Why:* two tables of 131072 positions are 33 MB in a model whose packed weights are 560. ONNX Runtime computes what
    is constant once, when it opens the file.

    A table of another width than the rotation's stays as it is, and without a rotation all stay.
    """
    graph = model.graph
    for name, function in TABLES.items():
        table = graph.initializers.get(name)
        if rotation is None or table is None or table.shape is None or table.dtype is None:
            continue
        positions, pairs = table.shape.numpy()
        if pairs != len(rotation.frequencies):
            continue
        constants = {
            "start": np.float32(0),
            "positions": np.float32(positions),
            "step": np.float32(1),
            "column": np.asarray([positions, 1], np.int64),
            "frequencies": rotation.frequencies[None, :],
            "scale": np.float32(rotation.scale),
        }
        values = {key: _initializer(graph, f"{name}.{key}", array) for key, array in constants.items()}
        steps = [ir.node("Range", [values["start"], values["positions"], values["step"]])]
        steps.append(ir.node("Reshape", [steps[-1].outputs[0], values["column"]]))
        steps.append(ir.node("Mul", [steps[-1].outputs[0], values["frequencies"]]))
        steps.append(ir.node(function, [steps[-1].outputs[0]]))
        steps.append(ir.node("Mul", [steps[-1].outputs[0], values["scale"]]))
        steps.append(ir.node("Cast", [steps[-1].outputs[0]], {"to": int(table.dtype)}))
        for i, step in enumerate(steps):
            step.name = f"{name}.{i}"
            step.outputs[0].name = f"{name}.{i}.output"
        last = steps[-1].outputs[0]
        last.shape, last.type = table.shape, table.type
        graph.insert_before(graph[0], steps)
        table.replace_all_uses_with(last)
        graph.initializers.pop(name)


def _initializer(graph: ir.Graph, name: str, array: Any) -> ir.Value:
    tensor = ir.tensor(np.asarray(array), name=name)
    value = ir.Value(name=name, const_value=tensor, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype))
    graph.register_initializer(value)
    return value
