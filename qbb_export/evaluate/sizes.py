"""What a model takes: its files, and the bits of its quantised weights."""

from __future__ import annotations

from pathlib import Path

from qbb_export.artifact import external_tensors, read_graph
from qbb_export.format import DOMAIN, OP_TYPE

# Inputs that make up the weight, and how the operator calls its sizes; the bias is none of them.
_QUANTISED = {(DOMAIN, OP_TYPE): slice(1, 4), ("com.microsoft", "MatMulNBits"): slice(1, 5)}


def file_bytes(source: Path) -> int | None:
    """An .onnx file with its data files, or the weight files of a Hugging Face folder; None for a hub id."""
    if source.is_file():
        data = {Path(tensor.path) for tensor in external_tensors(read_graph(source))}
        return sum(file.stat().st_size for file in {source, *data})
    files = list(source.glob("*.safetensors")) or list(source.glob("pytorch_model*.bin"))
    return sum(file.stat().st_size for file in files) if files else None


def bits_per_weight(path: Path) -> float | None:
    """Stored bits per weight of all quantised matrices of an .onnx file; None if there are none.

    Planes, scales and offset of ``qbb::BinaryBasisMatMul``, or quants, scales, zero points and group indices of
    ``com.microsoft::MatMulNBits``, in the types that the file has, padding counted. A matrix that several nodes share
    counts once.
    """
    bits: dict[str, int] = {}
    weights: dict[str, int] = {}
    for node in read_graph(path).graph.all_nodes():
        place = _QUANTISED.get((node.domain, node.op_type))
        if place is None:
            continue
        parts = [value for value in node.inputs[place] if value is not None and value.const_value is not None]
        name = parts[0].name or "" if parts else ""
        bits[name] = sum(8 * part.const_value.nbytes for part in parts if part.const_value is not None)
        weights[name] = node.attributes.get_int("K", 0) * node.attributes.get_int("N", 0)
    total = sum(weights.values())
    return sum(bits.values()) / total if total else None
