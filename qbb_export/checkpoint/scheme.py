"""What config.json says of a quantisation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from qbb_export.errors import QbbError

GPTQ_BITS: Final = (2, 3, 4, 8)
AWQ_BITS: Final = (4,)


@dataclass(frozen=True)
class Scheme:
    """What config.json says of the quantisation.

    Args:
        method: ``"gptq"`` or ``"awq"``.
        bits: of a weight.
        group_size: inputs that share a scale, or -1 for all.
        one_too_low: zero points are stored less one (GPTQ's first format).
        symmetric: all zero points are ``2**(bits - 1)``.
        by_gptqmodel: GPTQModel wrote it.
    """

    method: str
    bits: int
    group_size: int
    one_too_low: bool
    symmetric: bool
    by_gptqmodel: bool


def read_scheme(config: Mapping[str, Any], where: Path) -> Scheme:
    """Read "quantization_config" of a config.json.

    Args:
        config: what the file holds.
        where: the file, for error messages.

    Raises:
        QbbError: there is none, or it names a method, layout, width or group size that is not supported.
    """
    said = config.get("quantization_config")
    if not isinstance(said, dict):
        raise QbbError("not a quantised checkpoint", where=where, expected="quantization_config")
    method = said.get("quant_method")
    if method not in ("gptq", "awq"):
        raise QbbError("unknown quant_method", where=where, expected="gptq or awq", got=method)
    # Tools call the layout by different names; AutoGPTQ and AutoAWQ, the first of their kind, by none.
    keys, known = (
        (("version", "format"), ("gemm",))
        if method == "awq"
        else (("checkpoint_format", "format"), ("gptq", "gptq_v2"))
    )
    layout = next((said[key] for key in keys if said.get(key) is not None), known[0])
    if str(layout).lower() not in known:
        raise QbbError(f"unknown {keys[0]}", where=where, expected=" or ".join(known), got=layout)
    bits, size = said.get("bits"), said.get("group_size")
    allowed = AWQ_BITS if method == "awq" else GPTQ_BITS
    if type(bits) is not int or bits not in allowed:
        raise QbbError("unknown bits", where=where, expected=f"one of {', '.join(map(str, allowed))}", got=bits)
    if type(size) is not int or (size < 1 and size != -1):
        raise QbbError("bad group_size", where=where, expected="-1 or a positive number", got=size)
    dynamic = said.get("dynamic")
    for pattern in dynamic if isinstance(dynamic, dict) else ():
        if not pattern.startswith("-:"):  # those are left unquantised
            raise QbbError("settings of single layers are not supported", where=where, got=f"dynamic: {pattern}")
    return Scheme(
        method=method,
        bits=bits,
        group_size=size,
        one_too_low=str(layout).lower() == "gptq",
        symmetric=method == "gptq" and said.get("sym") is True,
        by_gptqmodel="gptqmodel" in str(said.get("meta")),
    )
