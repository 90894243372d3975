"""``BinaryBasisMatMul`` on GPUs, exact: table look-ups by warp shuffles on CUDA, sign flips on any GPU.

Both read layout 1 in place. Notation of docs/format.md: a tile is 16 rows of the matrix, a word 32 inputs of a row. A
*segment* is a few words of one group. Blocks split N, threads of a block split K, and what they found is added up in a
fixed order, so results repeat bit for bit.

``look_up`` (few rows of X, CUDA): four inputs have 16 signed sums. The 16 lanes of a half-warp hold one of them each,
for the eight nibbles of a word; a shuffle by a nibble is the look-up. A shift, a shuffle and an addition do four
weights: shuffles (32 a cycle and SM) then keep up with memory. Each lane reads as many rows as fit one load:

    lane       0 … 15/v   next 16/v   …            lanes 0–15: one segment of v tiles
    reads      tile t     tile t+1    … t+v-1      lanes 16–31: the next segment of the same tiles

``multiply`` (any number of rows, any GPU): a thread makes a weight, Σ_b ±S, from its bits and multiplies it with
several rows of X.
"""

# TVMScript is read by its own parser; to Python's type checkers it makes no sense.
# mypy: disable-error-code="untyped-decorator,no-untyped-def,valid-type,no-any-return"

from __future__ import annotations

from typing import Any, Final

import numpy as np
from tvm import relax
from tvm.script import tirx as T

from qbb_export.format import TILE_ROWS, WORD_BITS, Spec
from qbb_export.runtimes.tvm.gpu_launch import FEW, WARP, Launch, launches, segment_words
from qbb_export.runtimes.tvm.targets import GPU_KINDS

NO_HALF: Final = ("opencl", "webgpu")  # float16 is an extension there, so scales become float32


def is_gpu(target: Any) -> bool:
    """Whether a ``tvm.target.Target`` is a GPU that we have kernels for."""
    return str(target.kind.name) in GPU_KINDS


def begins_early(target: Any) -> bool:
    """Whether a kernel may start while the one before it ends (CUDA's programmatic dependent launch): from sm_90 on."""
    return target.kind.name == "cuda" and int("".join(filter(str.isdigit, str(target.attrs["arch"])))) >= 90


def emit(builder: Any, call: Any, target: Any) -> Any:
    """A ``lower.Call`` for a GPU."""
    spec, kind, scales = call.spec, str(target.kind.name), call.scales
    if kind in NO_HALF:
        scales = relax.const(scales.value.numpy().astype(np.float32))
    offset = bool(call.offset.value.numpy().any())
    z = call.offset if offset else relax.const(np.zeros((1, 1, TILE_ROWS), np.float32))
    early = begins_early(target)
    function = product(spec, str(scales.value.numpy().dtype), cuda=kind == "cuda", offset=offset, begins_early=early)
    name = f"binary_basis_matmul_{spec.K}_{spec.N}_{spec.bases}"
    kernel = builder.add_func(function.without_attr("global_symbol"), name)
    constants = [call.planes, scales, z, call.bias]
    return relax.call_tir(kernel, [call.x, *constants], relax.TensorType((call.rows, spec.N), "float32"))


