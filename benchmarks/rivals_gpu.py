"""What users would pick instead on a GPU, for gpu.py: each as (kernel, bits, how, bytes of weights, copies, replay)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

Made = tuple[str, int, str, int, int, Callable[[], None]]
Copies = Callable[[int], int]


def matmul_nbits(k: int, n: int, batch: int, copies_of: Copies, *, bits: int, block: int, fpa: bool = False) -> Made:
    """ONNX Runtime's MatMulNBits on the CUDA provider, float16, all copies in one session with a CUDA graph."""
    import onnxruntime

    rng = np.random.default_rng(0)
    packed = rng.integers(0, 256, (n, k // block, block * bits // 8), dtype=np.uint8)
    scales = (rng.random((n, k // block)) / 100).astype(np.float16)
    size = packed.nbytes + scales.nbytes
    count = copies_of(size)
    nodes, initializers = [], []
    for i in range(count):
        initializers += [numpy_helper.from_array(packed, f"B{i}"), numpy_helper.from_array(scales, f"S{i}")]
        attributes: dict[str, Any] = {"K": k, "N": n, "bits": bits, "block_size": block}
        nodes.append(
            helper.make_node("MatMulNBits", ["X", f"B{i}", f"S{i}"], [f"Y{i}"], domain="com.microsoft", **attributes)
        )
    graph = helper.make_graph(
        nodes,
        "rival",
        [helper.make_tensor_value_info("X", TensorProto.FLOAT16, [batch, k])],
        [helper.make_tensor_value_info(f"Y{i}", TensorProto.FLOAT16, [batch, n]) for i in range(count)],
        initializers,
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    options = onnxruntime.SessionOptions()
    if fpa:
        options.add_session_config_entry("ep.cuda.fpa_intb_gemm", "1")
    stream = torch.cuda.current_stream()
    provider = {"enable_cuda_graph": "1", "user_compute_stream": str(stream.cuda_stream)}
    data = model.SerializeToString()
    session = onnxruntime.InferenceSession(data, options, providers=[("CUDAExecutionProvider", provider)])
    if "CUDAExecutionProvider" not in session.get_providers():
        raise RuntimeError("no CUDAExecutionProvider")
    x = torch.randn(batch, k, dtype=torch.float16, device="cuda")
    ys = [torch.empty(batch, n, dtype=torch.float16, device="cuda") for _ in range(count)]
    binding = session.io_binding()
    binding.bind_input("X", "cuda", 0, np.float16, x.shape, x.data_ptr())
    for i, y in enumerate(ys):
        binding.bind_output(f"Y{i}", "cuda", 0, np.float16, y.shape, y.data_ptr())

    def replay() -> None:
        session.run_with_iobinding(binding)
        _ = x, ys  # alive as long as the graph

    return "MatMulNBits", bits, f"b{block}{' fpA' if fpa else ''}", size, count, replay


def gemlite(k: int, n: int, batch: int, copies_of: Copies, *, bits: int) -> Made:
    """gemlite A16Wn, group 128."""
    from gemlite.core import DType, GemLiteLinearTriton

    size = k * n * bits // 8 + 2 * 2 * n * k // 128
    layers = []
    for _ in range(copies_of(size)):
        layer = GemLiteLinearTriton(bits, 128, k, n, DType.FP16, DType.FP16)
        codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8, device="cuda")
        scales = torch.rand(n * k // 128, 1, dtype=torch.float16, device="cuda") / 100
        zeros = torch.full_like(scales, 2 ** (bits - 1))
        layer.pack(codes, scales, zeros, None)
        layers.append(layer)
    x = torch.randn(batch, k, dtype=torch.float16, device="cuda")
    for layer in layers[:2]:
        layer(x)  # tunes itself
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in layers:
            layer(x)

    def replay() -> None:
        graph.replay()
        _ = x, layers  # alive as long as the graph

    return "gemlite", bits, "A16", size, len(layers), replay


def _nbits(bits: int, block: int, fpa: bool = False) -> Callable[[int, int, int, Copies], Made]:
    return lambda k, n, batch, copies_of: matmul_nbits(k, n, batch, copies_of, bits=bits, block=block, fpa=fpa)


def _gemlite(bits: int) -> Callable[[int, int, int, Copies], Made]:
    return lambda k, n, batch, copies_of: gemlite(k, n, batch, copies_of, bits=bits)


RIVALS: dict[str, Callable[[int, int, int, Copies], Made]] = {
    "MatMulNBits 4-bit b128": _nbits(4, 128),
    "MatMulNBits 4-bit b32 fpA": _nbits(4, 32, fpa=True),
    "MatMulNBits 2-bit b128": _nbits(2, 128),
    "MatMulNBits 2-bit b64 fpA": _nbits(2, 64, fpa=True),
    **{f"gemlite A16W{bits}": _gemlite(bits) for bits in (4, 2, 1)},
}
