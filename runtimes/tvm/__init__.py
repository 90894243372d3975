"""Models without ONNX Runtime: TVM compiles the file, and its small runtime runs the result.

Needs the versions of TVM in ``versions.py``: ``pip install 'qbb-export[tvm]'``.
"""

from __future__ import annotations

from qbb_export.runtimes.tvm.decoder import Decoder
from qbb_export.runtimes.tvm.load import Compiled, load

__all__ = ["Compiled", "Decoder", "compile", "load"]


def __getattr__(name: str) -> object:
    """``compile``, which needs all of TVM; ``load`` needs its runtime only."""
    if name == "compile":
        from qbb_export.runtimes.tvm.build import compile_model

        return compile_model
    raise AttributeError(name)
