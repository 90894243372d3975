"""All implementations of the operator, from one definition: numpy, PyTorch, onnx.reference, the function body
in stock ONNX Runtime, and our library with each instruction set forced.

Integer activations and power-of-two scales leave nothing to round, so equal means equal (the sign of a zero aside).
``-m slow`` runs the whole grid: K 1..130, N {1,2,3,31,32,33,64}, M {1,2,3,5,8,17}, 1..8 bases, both layouts.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from qbb_export import format as fmt
from qbb_export.custom_ops import library_path
from qbb_export.passes.function_body import function_body
from qbb_export.reference import binary_basis_matmul
from tests.kernels import abi
from tests.kernels.layers import Layer, group_sizes, make_initializers, make_layer, make_node

NS = (1, 2, 3, 31, 32, 33, 64)
MS = (1, 2, 3, 5, 8, 17)
SAMPLE = (1, 31, 33, 130)
OPSET = 20


def layers_of(K: int, layout: int) -> list[Layer]:
    """One layer for every N and number of bases; the rest is drawn."""
    rng = np.random.default_rng([K, layout])
    layers = []
    for N, bases in itertools.product(NS, range(1, fmt.MAX_BASES + 1)):
        group_size = int(rng.choice(group_sizes(K)))
        offset, bias, wide = (bool(v) for v in rng.integers(0, 2, 3))
        dtype = np.float32 if wide else np.float16
        options = {"layout": layout, "dtype": dtype, "offset": offset, "bias": bias, "powers_of_two": True}
        layers.append(make_layer(rng, K, N, bases, group_size, **options))
    return layers


def model_of(layers: list[Layer], K: int, layout: int) -> onnx.ModelProto:
    """All layers side by side on one X, and the function body."""
    graph = helper.make_graph(
        [make_node(layer, y=f"Y{i}", prefix=f"p{i}_", name=f"n{i}") for i, layer in enumerate(layers)],
        "layers",
        [helper.make_tensor_value_info("X", TensorProto.FLOAT, ["M", K])],
        [
            helper.make_tensor_value_info(f"Y{i}", TensorProto.FLOAT, ["M", layer.spec.N])
            for i, layer in enumerate(layers)
        ],
        [tensor for i, layer in enumerate(layers) for tensor in make_initializers(layer, f"p{i}_")],
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(fmt.DOMAIN, fmt.OPSET_VERSION)]
    body = ir.to_proto(function_body(layout, OPSET))
    return helper.make_model(graph, opset_imports=opsets, functions=[body], ir_version=9)


def torch_outputs(layers: list[Layer], x: np.ndarray) -> list[np.ndarray] | None:
    try:
        import torch
    except ImportError:  # the wheel is tested without PyTorch
        return None
    from qbb_export.module import BinaryBasisLinear

    torch.set_num_threads(1)  # hundreds of tiny products; handing them to other threads costs more than they do
    outputs = []
    for layer in layers:
        words, scales, offset = fmt.from_layout(layer.planes, layer.scales, layer.offset, layer.spec)
        offset = np.broadcast_to(offset, (layer.spec.N, layer.spec.groups)).copy()
        module = BinaryBasisLinear(
            torch.from_numpy(words.view(np.int32)),
            torch.from_numpy(scales),
            torch.from_numpy(offset),
            torch.from_numpy(np.broadcast_to(layer.bias, layer.spec.N).copy()),
            in_features=layer.spec.K,
            group_size=layer.spec.group_size,
        )
        outputs.append(module(torch.from_numpy(x)).numpy())
    return outputs


def implementations(
    layers: list[Layer], model: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[str, object]]:
    """Name and a function from X to all outputs."""
    data = model.SerializeToString()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    stock = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    yield "function body in ONNX Runtime", lambda x: stock.run(None, {"X": x})
    evaluator = ReferenceEvaluator(model)
    yield "onnx.reference", lambda x: evaluator.run(None, {"X": x})
    yield "torch", lambda x: torch_outputs(layers, x)
    for isa in abi.isas():
        monkeypatch.setenv("QBB_ISA", isa)
        options = onnxruntime.SessionOptions()
        options.register_custom_ops_library(str(library_path()))
        session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        yield f"library, {isa}", lambda x, session=session: session.run(None, {"X": x})


def check(K: int, layout: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = layers_of(K, layout)
    x = np.random.default_rng(K).integers(-8, 9, (max(MS), K)).astype(np.float32)
    reference = [
        binary_basis_matmul(x, layer.planes, layer.scales, layer.offset, layer.bias, layer.spec) for layer in layers
    ]
    for name, run in implementations(layers, model_of(layers, K, layout), monkeypatch):
        for M in MS:
            outputs = run(x[:M])
            if outputs is None:
                continue
            for layer, got, expected in zip(layers, outputs, reference, strict=True):
                assert got.dtype == np.float32
                assert np.array_equal(got, expected[:M]), f"{name}: {layer.spec}, M={M}"


@pytest.mark.parametrize("layout", fmt.LAYOUTS)
@pytest.mark.parametrize("K", SAMPLE)
def test_agreement(K: int, layout: int, monkeypatch: pytest.MonkeyPatch) -> None:
    check(K, layout, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("layout", fmt.LAYOUTS)
@pytest.mark.parametrize("K", [k for k in range(1, 131) if k not in SAMPLE])
def test_agreement_all_k(K: int, layout: int, monkeypatch: pytest.MonkeyPatch) -> None:
    check(K, layout, monkeypatch)
