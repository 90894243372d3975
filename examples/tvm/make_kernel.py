"""One linear layer of an exported model as an object file, for programs without any runtime.

    python examples/tvm/make_kernel.py MODEL.onnx NODE TARGET FOLDER

writes ``kernel.o`` (the function ``__tvm_ffi_binary_basis_matmul``), its constants as ``*.bin`` with ``layer.S``, which
puts them into a program, and ``layer.h`` and ``layer.json`` with their sizes. NODE is the name of a
``BinaryBasisMatMul`` node; any other text lists them. TARGET is a target of ``qbb compile`` for CPUs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnx
import tvm
from onnx import numpy_helper

from qbb_export import format as fmt
from qbb_export.errors import QbbError
from qbb_export.runtimes import gate
from qbb_export.runtimes.tvm import operator
from qbb_export.runtimes.tvm.targets import find_target


def read_layer(path: Path, name: str) -> tuple[fmt.Spec, dict[str, np.ndarray]]:
    """Spec and constants of a node, in the order of the kernel's parameters."""
    gate.check(path)
    model = onnx.load(path)
    nodes = {node.name: node for node in model.graph.node if node.op_type == fmt.OP_TYPE}
    if name not in nodes:
        raise QbbError("no such node", where=path, expected=", ".join(nodes), got=name)
    attributes = {a.name: a.i for a in nodes[name].attribute}
    spec = fmt.Spec(*(attributes[key] for key in ("K", "N", "bases", "group_size", "layout")))
    constants = {value.name: numpy_helper.to_array(value) for value in model.graph.initializer}
    planes, scales, offset, bias = (constants[key] for key in nodes[name].input[1:])
    if spec.layout != fmt.LAYOUT_TILED:
        words, rows, z = fmt.from_layout(planes, scales, offset, spec)
        spec = fmt.Spec(spec.K, spec.N, spec.bases, spec.group_size, fmt.LAYOUT_TILED)
        planes, scales, offset = fmt.to_layout(words, rows, z, spec)
    wide = np.broadcast_to(offset, (spec.tiles, spec.groups, operator.LANES)).astype(np.float32)
    padded = np.zeros((spec.tiles, operator.LANES), np.float32)
    padded.reshape(-1)[: spec.N] = np.broadcast_to(bias.reshape(-1), spec.N)
    return spec, {"planes": planes, "scales": scales, "offset": wide, "bias": padded}


def write(path: Path, node: str, target: str, folder: Path) -> None:
    """Compile, and write all files."""
    spec, constants = read_layer(path, node)
    machine = tvm.target.Target(dict(find_target(target).description))
    folder.mkdir(exist_ok=True)
    function = operator.exact(spec, str(constants["scales"].dtype), threads=False)
    tvm.compile(function, machine).mod.write_to_file(str(folder / "kernel.o"), "o")
    sizes = {"K": spec.K, "N": spec.N, "BASES": spec.bases, "TILES": spec.tiles, "WORDS": spec.words}
    sizes |= {"GROUPS": spec.groups, "SCALE_BITS": 8 * constants["scales"].itemsize}
    header = f"enum {{ {', '.join(f'{name} = {size}' for name, size in sizes.items())} }};\n"
    assembly = ".section .rodata\n"
    for name, array in constants.items():
        (folder / f"{name}.bin").write_bytes(np.ascontiguousarray(array).tobytes())
        header += f"extern const char layer_{name}[];\n"
        # TVM's code counts on 64 bytes.
        assembly += f'.globl layer_{name}\n.balign 64\nlayer_{name}:\n.incbin "{name}.bin"\n'
    (folder / "layer.h").write_text(header)
    (folder / "layer.S").write_text(assembly + '.section .note.GNU-stack,"",%progbits\n')
    (folder / "layer.json").write_text(json.dumps(sizes) + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 5:
        sys.exit(f"usage: {__doc__}")
    try:
        write(Path(sys.argv[1]), sys.argv[2], sys.argv[3], Path(sys.argv[4]))
    except QbbError as error:
        sys.exit(f"error: {error}")
