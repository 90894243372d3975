"""Exported models in ONNX Runtime on the CUDA provider: our kernels run there, and say what the CPU says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

torch = pytest.importorskip("torch")

from qbb_export import cli  # noqa: E402
from qbb_export import format as fmt  # noqa: E402
from qbb_export.runtimes.ort import session  # noqa: E402
from tests.gpu.cuda_abi import need_cuda  # noqa: E402
from tests.kernels.layers import make_layer, make_node_model  # noqa: E402
from tests.unit.models import tiny_llama  # noqa: E402

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True, scope="module")
def cuda() -> None:
    need_cuda()
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.fail("make test-gpu needs the package onnxruntime-gpu")


def export(source: Path, output: Path, *arguments: str) -> Path:
    assert cli.export_main([str(source), "-o", str(output), "--recipe", "fast", *arguments]) == 0
    return output


Providers = dict[str, set[str]]


def on_both(path: Path, ids: np.ndarray, profile: Path) -> tuple[np.ndarray, np.ndarray, Providers]:
    """The first output on CPU and GPU, and by type of node the providers that ran it on the GPU's side."""
    on_cpu = session(path)
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    feeds = {value.name: feeds[value.name] for value in on_cpu.get_inputs()}
    options = onnxruntime.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(profile)
    opened = session(path, device="cuda", options=options)
    found = opened.run(None, feeds)[0]
    events = json.loads(Path(opened.end_profiling()).read_text(encoding="utf-8"))
    providers: Providers = {}
    for event in events:
        if (arguments := event.get("args", {})) and "provider" in arguments:
            providers.setdefault(arguments.get("op_name", ""), set()).add(arguments["provider"])
    return on_cpu.run(None, feeds)[0], found, providers


@pytest.mark.parametrize("group_size", ["128", "64", "0"])
def test_language_model(tmp_path: Path, shared: Path, group_size: str) -> None:
    model = shared / "models/gutenberg-llama-28m"
    path = export(model, tmp_path / "m.onnx", "--bases", "3", "--group-size", group_size)
    ids = np.random.default_rng(0).integers(0, 8192, (2, 70))
    cpu, gpu, providers = on_both(path, ids, tmp_path / "profile")
    assert providers[fmt.OP_TYPE] == {"CUDAExecutionProvider"}
    assert np.abs(cpu - gpu).max() <= 2e-3 * np.abs(cpu).max()
    assert (cpu.argmax(-1) == gpu.argmax(-1)).mean() >= 0.99


def test_small_model(tmp_path: Path) -> None:
    path = export(tiny_llama(tmp_path / "hf"), tmp_path / "m.onnx", "--bases", "2", "--group-size", "32")
    ids = np.random.default_rng(0).integers(0, 97, (3, 9))
    cpu, gpu, providers = on_both(path, ids, tmp_path / "profile")
    assert providers[fmt.OP_TYPE] == {"CUDAExecutionProvider"}
    assert np.abs(cpu - gpu).max() <= 1e-3 * np.abs(cpu).max()


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_graph_capture(tmp_path: Path, dtype: type) -> None:
    """ONNX Runtime's CUDA graph: the second run is a replay, on what the input holds then."""
    import onnx

    layer = make_layer(np.random.default_rng(0), 1024, 512, 3, 128, dtype=np.float16)
    path = tmp_path / "m.onnx"
    onnx.save(make_node_model(layer, dtype=dtype, dims=(1,)), path)
    options = onnxruntime.SessionOptions()
    from qbb_export.custom_ops import library_info

    options.register_custom_ops_library(str(library_info().path))
    provider = ("CUDAExecutionProvider", {"enable_cuda_graph": "1"})
    opened = onnxruntime.InferenceSession(str(path), options, providers=[provider])
    kind = torch.float32 if dtype is np.float32 else torch.float16
    x = torch.randn(1, 1024, dtype=kind, device="cuda")
    y = torch.zeros(1, 512, dtype=kind, device="cuda")
    binding = opened.io_binding()
    binding.bind_input("X", "cuda", 0, dtype, x.shape, x.data_ptr())
    binding.bind_output("Y", "cuda", 0, dtype, y.shape, y.data_ptr())
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        torch.cuda.synchronize()
        opened.run_with_iobinding(binding)
        torch.cuda.synchronize()
        exact = layer.exact(x.double().cpu().numpy())
        assert np.abs(y.double().cpu().numpy() - exact).max() <= 2e-3 * np.abs(exact).max()
