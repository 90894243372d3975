"""The passes from an imported module to functions that a virtual machine runs."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax

from qbb_export.runtimes.tvm import gpu_pipeline
from qbb_export.runtimes.tvm.gpu import is_gpu
from qbb_export.runtimes.tvm.lower import LowerBinaryBasis


def pipeline(target: Any) -> Any:
    """Our passes, then TVM's own for the target."""

    def run(module: Any, _: Any) -> Any:
        with target:
            ours = [LowerBinaryBasis(target), relax.transform.EliminateCommonSubexpr()]
            rest = gpu_pipeline.passes(target) if is_gpu(target) else [relax.get_default_pipeline(target)]
            return tvm.transform.Sequential([*ours, *rest])(module)

    return tvm.transform.module_pass(run, opt_level=0, name="qbb_pipeline")
