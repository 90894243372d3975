"""Open the file that was just written and compare what it computes with the model it came from."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qbb_export.artifact import read_graph, save
from qbb_export.errors import QbbError
from qbb_export.format import LAYOUT_TILED, OP_TYPE, OPSET_VERSION, TILE_ROWS, Spec
from qbb_export.passes.function_body import MIN_IR_VERSION, MIN_OPSET, AttachFunctionBody, binary_basis_nodes
from qbb_export.passes.verify import node_spec
from qbb_export.reference import binary_basis_matmul
from qbb_export.runtimes import ort
from qbb_export.runtimes.decoder import PRESENT, empty_cache
from qbb_export.source import InputSpec

Array = npt.NDArray[Any]
Arrays = dict[str, Array]

# Largest difference allowed, relative to the largest magnitude of the output. Both sides sum in float32 but in another
# order in every layer; a few dozen layers lift the float32 step of 1.2e-7 to 1e-5 or so.
BODY_BOUND = 1e-4
# PyTorch also has other attention and normalisation kernels than ONNX Runtime.
STUDENT_BOUND = 1e-3
# float16 outputs carry 11 bits.
HALF_BOUND = 1e-2
# The function body makes dense copies of a layer. A model with a larger one is checked on some rows of each instead.
_BODY_MAX_WEIGHTS = 1 << 24
_CHECKED_ROWS = 256

_BATCH, _SEQUENCE = 2, 24
_TEXT = (
    "The committee met on Tuesday and agreed to plant two hundred trees along the river before the end of the year.",
    "Heat flows from the warmer body to the colder one until both have the same temperature.",
)


@dataclass(frozen=True)
class Comparison:
    """One row of the verification table.

    Attributes:
        what: the two sides.
        output: name of the graph output.
        error: largest difference over the largest magnitude of the reference.
        cosine: of the two outputs as vectors.
        bound: what ``error`` must stay below; None for a row that only informs.
    """

    what: str
    output: str
    error: float
    cosine: float
    bound: float | None

    @property
    def ok(self) -> bool:
        """Within the bound, or without one. NaN is never within."""
        return self.bound is None or self.error <= self.bound


def compare(
    what: str, outputs: Mapping[str, Array], reference: Mapping[str, Array], bound: float | None
) -> list[Comparison]:
    """Compare outputs of the same names, in float64.

    Raises:
        QbbError: names or shapes differ.
    """
    rows = []
    for name, expected in reference.items():
        got = outputs.get(name)
        if got is None or got.shape != expected.shape:
            raise QbbError(
                "outputs differ in shape",
                where=f"{what}, {name}",
                expected=expected.shape,
                got=None if got is None else got.shape,
            )
        if not np.issubdtype(expected.dtype, np.floating):
            continue
        half = np.float16 in (got.dtype, expected.dtype)
        limit = max(bound, HALF_BOUND) if bound is not None and half else bound
        a, b = got.astype(np.float64).ravel(), expected.astype(np.float64).ravel()
        peak = float(np.abs(b).max(initial=0.0))
        difference = float(np.abs(a - b).max(initial=0.0))
        norms = float(np.linalg.norm(a) * np.linalg.norm(b))
        error = difference / peak if peak > 0 else difference
        rows.append(Comparison(what, name, error, float(a @ b) / norms if norms > 0 else 1.0, limit))
    return rows


def sample_inputs(inputs: tuple[InputSpec, ...], tokenizer: Path | None, seed: int = 0) -> Arrays:
    """Something to feed a model with: sentences where there is a tokenizer, random values elsewhere.

    A dynamic dimension becomes 2 where it is first seen as the first one of an input, else 24; one name, one size.
    """
    rng = np.random.default_rng(seed)
    feeds: Arrays = {}
    sizes: dict[str, int] = {}
    for spec in inputs:
        for axis, d in enumerate(spec.dims):
            if isinstance(d, str):
                sizes.setdefault(d, _SEQUENCE if axis else _BATCH)
        dims = [sizes[d] if isinstance(d, str) else d for d in spec.dims]
        if spec.name.endswith("mask"):
            feeds[spec.name] = np.ones(dims, dtype=spec.dtype)
        elif spec.name == "token_type_ids":
            feeds[spec.name] = np.zeros(dims, dtype=spec.dtype)
        elif spec.dtype.startswith("float"):
            feeds[spec.name] = rng.standard_normal(dims).astype(spec.dtype)
        else:
            feeds[spec.name] = rng.integers(0, spec.high, dims).astype(spec.dtype)
    ids = feeds.get("input_ids")
    if tokenizer is not None and ids is not None:
        from tokenizers import Tokenizer

        encoder = Tokenizer.from_file(str(tokenizer))
        for row, sentence in zip(ids, _TEXT, strict=False):
            tokens = np.asarray(encoder.encode(sentence).ids[: row.size])
            row[: len(tokens)] = tokens
    return feeds


def graph_inputs(model: ir.Model) -> tuple[InputSpec, ...]:
    """Input descriptions of a graph that came as an .onnx file."""
    specs = []
    for value in model.graph.inputs:
        if value.is_initializer():
            continue
        if value.shape is None or value.dtype is None:
            raise QbbError("graph input has no type or shape", where=f"input '{value.name}'")
        dims = tuple(d if isinstance(d, int) else str(d) for d in value.shape)
        specs.append(InputSpec(value.name or "", value.dtype.numpy().name, dims))
    return tuple(specs)


def results_of(model: ir.Model) -> list[str]:
    """Names of the outputs that are results, the cache left out."""
    return [value.name or "" for value in model.graph.outputs if not (value.name or "").startswith(PRESENT)]


def run_file(path: Path, feeds: Mapping[str, Array], *, library: bool, mode: str = "exact") -> Arrays:
    """Run a file in ONNX Runtime, with our library in one mode or through the function body. A decoder with a cache
    starts with an empty one, and what it leaves there is no result.

    Raises:
        QbbError: ONNX Runtime cannot run it on these inputs.
    """
    session = ort.session(path, library=library, mode=mode, check_data=library)
    names = [value.name for value in session.get_outputs() if not value.name.startswith(PRESENT)]
    try:
        batch = len(next(iter(feeds.values()), ()))
        return dict(zip(names, session.run(names, {**feeds, **empty_cache(session, batch)}), strict=True))
    except Exception as error:  # onnxruntime's exceptions share no base class
        raise QbbError("ONNX Runtime cannot run the model", where=path, got=error) from error


def body_is_affordable(model: ir.Model) -> bool:
    """Whether the dense copies that the function body makes of one layer at a time stay small."""
    sizes = [node_spec(node).K * node_spec(node).N for node in binary_basis_nodes(model)]
    return max(sizes, default=0) <= _BODY_MAX_WEIGHTS


def check_layers(path: Path) -> list[Comparison]:
    """Compare library and function body with the float64 reference on the first rows of each layer of a file.

    Layers that became one node are checked each. This takes little memory however large the layers are.
    """
    rng = np.random.default_rng(0)
    rows: list[Comparison] = []
    for node in binary_basis_nodes(read_graph(path)):
        for start, stop in _layer_rows(node):
            model, arrays, spec = _rows_of(node, start, min(stop, start + _CHECKED_ROWS))
            x = rng.standard_normal((2, spec.K), dtype=np.float32)
            name = f"{node.name}[{start}:{start + spec.N}]"
            reference = {name: binary_basis_matmul(x.astype(np.float64), *arrays, spec)}
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "layer.onnx"
                save(model, file)
                for side, library in (("library", True), ("body", False)):
                    outputs = {name: run_file(file, {"X": x}, library=library)["Y"]}
                    rows += compare(f"{side} / float64, first rows", outputs, reference, BODY_BOUND)
    return rows


def _layer_rows(node: ir.Node) -> list[tuple[int, int]]:
    """First and last row + 1 of each layer in a node: where a Split cuts its output, if that is between tiles."""
    spec = node_spec(node)
    users = [use.node for use in node.outputs[0].uses()]
    ends = [spec.N]
    if len(users) == 1 and users[0].op_type == "Split" and len(users[0].inputs) == 2:
        sizes = None if users[0].inputs[1] is None else users[0].inputs[1].const_value
        if sizes is not None:
            ends = [int(end) for end in np.cumsum(sizes.numpy())]
    starts = [0, *ends[:-1]]
    cut = ends[-1] == spec.N and all(start % _tile(spec) == 0 for start in starts)
    return [(a, b) for a, b in zip(starts, ends, strict=True) if a < b] if cut else [(0, spec.N)]


def _tile(spec: Spec) -> int:
    """Rows that lie together."""
    return TILE_ROWS if spec.layout == LAYOUT_TILED else 1


def _rows_of(node: ir.Node, start: int, stop: int) -> tuple[ir.Model, tuple[Array, Array, Array, Array], Spec]:
    """A model of one node with some rows of a node, its initializers B, S, Z, C, and its attributes.

    ``start`` is the first row of a tile.
    """
    spec = node_spec(node)
    part = replace(spec, N=stop - start)
    first = start // _tile(spec)
    tiles = np.s_[first : first + part.planes_shape[1]]
    arrays = (
        _part(node.inputs[1], np.s_[:, tiles]),
        _part(node.inputs[2], np.s_[:, tiles]),
        _part(node.inputs[3], tiles),
        _part(node.inputs[4], np.s_[start:stop]),
    )
    float32 = ir.TensorType(ir.DataType.FLOAT)
    x = ir.Value(name="X", shape=ir.Shape(["M", part.K]), type=float32)
    constants = [
        ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        for name, array in zip("BSZC", arrays, strict=True)
        for tensor in (ir.tensor(array, name=name),)
    ]
    copied = ir.node(node.op_type, [x, *constants], asdict(part), domain=node.domain, name=node.name)
    y = copied.outputs[0]
    y.name, y.shape, y.type = "Y", ir.Shape(["M", part.N]), float32
    opsets = {"": MIN_OPSET + 2, node.domain: OPSET_VERSION}
    graph = ir.Graph([x], [y], nodes=[copied], initializers=constants, opset_imports=opsets, name="layer")
    model = ir.Model(graph, ir_version=MIN_IR_VERSION)
    AttachFunctionBody()(model)
    return model, arrays, part


def _part(value: ir.Value | None, index: Any) -> Array:
    """A copy of some of an initializer, of all if it is one number for all; its file is unmapped again."""
    tensor = None if value is None else value.const_value
    if tensor is None:
        raise QbbError("input is not constant", where=OP_TYPE)
    part: Array = tensor.numpy()[... if tensor.size == 1 else index].copy()
    if isinstance(tensor, ir.ExternalTensor):
        tensor.release()
    return part
