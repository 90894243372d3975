"""An ONNX file as a Relax module, with ``BinaryBasisMatMul`` as calls of our own functions.

TVM's importer knows neither domains nor functions, so constants become initializers and other functions their bodies
first (onnx_ir's passes), and a subclass converts our operator. Two more of its converters fail on free sizes, as a
sequence's: Range makes a new size of what it cannot see through, and Reshape does not take a size for a tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import onnx_ir as ir
import tvm
from onnx.reference import ReferenceEvaluator
from onnx_ir.passes import common
from tvm import relax
from tvm.relax.frontend.onnx import onnx_frontend

from qbb_export.errors import QbbError
from qbb_export.format import LAYOUT_TILED, OP_TYPE, Spec, from_layout, to_layout
from qbb_export.runtimes.tvm import contrib, operator


def import_model(path: Path, mode: int | None = None) -> tuple[Any, onnx.GraphProto]:
    """The Relax module of a checked .onnx file, and the graph that was imported.

    Args:
        path: the file.
        mode: of all products, in place of the nodes' own.

    Raises:
        QbbError: an operator that TVM cannot import.
    """
    model = ir.load(path)
    ir.external_data.load_to_model(model)
    for key in [key for key in model.functions if key[1] == OP_TYPE]:
        del model.functions[key]  # it is converted, not run through its body
    common.InlinePass()(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    proto = ir.to_proto(model)
    _fold_constants(proto.graph)
    if mode is not None:
        _set_mode(proto.graph, mode)
    opset = next(o.version for o in proto.opset_import if o.domain in ("", "ai.onnx"))
    importer = _Importer(None, "float32", keep_params_in_input=False, sanitize=False)
    try:
        return importer.from_onnx(proto.graph, opset), proto.graph
    except tvm.error.OpNotImplemented as error:
        raise QbbError("TVM cannot import an operator", where=path, got=str(error).splitlines()[0]) from error


def _fold_constants(graph: onnx.GraphProto) -> None:
    """Compute what depends on nothing but constants: rotations, the output head's transpose."""
    known = {tensor.name: tensor for tensor in graph.initializer}
    kept = []
    for node in graph.node:
        nested = any(attribute.HasField("g") for attribute in node.attribute)
        if nested or node.domain not in ("", "ai.onnx") or not node.input or not all(n in known for n in node.input):
            kept.append(node)
            continue
        feeds = {name: onnx.numpy_helper.to_array(known[name]) for name in node.input}
        for name, value in zip(node.output, ReferenceEvaluator(node).run(None, feeds), strict=True):
            known[name] = onnx.numpy_helper.from_array(np.ascontiguousarray(value), name)
            graph.initializer.append(known[name])
    del graph.node[:]
    graph.node.extend(kept)


def _set_mode(graph: onnx.GraphProto, mode: int) -> None:
    for node in graph.node:
        if node.op_type == OP_TYPE:
            own = [attribute for attribute in node.attribute if attribute.name != "mode"]
            del node.attribute[:]
            node.attribute.extend([*own, onnx.helper.make_attribute("mode", mode)])


class _Importer(onnx_frontend.ONNXGraphImporter):  # type: ignore[misc]
    def _check_for_unsupported_ops(self, graph: onnx.GraphProto) -> None:
        known = onnx.GraphProto()
        known.node.extend(node for node in graph.node if node.op_type not in _CONVERTERS)
        super()._check_for_unsupported_ops(known)

    def _convert_operator(self, op_name: str, inputs: Any, attrs: dict[str, Any], opset: int) -> Any:
        convert = _CONVERTERS.get(op_name)
        if convert is None:
            return super()._convert_operator(op_name, inputs, attrs, opset)
        result = convert(self.bb, inputs, attrs, [self._nodes, self._params])
        return self.bb.normalize(result) if isinstance(result, relax.Expr) else result


