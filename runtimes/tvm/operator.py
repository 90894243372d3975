"""``BinaryBasisMatMul`` as a function in TVM's TensorIR: exact, and for any target that has a compiler.

Sixteen rows of the matrix, as they lie side by side in layout 1, are the lanes of a vector. With I the inputs of a
group, and input i of a word in bit 8·(i%16/4) + i%4 + 4·(i/16) (docs/format.md):

    y[n] = C[n] + Σ_g ( Z[n,g]·Σ_{k∈I} x[k] + Σ_b S[b,n,g]·(2·Σ_{k∈I, bit} x[k] − Σ_{k∈I} x[k]) )
"""

# TVMScript is read by its own parser; to Python's type checkers it makes no sense.
# mypy: disable-error-code="untyped-decorator,no-untyped-def,valid-type"

from __future__ import annotations

from typing import Any, Final

from tvm.script import tirx as T

from qbb_export.format import TILE_ROWS, WORD_BITS, Spec

LANES = TILE_ROWS
TAG: Final = "qbb.binary_basis_matmul"  # of reference functions: K, N, bases, group_size and mode


def reference(spec: Spec, scale_dtype: str, mode: int) -> Any:
    """:func:`exact` with a tag, which the pass ``LowerBinaryBasis`` looks for."""
    return exact(spec, scale_dtype).with_attr(TAG, [spec.K, spec.N, spec.bases, spec.group_size, mode])


def tag_of(function: Any) -> tuple[Spec, int] | None:
    """Spec and mode of a reference function, None for any other."""
    tag = None if function.attrs is None else function.attrs.get(TAG)
    if tag is None:
        return None
    *numbers, mode = map(int, tag)
    return Spec(*numbers), mode


def exact(spec: Spec, scale_dtype: str, *, threads: bool = True) -> Any:
    """PrimFunc of X float32 ``[M, K]`` (M is free), planes uint32 ``[bases, tiles, words, 16]``, scales ``scale_dtype``
    ``[bases, tiles, groups, 16]``, offset float32 ``[tiles, groups, 16]``, bias float32 ``[tiles, 16]`` and
    Y float32 ``[M, N]``.

    Args:
        spec: layout 1.
        scale_dtype: ``"float16"`` or ``"float32"``.
        threads: False: for programs without TVM's runtime, which has the threads.
    """
    tile_loop = T.parallel if threads else T.serial
    K, N, bases, tiles, words, groups = spec.K, spec.N, spec.bases, spec.tiles, spec.words, spec.groups
    group_words = words if spec.group_size == K else spec.group_size // WORD_BITS
    rest = K - (words - 1) * WORD_BITS  # inputs of the last word

    @T.prim_func(s_tir=True)
    def binary_basis_matmul(
        x_handle: T.handle,
        planes: T.Buffer((bases, tiles, words, LANES), "uint32"),
        scales: T.Buffer((bases, tiles, groups, LANES), scale_dtype),
        offset: T.Buffer((tiles, groups, LANES), "float32"),
        bias: T.Buffer((tiles, LANES), "float32"),
        y_handle: T.handle,
    ):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        M = T.int64()
        x = T.match_buffer(x_handle, (M, K), "float32")
        y = T.match_buffer(y_handle, (M, N), "float32")
        with T.sblock("root"):
            for tile in tile_loop(tiles):
                for row in T.serial(M):
                    with T.sblock("tile"):
                        t = T.axis.spatial(tiles, tile)
                        m = T.axis.spatial(M, row)
                        sums = T.sblock_alloc_buffer((LANES,), "float32")
                        of_set = T.sblock_alloc_buffer((bases, LANES), "float32")
                        total = T.sblock_alloc_buffer((1,), "float32")
                        sums[T.ramp(0, 1, LANES)] = bias[t, T.ramp(0, 1, LANES)]
                        for g in T.serial(groups):
                            total[0] = T.float32(0)
                            for b in T.unroll(bases):
                                of_set[b, T.ramp(0, 1, LANES)] = T.broadcast(T.float32(0), LANES)
                            for w in T.serial(T.min(group_words, words - g * group_words)):
                                for i in T.serial(T.Select(g * group_words + w == words - 1, rest, WORD_BITS)):
                                    total[0] = total[0] + x[m, (g * group_words + w) * WORD_BITS + i]
                                    for b in T.unroll(bases):
                                        of_set[b, T.ramp(0, 1, LANES)] = of_set[b, T.ramp(0, 1, LANES)] + T.Select(
                                            (
                                                (
                                                    planes[b, t, g * group_words + w, T.ramp(0, 1, LANES)]
                                                    >> T.broadcast(
                                                        T.Cast("uint32", i % 16 // 4 * 8 + i % 4 + i // 16 * 4), LANES
                                                    )
                                                )
                                                & T.broadcast(T.uint32(1), LANES)
                                            )
                                            != T.broadcast(T.uint32(0), LANES),
                                            T.broadcast(x[m, (g * group_words + w) * WORD_BITS + i], LANES),
                                            T.broadcast(T.float32(0), LANES),
                                        )
                            sums[T.ramp(0, 1, LANES)] = sums[T.ramp(0, 1, LANES)] + offset[
                                t, g, T.ramp(0, 1, LANES)
                            ] * T.broadcast(total[0], LANES)
                            for b in T.unroll(bases):
                                sums[T.ramp(0, 1, LANES)] = sums[T.ramp(0, 1, LANES)] + (
                                    of_set[b, T.ramp(0, 1, LANES)] * T.broadcast(T.float32(2), LANES)
                                    - T.broadcast(total[0], LANES)
                                ) * T.Cast("float32x16", scales[b, t, g, T.ramp(0, 1, LANES)])
                        for n in T.serial(LANES):
                            if t * LANES + n < N:
                                y[m, t * LANES + n] = sums[n]

    return binary_basis_matmul