def product(
    spec: Spec,
    scale_dtype: str,
    *,
    cuda: bool,
    offset: bool,
    begins_early: bool = False,
    cut: tuple[Launch, ...] = (),
) -> Any:
    """PrimFunc with the parameters of :func:`operator.exact`; it takes one of four kernels by M.

    Args:
        spec: layout 1.
        scale_dtype: ``"float16"`` or ``"float32"``.
        cuda: look-ups for few rows of X, loads of 16 bytes.
        offset: False: the offset is 0, and not read; its shape is then ``[1, 1, 16]``.
        begins_early: kernels read weights, and wait for the kernel before them before they read X. To be compiled with
            ``gpu_pipeline.KERNELS``.
        cut: instead of :func:`gpu_launch.launches`.
    """
    K, N, bases, tiles, words, groups = spec.K, spec.N, spec.bases, spec.tiles, spec.words, spec.groups
    z_shape = (tiles, groups, TILE_ROWS) if offset else (1, 1, TILE_ROWS)
    wide = 4 if cuda and K % 4 == 0 else 1
    one, two, few, many = (
        (_look_up if launch.look_up else _multiply)(spec, launch, wide, offset, begins_early)
        for launch in cut or launches(spec, cuda=cuda)
    )

    @T.prim_func(s_tir=True)
    def binary_basis_matmul(
        x_handle: T.handle,
        planes: T.Buffer((bases, tiles, words, TILE_ROWS), "uint32"),
        scales: T.Buffer((bases, tiles, groups, TILE_ROWS), scale_dtype),
        z: T.Buffer(z_shape, "float32"),
        bias: T.Buffer((tiles, TILE_ROWS), "float32"),
        y_handle: T.handle,
    ):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8})
        M = T.int64()
        x = T.match_buffer(x_handle, (M, K), "float32")
        y = T.match_buffer(y_handle, (M, N), "float32")
        with T.sblock("root"):
            if M == 1:
                one(x, planes, scales, z, bias, y, M)
            elif M == 2:
                two(x, planes, scales, z, bias, y, M)
            elif M > FEW:
                many(x, planes, scales, z, bias, y, M)
            elif M > 2:
                few(x, planes, scales, z, bias, y, M)

    return binary_basis_matmul


