"""Compile a model with TVM into a folder: a library, and a manifest that says what goes in and comes out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import onnx

from qbb_export import folders
from qbb_export.errors import QbbError
from qbb_export.files import file_sha256, write_whole
from qbb_export.format import mode_number
from qbb_export.runtimes import gate
from qbb_export.runtimes.tvm.load import MANIFEST, MANIFEST_VERSION
from qbb_export.runtimes.tvm.targets import Target, describe, find_target
from qbb_export.runtimes.tvm.versions import PINNED, check_versions


def compile_model(
    path: str | Path, target: str, output: str | Path, *, force: bool = False, mode: str | None = None
) -> Target:
    """Compile an .onnx file that we exported for a machine without ONNX Runtime.

    Args:
        path: the model, data beside it.
        target: a name in ``targets.TARGETS``, or TVM's description as JSON.
        output: folder to write: ``manifest.json`` and ``model.so``, or ``model.tar`` with object files.
        force: replace a folder that this function wrote.
        mode: what all products may do to activations, ``"exact"``, ``"int8"`` or ``"int16"`` (docs/format.md#modes);
            None: what each node of the file says.

    Returns:
        What it was compiled for.

    Raises:
        QbbError: TVM is not there in the versions we need, unknown target, no compiler for it, the file breaks a rule
            of the gate, an operator that TVM cannot import, or the folder cannot or must not be written.
    """
    check_versions()
    path, output = Path(path), Path(output)
    machine = find_target(target)
    number = None if mode is None else mode_number(mode)
    folders.check_folder_writable(output, MANIFEST, force=force)
    gate.check(path)
    import tvm
    from tvm.support import cc

    from qbb_export.runtimes.tvm import cuda, pipeline
    from qbb_export.runtimes.tvm.importer import import_model

    module, graph = import_model(path, number)
    try:
        described = tvm.target.Target(describe(machine))
    except Exception as error:  # whatever TVM raises for a description that it does not know
        raise QbbError("TVM refuses the target", where=f"--target {target}", got=str(error).splitlines()[0]) from error
    if machine.device == "cuda":
        cuda.use_nvcc()
    with described:  # nvcc's callback asks for it
        executable = tvm.compile(module, described, **pipeline.pipelines(described))
    scratch = folders.scratch_path(output)
    folders.make_scratch(scratch)
    try:
        linker = {} if machine.linker is None else {"fcompile": cc.cross_compiler(machine.linker)}
        executable.export_library(str(scratch / machine.library), **linker)
        known = {value.name for value in graph.initializer}
        manifest = {
            "version": MANIFEST_VERSION,
            "target": {"name": machine.name, **machine.description},
            "device": machine.device,
            "mode": mode,
            "model": {"file": path.name, "sha256": file_sha256(path)},
            "library": {"file": machine.library, "sha256": file_sha256(scratch / machine.library)},
            "tvm": PINNED,
            "inputs": [_value(value) for value in graph.input if value.name not in known],
            "outputs": [_value(value) for value in graph.output],
        }
        write_whole(scratch / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
        folders.commit(scratch, output)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return machine


def _value(value: onnx.ValueInfoProto) -> dict[str, Any]:
    tensor = value.type.tensor_type
    shape = [dim.dim_value if dim.HasField("dim_value") else dim.dim_param for dim in tensor.shape.dim]
    return {"name": value.name, "dtype": str(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)), "shape": shape}
