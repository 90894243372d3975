"""Small graphs for the pass tests: ONNX text with the weights filled in, run in float64-checked ONNX Runtime."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime

from qbb_export.custom_ops import library_info
from qbb_export.format import LAYOUT_TILED, Spec, effective_group_size, pack_words, to_layout
from qbb_export.passes.binarize import BinarizeLinears, PackedLayer
from qbb_export.passes.function_body import AttachFunctionBody
from qbb_export.passes.fuse import FuseLinears
from qbb_export.passes.linears import Linear, find_linears
from qbb_export.passes.normalize import NormalizeLinears
from qbb_export.passes.prepare import prepare_passes
from qbb_export.passes.verify import VerifyBinaryBasis
from qbb_export.reference import dense_weight

Array = npt.NDArray[Any]


def graph(text: str, weights: dict[str, Array] | None = None, opset: int = 20, ir_version: int = 10) -> ir.Model:
    """``agraph (float[b, 4] x) => (float[b, 3] y) { y = MatMul(x, w) }`` with ``weights={"w": ...}``."""
    header = f'<ir_version: {ir_version}, opset_import: ["": {opset}]>'
    proto = onnx.parser.parse_model(f"{header} {text}")
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(a, name) for name, a in (weights or {}).items())
    return ir.from_proto(proto)


def integers(rng: np.random.Generator, *shape: int, dtype: Any = np.float32) -> Array:
    """Small whole numbers: every order of summation gives the same float32."""
    return rng.integers(-4, 5, shape).astype(dtype)


def exact_layer(
    linear: Linear,
    bases: int = 2,
    group_size: int = 0,
    offset: bool = True,
    layout: int = LAYOUT_TILED,
    scale_type: Any = np.float16,
) -> tuple[PackedLayer, Array]:
    """A packed layer of random signs and power-of-two scales, and the dense matrix [N, K] that it stands for."""
    rng = np.random.default_rng(zlib.crc32(linear.name.encode()))
    k, n = linear.in_features, linear.out_features
    spec = Spec(k, n, bases, effective_group_size(k, group_size), layout)
    signs = rng.random((bases, n, k)) < 0.5
    scales = (2.0 ** rng.integers(-2, 2, (bases, n, spec.groups))).astype(scale_type)
    z = (2.0 ** rng.integers(-2, 2, (n, spec.groups))).astype(np.float32) if offset else None
    b, s, zz = to_layout(pack_words(signs), scales, z, spec)
    packed = PackedLayer(spec, ir.tensor(b), ir.tensor(s), None if z is None else ir.tensor(zz))
    return packed, dense_weight(b, s, zz, spec)


def binarized(
    model: ir.Model, *, fuse: bool = False, each: dict[str, dict[str, Any]] | None = None, **settings: Any
) -> tuple[ir.Model, ir.Model]:
    """The model with all its linear layers replaced, and the same float model with the dense equivalents as weights.

    ``settings`` are those of ``exact_layer``; ``each`` has others for some layers, by name.
    """
    prepare_passes()(model)
    dense = model.clone()
    linears, _ = find_linears(model)
    layers = {
        linear.name: exact_layer(linear, **{**settings, **(each or {}).get(linear.name, {})}) for linear in linears
    }
    for index, linear in enumerate(find_linears(dense)[0]):
        weight = layers[linear.name][1]
        flipped = linear.node.op_type == "Gemm" and linear.node.attributes.get_int("transB", 0)
        dtype = (linear.activation.dtype or ir.DataType.FLOAT).numpy()
        tensor = ir.tensor(np.ascontiguousarray(weight if flipped else weight.T).astype(dtype))
        value = ir.Value(name=f"{linear.name}.dense_{index}", const_value=tensor)
        value.shape, value.type = ir.Shape(tensor.shape), ir.TensorType(tensor.dtype)
        dense.graph.register_initializer(value)
        linear.node.replace_input_with(1, value)
    NormalizeLinears(linears)(model)
    BinarizeLinears({name: packed for name, (packed, _) in layers.items()})(model)
    if fuse:
        FuseLinears()(model)
    AttachFunctionBody()(model)
    VerifyBinaryBasis()(model)
    return model, dense


def run(model: ir.Model, feeds: dict[str, Array], *, library: bool = False) -> list[Array]:
    """Outputs of a model in stock ONNX Runtime, or with our library."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if library:
        options.register_custom_ops_library(str(library_info().path))
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)