def _binary_basis_matmul(builder: Any, inputs: Any, attributes: dict[str, Any], _: Any) -> Any:
    x = inputs[0]
    planes, scales, offset, bias = (_array(value) for value in list(inputs)[1:5])
    numbers = (int(attributes[key]) for key in ("K", "N", "bases", "group_size", "layout"))
    spec = Spec(*numbers)
    if spec.layout != LAYOUT_TILED:
        words, rows, z = from_layout(planes, scales, offset, spec)
        spec = Spec(spec.K, spec.N, spec.bases, spec.group_size, LAYOUT_TILED)
        planes, scales, offset = to_layout(words, rows, z, spec)
    wide = np.broadcast_to(offset, (spec.tiles, spec.groups, operator.LANES)).astype(np.float32)
    padded = np.zeros((spec.tiles, operator.LANES), np.float32)
    padded.reshape(-1)[: spec.N] = np.broadcast_to(bias.reshape(-1), spec.N)
    function = operator.reference(spec, str(scales.dtype), int(attributes.get("mode", 0)))
    function = function.without_attr("global_symbol")  # the builder finds a free name
    kernel = builder.add_func(function, f"binary_basis_matmul_{spec.K}_{spec.N}_{spec.bases}")
    sizes = list(x.ty.shape.values)
    rows_of_x = sizes[0]
    for size in sizes[1:-1]:
        rows_of_x = rows_of_x * size
    flat = builder.emit(relax.op.reshape(x, (rows_of_x, spec.K)))
    constants = [relax.const(np.ascontiguousarray(array)) for array in (planes, scales, wide, padded)]
    y = builder.emit(relax.call_tir(kernel, [flat, *constants], relax.TensorType((rows_of_x, spec.N), "float32")))
    return relax.op.reshape(y, (*sizes[:-1], spec.N))


def _array(value: Any) -> Any:
    return value.value.numpy()


def _range(builder: Any, inputs: Any, attributes: dict[str, Any], parameters: Any) -> Any:
    start, limit, step = (v.value.numpy().item() if isinstance(v, tvm.ir.GenericConst) else v for v in inputs)
    sizes = isinstance(start, int) and isinstance(step, int) and (isinstance(limit, int) or tvm.ir.is_prim_expr(limit))
    if sizes:
        return relax.op.arange(start, limit, step, "int64")
    return onnx_frontend.Range.get_converter(13)(builder, inputs, attributes, parameters)


def _reshape(builder: Any, inputs: Any, attributes: dict[str, Any], parameters: Any) -> Any:
    if not isinstance(inputs[0], relax.ShapeExpr) and tvm.ir.is_prim_expr(inputs[0]):
        return relax.ShapeExpr([inputs[0]])
    return onnx_frontend.Reshape.get_converter(13)(builder, inputs, attributes, parameters)


def _slice(builder: Any, inputs: Any, attributes: dict[str, Any], parameters: Any) -> Any:
    ends = inputs[2].value.numpy().tolist() if isinstance(inputs[2], tvm.ir.GenericConst) else []
    if any(end >= _FAR for end in ends) and hasattr(inputs[0].ty, "shape"):
        sizes = inputs[0].ty.shape.values
        axes = _array(inputs[3]).tolist() if inputs[3] is not None else range(len(ends))
        inputs[2] = relax.ShapeExpr([sizes[axis] if end >= _FAR else end for axis, end in zip(axes, ends, strict=True)])
    return onnx_frontend.Slice.get_converter(13)(builder, inputs, attributes, parameters)


_FAR: Final = 2**31 - 1  # as an end: the size. Exporters write 2**63 - 1, with which GPU schedules overflow
_CONVERTERS: Final[dict[str, Callable[..., Any]]] = {
    **contrib.CONVERTERS,
    OP_TYPE: _binary_basis_matmul,
    "Range": _range,
    "Reshape": _reshape,
    "Slice": _slice,
}
