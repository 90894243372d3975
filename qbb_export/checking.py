"""Is a file sound? Everything that can be told without running it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qbb_export.artifact import data_digest, external_tensors, is_sealed
from qbb_export.errors import QbbError
from qbb_export.generation.folder import foreign_code, onnx_file, read_config
from qbb_export.passes.function_body import binary_basis_nodes
from qbb_export.runtimes import gate
from qbb_export.runtimes.probe import SECONDS, probe


@dataclass(frozen=True)
class Sound:
    """What :func:`check_model` found.

    Attributes:
        path: of the graph.
        operators: ``BinaryBasisMatMul`` nodes.
        nodes: all others, functions not inlined.
        data_files: that the graph's weights lie in.
        without_digest: names of files whose damage could not be seen, because nothing tells their SHA-256.
    """

    path: Path
    operators: int
    nodes: int
    data_files: int
    without_digest: tuple[str, ...]


def check_model(source: Path, *, isolated: bool = False, seconds: float = SECONDS) -> Sound:
    """Check an .onnx file, or a folder that generates text: that it is complete, and names no code but a copy of the
    installed library.

    Args:
        source: FILE.onnx or DIR.
        isolated: open it in a child process first, see :func:`qbb_export.runtimes.probe.probe`.
        seconds: the child is killed after so long.

    Raises:
        QbbError: it is not sound; what is wrong, in one line.
    """
    file = onnx_file(source) if source.is_dir() else source
    if file is None:
        raise QbbError("no model in the folder", where=source, expected="an .onnx file, or a folder that generates")
    if source.is_dir():
        code = foreign_code(source, read_config(source))
        if code is not None:
            raise QbbError("folder names code", where=source, expected="a copy of the installed library", got=code)
    if isolated:
        probe(file, seconds=seconds)
    model = gate.check(file)
    data = {Path(tensor.path) for tensor in external_tensors(model)}
    unknown = [path.name for path in sorted(data) if data_digest(path.name) is None]
    if not is_sealed(model):
        unknown.insert(0, file.name)
    operators = len(binary_basis_nodes(model))
    nodes = sum(1 for _ in model.graph.all_nodes()) - operators
    return Sound(file, operators, nodes, len(data), tuple(unknown))
