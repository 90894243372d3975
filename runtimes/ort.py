"""Run exported models in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import onnxruntime

from qbb_export.custom_ops import library_info
from qbb_export.errors import QbbError
from qbb_export.format import MODES, mode_number
from qbb_export.passes.function_body import binary_basis_nodes
from qbb_export.runtimes import gate
from qbb_export.runtimes import probe as probing

_PROVIDERS = {
    "cpu": ["CPUExecutionProvider"],
    "cuda": ["CUDAExecutionProvider", "CPUExecutionProvider"],  # the second for shapes and the like
}


def session(
    path: str | Path,
    *,
    device: str = "cpu",
    library: bool = True,
    mode: str | None = None,
    threads: int | None = None,
    options: onnxruntime.SessionOptions | None = None,
    check_data: bool = True,
    probe: bool = False,
) -> onnxruntime.InferenceSession:
    """Check a model file and open it in ONNX Runtime with our operator registered.

    Args:
        path: an .onnx file, exported by us or any other.
        device: ``"cpu"``, or ``"cuda"`` for the first NVIDIA GPU (package onnxruntime-gpu).
        library: False leaves our library out, so that ``BinaryBasisMatMul`` runs through the function body in the file.
        mode: ``"exact"``, ``"int8"`` or ``"int16"`` for all nodes, whatever mode they name; None leaves it to them.
        threads: of one operator; None: ONNX Runtime's choice.
        options: session options to extend; the library is registered on them.
        check_data: False skips the digests: of the weights, which reads all of them once, and of the graph, which stops
            a file that was changed by another program.
        probe: open the file in a child process first, so that a crash there is an error here. For files from strangers;
            costs a second or two. ``options`` are not handed on to the child.

    Returns:
        A ready session.

    Raises:
        QbbError: unknown device or mode, the file breaks a rule of the gate, the library is missing or has no kernels
            for the device, ONNX Runtime has no such device or refuses the model, or the probe crashed or did not end.
    """
    if device not in _PROVIDERS:
        raise QbbError("unknown device", where="device", expected=" or ".join(sorted(_PROVIDERS)), got=device)
    wanted = _PROVIDERS[device][0]
    if wanted not in onnxruntime.get_available_providers():
        raise QbbError(f"this ONNX Runtime has no {wanted}", where="device", expected="onnxruntime-gpu", got=device)
    path = Path(path)
    if probe:
        probing.probe(path, device=device, library=library, mode=mode)
    model = gate.check(path, data=check_data)
    options = options or onnxruntime.SessionOptions()
    if threads is not None:
        options.intra_op_num_threads = threads
    if mode is not None:
        options.add_session_config_entry("qbb.mode", MODES[mode_number(mode)])  # read when the library is registered
    if library and binary_basis_nodes(model):
        info = library_info()
        if device == "cuda" and not info.cuda:
            raise QbbError("no CUDA kernels in the library", where=info.path, expected="a build where nvcc is")
        options.register_custom_ops_library(str(info.path))
    try:
        opened = onnxruntime.InferenceSession(path, options, providers=_PROVIDERS[device])
    except Exception as error:  # onnxruntime's exceptions share no base class
        raise QbbError("ONNX Runtime refuses the model", where=path, got=str(error)) from error
    if wanted not in opened.get_providers():  # it goes on without a provider that does not start
        raise QbbError("ONNX Runtime cannot use the GPU", where=path, expected=wanted, got=opened.get_providers())
    return opened
