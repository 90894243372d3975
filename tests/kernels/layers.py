"""Random layers of format 1, ONNX models around them, and what they must compute."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from qbb_export import format as fmt
from qbb_export.reference import dense_weight

ELEMENT = {np.dtype(np.float32): TensorProto.FLOAT, np.dtype(np.float16): TensorProto.FLOAT16}


def least_many(bases: int, mode: int = 0) -> int:
    """As core/partition.h: from so many rows and 3 bases on, kernels make the weights floats or bytes first."""
    return (128 if mode == 2 else 40) // bases + 1


def many_rows(bases: int, rows: int, mode: int = 0) -> bool:
    """Whether they do."""
    return bases > 2 and rows >= least_many(bases, mode)


@dataclass(frozen=True)
class Layer:
    spec: fmt.Spec
    planes: np.ndarray
    scales: np.ndarray
    offset: np.ndarray
    bias: np.ndarray

    @cached_property
    def weight(self) -> np.ndarray:
        """What it stands for: float64 ``[N, K]``."""
        return dense_weight(self.planes, self.scales, self.offset, self.spec)

    @cached_property
    def magnitudes(self) -> np.ndarray:
        """Σ|s| and the offset's magnitude of each weight: float64 ``[N, K]``."""
        all_plus = np.full_like(self.planes, 0xFFFFFFFF)
        return dense_weight(all_plus, np.abs(self.scales), np.abs(self.offset), self.spec)

    def exact(self, x: np.ndarray) -> np.ndarray:
        """The output in float64, whatever the type of x."""
        return x.astype(np.float64) @ self.weight.T + self.bias.astype(np.float64)

    def terms(self, x: np.ndarray, bias: bool = True) -> np.ndarray:
        """Σ|s||x| with offset and bias: what rounding errors are proportional to."""
        products = np.abs(x.astype(np.float64)) @ self.magnitudes.T
        return products + np.abs(self.bias.astype(np.float64)) if bias else products

    def row_levels(self) -> np.ndarray:
        """The largest Σ|s| of any group, for each row: ``[N]``."""
        scales = fmt.from_layout(self.planes, self.scales, self.offset, self.spec)[1]
        each = np.abs(scales.astype(np.float64)).sum(0).reshape(self.spec.N, self.spec.groups)
        return np.asarray(each.max(axis=1))

    def bound(self, x: np.ndarray) -> np.ndarray:
        """How far a float32 sum may be from :meth:`exact`.

        Promised is 2·K·eps·Σ|s||x|. For long rows our order of additions is far better, and only its own bound sees
        a single wrong bit. Few rows: every term passes 2 additions in a table, 3 in a word, at most 8 in a segment, one
        product, one addition for each later segment and basis, and the bias. Many rows: the bases and the
        offset, at most 128 fused additions in a block, one for each later block, and the bias. Each rounds by 2^-24 at
        most.
        """
        segments = -(-self.spec.words // 8) + self.spec.groups
        depth = 2 + 3 + 8 + 1 + segments * (self.spec.bases + 1) + 1
        if many_rows(self.spec.bases, len(x)):
            depth = self.spec.bases + 1 + 128 + -(-self.spec.K // 128) + 1
        promised = 2 * self.spec.K * 2.0**-23
        return min(promised, 1.01 * depth * 2.0**-24) * self.terms(x)


def group_sizes(K: int) -> list[int]:
    """K and every multiple of 32 below it, but few of many."""
    below = list(range(32, K, 32))
    return [K, *below[:2], *below[-1:]] if len(below) > 3 else [K, *below]


def make_layer(
    rng: np.random.Generator,
    K: int,
    N: int,
    bases: int,
    group_size: int | None = None,
    *,
    layout: int = fmt.LAYOUT_TILED,
    dtype: type = np.float32,
    offset: bool = True,
    bias: bool = True,
    powers_of_two: bool = False,
) -> Layer:
    """A random layer. With ``powers_of_two``, sums over small integers are exact in float32."""
    spec = fmt.Spec(K, N, bases, K if group_size is None else group_size, layout)
    G = spec.groups
    words = fmt.pack_words(rng.integers(0, 2, (bases, N, K)).astype(np.bool_))
    if powers_of_two:
        scales = np.exp2(rng.integers(-3, 3, (bases, N, G))) * rng.choice([-1, 1], (bases, N, G))
        z, c = rng.integers(-4, 5, (N, G)) / 4, rng.integers(-20, 21, N) / 2
    else:
        scales, z, c = rng.normal(size=(bases, N, G)), rng.normal(size=(N, G)), rng.normal(size=N)
    planes, scales, z = fmt.to_layout(words, scales.astype(dtype), z.astype(np.float32) if offset else None, spec)
    return Layer(spec, planes, scales, z, c.astype(np.float32) if bias else np.zeros(1, np.float32))


def in_layout(layer: Layer, layout: int) -> Layer:
    """The same layer in another layout."""
    rows = fmt.from_layout(layer.planes, layer.scales, layer.offset, layer.spec)
    spec = replace(layer.spec, layout=layout)
    offset = None if layer.offset.shape == (1, 1) and spec.offset_shape != (1, 1) else rows[2].reshape(-1, spec.groups)
    planes, scales, z = fmt.to_layout(rows[0], rows[1], offset, spec)
    return Layer(spec, planes, scales, z if offset is not None else layer.offset, layer.bias)


def with_garbage(rng: np.random.Generator, layer: Layer) -> Layer:
    """Random values in all padding: bits at or past K, rows at or past N (NaN scales and offsets there, too)."""
    spec = layer.spec
    tail = np.zeros((1, 1, spec.words * fmt.WORD_BITS), dtype=np.bool_)
    tail[..., spec.K :] = True
    mask = fmt.pack_words(tail)[0, 0]  # [W]
    noise = rng.integers(0, 2**32, layer.planes.shape, dtype=np.uint32)
    if spec.layout == fmt.LAYOUT_ROWS:
        return replace(layer, planes=(layer.planes & ~mask) | (noise & mask))
    lanes = np.arange(spec.tiles * fmt.TILE_ROWS).reshape(spec.tiles, 1, fmt.TILE_ROWS) >= spec.N  # [T, 1, 16]
    tiled_mask = np.where(lanes, np.uint32(0xFFFFFFFF), fmt.swizzle(mask)[None, :, None])
    offset = layer.offset if layer.offset.shape == (1, 1) else np.where(lanes, np.float32(np.nan), layer.offset)
    return replace(
        layer,
        planes=(layer.planes & ~tiled_mask) | (noise & tiled_mask),
        scales=np.where(lanes, layer.scales.dtype.type(np.nan), layer.scales),
        offset=offset,
    )


def make_node(layer: Layer, x: str = "X", y: str = "Y", prefix: str = "", name: str = "linear") -> onnx.NodeProto:
    s = layer.spec
    attributes = {"K": s.K, "N": s.N, "bases": s.bases, "group_size": s.group_size, "layout": s.layout}
    inputs = [x, *(prefix + n for n in "BSZC")]
    return helper.make_node(fmt.OP_TYPE, inputs, [y], name=name, domain=fmt.DOMAIN, format=s.format, **attributes)


def make_initializers(layer: Layer, prefix: str = "") -> list[onnx.TensorProto]:
    arrays = (layer.planes, layer.scales, layer.offset, layer.bias)
    return [numpy_helper.from_array(a, prefix + n) for n, a in zip("BSZC", arrays, strict=True)]


def make_node_model(
    layer: Layer,
    *,
    dtype: type = np.float32,
    dims: Iterable[str | int] = ("M",),
    node: onnx.NodeProto | None = None,
    initializers: list[onnx.TensorProto] | None = None,
    graph_inputs: Iterable[onnx.ValueInfoProto] = (),
    functions: Iterable[onnx.FunctionProto] = (),
) -> onnx.ModelProto:
    """A model of one node; the keywords put something else, right or wrong, into its place."""
    element = ELEMENT[np.dtype(dtype)]
    dims = tuple(dims)
    graph = helper.make_graph(
        [make_node(layer) if node is None else node],
        "one_linear",
        [helper.make_tensor_value_info("X", element, [*dims, layer.spec.K]), *graph_inputs],
        [helper.make_tensor_value_info("Y", element, [*dims, layer.spec.N])],
        make_initializers(layer) if initializers is None else initializers,
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(fmt.DOMAIN, fmt.OPSET_VERSION)]
    return helper.make_model(graph, opset_imports=opsets, functions=list(functions), ir_version=9)
