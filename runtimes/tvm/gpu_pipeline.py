"""TVM's own passes for GPUs: what is not ours in a model gets dlight's schedules."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

import tvm
from tvm.relax.backend import gpu_generic
from tvm.s_tir import dlight
from tvm.s_tir.pipeline import default_s_tir_pipeline
from tvm.tirx.compilation_pipeline import register_tir_pipeline

KERNELS: Final = "qbb_kernels"  # name of the pipeline from functions to kernels
_LAUNCH: Final = "tirx.kernel_launch_params"
_EARLY: Final = "tirx.use_programtic_dependent_launch"  # TVM's spelling


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


def _kernels() -> Any:
    """TVM's pipeline; kernels that wait for the one before them are then launched without waiting for it.

    TVM's runtime knows such launches, its compiler has no way to ask for them.
    """
    passes, of_host, of_device = default_s_tir_pipeline()

    def run(module: Any, _: Any) -> Any:
        module = passes(module)
        for name, function in module.functions.items():
            launch = function.attrs.get(_LAUNCH)
            if launch is not None and "griddepcontrol" in function.script():
                # Without "noalias" loads of X see what the kernel before wrote while this one was there already.
                changes = {_LAUNCH: [*launch, _EARLY], "tirx.noalias": False}
                module.update_func(name, function.with_attrs(changes))
        return module

    return tvm.transform.module_pass(run, opt_level=0, name=KERNELS), of_host, of_device


register_tir_pipeline(KERNELS, _kernels)
