"""``BinaryBasisMatMul`` on CPUs: one algorithm for each mode and number of rows, instantiated for instruction sets.

It is that of our ONNX Runtime kernels (custom_ops/README.md), written in TVM's TensorIR; modes mean the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from tvm import relax, tirx
from tvm.target import codegen

from qbb_export.format import TILE_ROWS, Spec
from qbb_export.runtimes.tvm.cpu import activations
from qbb_export.runtimes.tvm.cpu.arm import Neon, NeonDot
from qbb_export.runtimes.tvm.cpu.floats import legalizations
from qbb_export.runtimes.tvm.cpu.geometry import Geometry
from qbb_export.runtimes.tvm.cpu.isa import Isa
from qbb_export.runtimes.tvm.cpu.products import Product
from qbb_export.runtimes.tvm.cpu.schedule import schedule_rest
from qbb_export.runtimes.tvm.cpu.x86 import Avx2, Avx512, Avx512Vnni

EXACT, INT8, INT16 = range(3)
_FEW_ROWS: Final = 16  # in exact mode, with one or two bases


# Best first, with the features that LLVM must know of the target.
_NEEDS: Final[tuple[tuple[type[Isa], tuple[str, ...]], ...]] = (
    (Avx512Vnni, ("avx512f", "avx512bw", "avx512vl", "avx512vbmi", "avx512vnni")),
    (Avx512, ("avx512f", "avx512bw", "avx512vl")),
    (Avx2, ("avx2", "fma", "f16c")),
    (NeonDot, ("neon", "dotprod")),
    (Neon, ("neon",)),
    (Isa, ()),
)


def isa_of(target: Any) -> Isa:
    """The best for a ``tvm.target.Target`` of kind llvm."""
    for isa, features in _NEEDS:
        if all(codegen.target_has_features([feature], target) for feature in features):
            return isa()
    return Isa()


def most_few_rows(bases: int, mode: int) -> int | None:
    """Up to so many rows of X are looked up (core/partition.h); None: however many."""
    if bases > 2:
        return (128 if mode == INT16 else 40) // bases
    return _FEW_ROWS if mode == EXACT else None


@dataclass(frozen=True)
class Kernels:
    """The functions of one matrix.

    Attributes:
        prepare: of X: what is made of it alone, several outputs.
        product: of X, those, the constants, and Y.
        constants: in the order of reading.
        made: for M rows, a number or an expression: sizes and types of the outputs of ``prepare``.
    """

    prepare: Any
    product: Any
    constants: list[npt.NDArray[Any]]
    made: Callable[[Any], list[tuple[Any, str]]]


def kernels(
    isa: Isa,
    spec: Spec,
    mode: int,
    planes: npt.NDArray[np.uint32],
    scales: npt.NDArray[np.floating],
    offset: npt.NDArray[np.float32],
    bias: npt.NDArray[np.float32],
) -> Kernels:
    """What :class:`lower.Call` says, for an instruction set."""
    valid = (np.arange(spec.tiles * TILE_ROWS).reshape(-1, 1, TILE_ROWS) < spec.N) & np.ones(offset.shape, bool)
    g = Geometry(spec, bool(np.any(offset[valid] != 0)))
    size, limit = mode, most_few_rows(spec.bases, mode)

    def made(M: Any) -> list[tuple[Any, str]]:
        if size:
            return [
                (activations.codes_shape(g, M, size, limit), "int8"),
                (M * g.blocks, "float32"),
                (M * g.blocks, "float32"),
            ]
        rows = tirx.min(M, tirx.const(limit, "int64"))
        return [(rows * (g.words * activations.TABLE), "float32"), (rows * g.blocks, "float32")]

    if size:
        prepare = activations.byte_tables(g, size, limit)
    else:
        assert limit is not None
        prepare = activations.float_tables(isa, g, limit)
    if not isa.half_scales:
        scales = scales.astype(np.float32)
    product = Product(isa, g, str(scales.dtype), size, limit)
    constants = [isa.planes(g.planes(planes), product.order), g.scales(scales), bias]
    if g.has_offset:
        constants.append(offset)
    return Kernels(prepare, product.function(), constants, made)


def emit(builder: Any, call: Any, isa: Isa) -> Any:
    """The product as calls of two functions: one of X alone, which layers with the same X share.

    Args:
        builder: Relax's.
        call: ``lower.Call``.
        isa: the instruction set.
    """
    spec, M = call.spec, call.rows
    arrays = [value.value.numpy() for value in (call.planes, call.scales, call.offset, call.bias)]
    k = kernels(isa, spec, call.mode, *arrays)
    types = [relax.TensorType((extent,), dtype) for extent, dtype in k.made(M)]
    made = builder.emit(relax.call_tir(builder.add_func(k.prepare, f"activations_{spec.K}"), [call.x], out_ty=types))
    parts = [relax.TupleGetItem(made, i) for i in range(len(types))]
    function = builder.add_func(k.product, f"binary_basis_matmul_{spec.K}_{spec.N}_{spec.bases}")
    y = relax.TensorType((M, spec.N), "float32")
    return relax.call_tir(function, [call.x, *parts, *map(relax.const, k.constants)], out_ty=y)


__all__ = ["Kernels", "emit", "isa_of", "kernels", "legalizations", "most_few_rows", "schedule_rest"]
