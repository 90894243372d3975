"""``BinaryBasisMatMul`` on CPUs: one algorithm for each mode and number of rows, instantiated for instruction sets.

It is that of our ONNX Runtime kernels (custom_ops/README.md), written in TVM's TensorIR; modes mean the same.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from tvm import relax, tirx
from tvm.target import codegen

from qbb_export.runtimes.tvm.cpu import activations
from qbb_export.runtimes.tvm.cpu.arm import Neon, NeonDot
from qbb_export.runtimes.tvm.cpu.geometry import Geometry
from qbb_export.runtimes.tvm.cpu.isa import Isa
from qbb_export.runtimes.tvm.cpu.products import Product
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


def emit(builder: Any, call: Any, isa: Isa) -> Any:
    """The product as calls of two functions: one of X alone, which layers with the same X share.

    Args:
        builder: Relax's.
        call: ``lower.Call``.
        isa: the instruction set.
    """
    spec, mode = call.spec, call.mode
    offset = call.offset.value.numpy()
    valid = (np.arange(spec.tiles * 16).reshape(-1, 1, 16) < spec.N) & np.ones(offset.shape, bool)
    g = Geometry(spec, bool(np.any(offset[valid] != 0)))
    size = (0, 1, 2)[mode]
    limit = most_few_rows(spec.bases, mode)
    M = call.rows
    rows = M if size or limit is None else tirx.min(M, tirx.const(limit, "int64"))
    if size:
        prepare = activations.byte_tables(isa, g, size, limit)
        shapes = [(activations.codes_shape(g, M, size, limit), "int8"), (M * g.blocks, "float32")]
    else:
        assert limit is not None
        prepare = activations.float_tables(isa, g, limit)
        shapes = [(rows * (g.words * activations.TABLE), "float32")]
    shapes.append((rows * g.blocks, "float32"))
    types = [relax.TensorType((extent,), dtype) for extent, dtype in shapes]
    made = builder.emit(relax.call_tir(builder.add_func(prepare, f"activations_{spec.K}"), [call.x], out_ty=types))
    scales = call.scales.value.numpy()
    product = Product(isa, g, str(scales.dtype), size, limit)
    constants = [isa.planes(g.planes(call.planes.value.numpy()), product.order), g.scales(scales)]
    constants.append(call.bias.value.numpy())
    if g.has_offset:
        constants.append(offset)
    arguments = [call.x, *(relax.TupleGetItem(made, i) for i in range(len(types))), *map(relax.const, constants)]
    function = builder.add_func(product.function(), f"binary_basis_matmul_{spec.K}_{spec.N}_{spec.bases}")
    return relax.call_tir(function, arguments, out_ty=relax.TensorType((M, spec.N), "float32"))


__all__ = ["emit", "isa_of", "most_few_rows"]