def _look_up(spec: Spec, launch: Launch, wide: int, offset: bool, begins_early: bool) -> Any:
    K, N, bases, all_tiles, words = spec.K, spec.N, spec.bases, spec.tiles, spec.words
    R, V, warps = launch.rows, launch.tiles, launch.splits
    S = segment_words(spec, launch.words)
    blocks = -(-all_tiles // V)
    turns = -(-words // (S * 2 * warps))
    lanes = TILE_ROWS // V  # that share a tile
    threads = WARP * warps
    group_words = words if spec.group_size == K else spec.group_size // WORD_BITS
    early = V <= 2 and R == 1  # all words of a segment at once: else there are no registers for them

    @T.inline
    def kernel(x, planes, scales, z, bias, y, M):
        for of_rows in T.thread_binding((M + R - 1) // R, thread="blockIdx.y"):
            for of_tiles in T.thread_binding(blocks, thread="blockIdx.x"):
                for thread in T.thread_binding(threads, thread="threadIdx.x"):
                    with T.sblock("look_up"):
                        row = T.axis.spatial((M + R - 1) // R, of_rows)
                        block = T.axis.spatial(blocks, of_tiles)
                        t = T.axis.spatial(threads, thread)
                        sign = T.sblock_alloc_buffer((4,), "float32", scope="local")
                        four = T.sblock_alloc_buffer((4,), "float32", scope="local")
                        table = T.sblock_alloc_buffer((8,), "float32", scope="local")
                        total = T.sblock_alloc_buffer((R,), "float32", scope="local")
                        word = T.sblock_alloc_buffer((S, bases, V), "uint32", scope="local")
                        scale = T.sblock_alloc_buffer((V,), scales.dtype, scope="local")
                        found = T.sblock_alloc_buffer((R, bases, V), "float32", scope="local")
                        sums = T.sblock_alloc_buffer((R, V), "float32", scope="local")
                        parts = T.sblock_alloc_buffer((warps, R, TILE_ROWS * V), "float32", scope="shared")
                        lane = T.meta_var(t % TILE_ROWS)  # of its half-warp
                        tile = T.meta_var(T.min(block * V + lane // lanes, all_tiles - 1))
                        first = T.meta_var(lane % lanes * V)  # row in the tile
                        if begins_early:
                            T.ptx.griddepcontrol.launch_dependents()
                            if not early:
                                T.ptx.griddepcontrol.wait()
                        for i in T.unroll(4):
                            sign[i] = T.Select(((t >> i) & 1) == 1, T.float32(1), T.float32(-1))
                        for r in T.unroll(R):
                            for v in T.unroll(V):
                                sums[r, v] = T.float32(0)
                        for turn in T.serial(turns):
                            segment = T.meta_var(turn * (2 * warps) + t // TILE_ROWS)
                            for w in T.unroll(S if early else 0):
                                number = T.meta_var(T.min(segment * S + w, words - 1))
                                for b in T.unroll(bases):
                                    for v in T.vectorized(V):
                                        word[w, b, v] = planes[b, tile, number, first + v]
                            if begins_early and early:  # noqa: SIM102  that is Python's condition, the next one TVM's
                                if turn == 0:
                                    T.ptx.griddepcontrol.wait()
                            for r in T.unroll(R):
                                total[r] = T.float32(0)
                                for b in T.unroll(bases):
                                    for v in T.unroll(V):
                                        found[r, b, v] = T.float32(0)
                            for w in T.unroll(S):
                                number = T.meta_var(segment * S + w)
                                if not early:
                                    for b in T.unroll(bases):
                                        for v in T.vectorized(V):
                                            word[w, b, v] = planes[b, tile, T.min(number, words - 1), first + v]
                                for r in T.unroll(R):
                                    of_x = T.meta_var(T.Select(row * R + r < M, row * R + r, T.int64(0)))
                                    for j in T.unroll(8):
                                        start = T.meta_var(number * WORD_BITS + j // 2 * 4 + j % 2 * 16)
                                        for i in T.unroll(4 // wide):
                                            for e in T.vectorized(wide):
                                                four[i * wide + e] = T.if_then_else(
                                                    start + i * wide < K, x[of_x, start + i * wide + e], T.float32(0)
                                                )
                                        table[j] = (sign[0] * four[0] + sign[1] * four[1]) + (
                                            sign[2] * four[2] + sign[3] * four[3]
                                        )
                                        if offset:
                                            total[r] = total[r] + table[j]
                                    for b in T.unroll(bases):
                                        for v in T.unroll(V):
                                            for j in T.unroll(8):
                                                found[r, b, v] = found[r, b, v] + T.tvm_warp_shuffle(
                                                    T.uint32(0xFFFFFFFF),
                                                    table[j],
                                                    T.Cast("int32", word[w, b, v] >> T.uint32(4 * j)),
                                                    TILE_ROWS,
                                                    WARP,
                                                )
                            group = T.meta_var(T.min(segment * S, words - 1) // group_words)
                            for b in T.unroll(bases):
                                for v in T.vectorized(V):
                                    scale[v] = scales[b, tile, group, first + v]
                                for r in T.unroll(R):
                                    for v in T.unroll(V):
                                        sums[r, v] = sums[r, v] + found[r, b, v] * T.Cast("float32", scale[v])
                            if offset:
                                for r in T.unroll(R):  # the lane whose signs are all + has the plain sum
                                    total[r] = T.tvm_warp_shuffle(
                                        T.uint32(0xFFFFFFFF), total[r], TILE_ROWS - 1, TILE_ROWS, WARP
                                    )
                                    for v in T.unroll(V):
                                        sums[r, v] = sums[r, v] + total[r] * z[tile, group, first + v]
                        for r in T.unroll(R):
                            for v in T.unroll(V):
                                sums[r, v] = sums[r, v] + T.tvm_warp_shuffle_xor(
                                    T.uint32(0xFFFFFFFF), sums[r, v], TILE_ROWS, WARP, WARP
                                )
                                if t % WARP < TILE_ROWS:
                                    parts[t // WARP, r, lane * V + v] = sums[r, v]
                        T.evaluate(T.tvm_storage_sync("shared"))
                        for turn in T.serial(-(-R * TILE_ROWS * V // threads)):
                            at = T.meta_var(turn * threads + t)
                            r = T.meta_var(at // (TILE_ROWS * V))
                            n = T.meta_var(block * (TILE_ROWS * V) + at % (TILE_ROWS * V))
                            if at < R * TILE_ROWS * V and row * R + r < M and n < N:
                                sums[0, 0] = bias[n // TILE_ROWS, n % TILE_ROWS]
                                for warp in T.serial(warps):
                                    sums[0, 0] = sums[0, 0] + parts[warp, r, at % (TILE_ROWS * V)]
                                y[row * R + r, n] = sums[0, 0]

    return kernel


def _multiply(spec: Spec, launch: Launch, wide: int, offset: bool, begins_early: bool) -> Any:
    K, N, bases, tiles, words = spec.K, spec.N, spec.bases, spec.tiles, spec.words
    R, splits = launch.rows, launch.splits
    S = segment_words(spec, launch.words)
    turns = -(-words // (S * splits))
    threads = TILE_ROWS * splits
    group_words = words if spec.group_size == K else spec.group_size // WORD_BITS

    @T.inline
    def kernel(x, planes, scales, z, bias, y, M):
        for of_rows in T.thread_binding((M + R - 1) // R, thread="blockIdx.y"):
            for of_tiles in T.thread_binding(tiles, thread="blockIdx.x"):
                for thread in T.thread_binding(threads, thread="threadIdx.x"):
                    with T.sblock("multiply"):
                        row = T.axis.spatial((M + R - 1) // R, of_rows)
                        tile = T.axis.spatial(tiles, of_tiles)
                        t = T.axis.spatial(threads, thread)
                        four = T.sblock_alloc_buffer((R, 4), "float32", scope="local")
                        word = T.sblock_alloc_buffer((bases,), "uint32", scope="local")
                        scale = T.sblock_alloc_buffer((bases,), "float32", scope="local")
                        weight = T.sblock_alloc_buffer((1,), "float32", scope="local")
                        sums = T.sblock_alloc_buffer((R,), "float32", scope="local")
                        parts = T.sblock_alloc_buffer((splits, R, TILE_ROWS), "float32", scope="shared")
                        n = T.meta_var(t % TILE_ROWS)
                        if begins_early:
                            T.ptx.griddepcontrol.launch_dependents()
                            T.ptx.griddepcontrol.wait()
                        for r in T.unroll(R):
                            sums[r] = T.float32(0)
                        for turn in T.serial(turns):
                            segment = T.meta_var(turn * splits + t // TILE_ROWS)
                            group = T.meta_var(T.min(segment * S, words - 1) // group_words)
                            for b in T.unroll(bases):
                                scale[b] = T.Cast("float32", scales[b, tile, group, n])
                            for w in T.serial(S):
                                number = T.meta_var(segment * S + w)
                                for b in T.unroll(bases):
                                    word[b] = planes[b, tile, T.min(number, words - 1), n]
                                for j in T.serial(8):
                                    start = T.meta_var(number * WORD_BITS + j // 2 * 4 + j % 2 * 16)
                                    for r in T.unroll(R):
                                        of_x = T.meta_var(T.Select(row * R + r < M, row * R + r, T.int64(0)))
                                        for i in T.unroll(4 // wide):
                                            for e in T.vectorized(wide):
                                                four[r, i * wide + e] = T.if_then_else(
                                                    start + i * wide < K,
                                                    x[of_x, start + i * wide + e],
                                                    T.float32(0),
                                                )
                                    for i in T.unroll(4):
                                        weight[0] = z[tile, group, n] if offset else T.float32(0)
                                        for b in T.unroll(bases):  # a bit that is 0 turns the sign
                                            weight[0] = weight[0] + T.reinterpret(
                                                "float32",
                                                T.reinterpret("uint32", scale[b])
                                                ^ (
                                                    (
                                                        (word[b] ^ T.uint32(0xFFFFFFFF))
                                                        << T.Cast("uint32", 31 - 4 * j - i)
                                                    )
                                                    & T.uint32(0x80000000)
                                                ),
                                            )
                                        for r in T.unroll(R):
                                            sums[r] = sums[r] + weight[0] * four[r, i]
                        for r in T.unroll(R):
                            parts[t // TILE_ROWS, r, n] = sums[r]
                        T.evaluate(T.tvm_storage_sync("shared"))
                        for turn in T.serial(-(-R // splits)):
                            r = T.meta_var(turn * splits + t // TILE_ROWS)
                            if r < R and row * R + r < M and tile * TILE_ROWS + n < N:
                                sums[0] = bias[tile, n]
                                for split in T.serial(splits):
                                    sums[0] = sums[0] + parts[split, r, n]
                                y[row * R + r, tile * TILE_ROWS + n] = sums[0]

    return kernel
