"""TVM's own passes for GPUs: what is not ours in a model gets dlight's schedules."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import tvm
from tvm.relax.backend import gpu_generic
from tvm.s_tir import dlight


def passes(target: Any) -> list[Any]:
    """From a module of Relax operators to functions that a virtual machine runs, for a ``tvm.target.Target``."""
    parts = gpu_generic.pipeline
    schedules = dlight.ApplyDefaultSchedule(
        _Matmul(),
        dlight.gpu.GEMV(),
        dlight.gpu.Reduction(),
        dlight.gpu.GeneralReduction(),
        dlight.gpu.Fallback(),
    )
    # The last of these is the same with TVM's Matmul.
    legal = [*parts.legalize_passes(target)[:-1], schedules]
    return [
        *parts.library_dispatch_passes(target),
        *legal,
        *parts.dataflow_lower_passes(target),
        *parts.finalize_passes(target),
    ]


class _Matmul(dlight.gpu.Matmul):  # type: ignore[misc]
    def get_configs(self, target: tvm.target.Target) -> Any:
        """Without vectors: TVM's CUDA code for a vector of conditions, as a mask behind a product needs, is wrong."""
        return replace(super().get_configs(target), vector_size=1)
