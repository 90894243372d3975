"""The passes from an imported module to functions that a virtual machine runs."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax
from tvm.relax.backend.cpu_generic import pipeline as generic

from qbb_export.runtimes.tvm import cpu, gpu_pipeline
from qbb_export.runtimes.tvm.gpu import is_gpu
from qbb_export.runtimes.tvm.lower import LowerBinaryBasis, is_hexagon


def pipelines(target: Any) -> dict[str, Any]:
    """What ``tvm.compile`` is to do for a ``tvm.target.Target``: our passes, and TVM's own around them."""
    kernels = gpu_pipeline.KERNELS if target.kind.name == "cuda" else "default"
    return {"relax_pipeline": _relax_pipeline(target), "tir_pipeline": kernels}


def _relax_pipeline(target: Any) -> Any:

    def run(module: Any, _: Any) -> Any:
        with target:
            common = [LowerBinaryBasis(target), relax.transform.EliminateCommonSubexpr()]
            return tvm.transform.Sequential([*common, *_rest(target)])(module)

    return tvm.transform.module_pass(run, opt_level=0, name="qbb_pipeline")


def _rest(target: Any) -> list[Any]:
    if is_gpu(target):
        return gpu_pipeline.passes(target)
    if is_hexagon(target):
        return [relax.get_default_pipeline(target)]
    return _cpu(target)


def _cpu(target: Any) -> list[Any]:
    """TVM's pipeline for CPUs, with our functions in its lowering and our loops after its fusion."""
    return [
        *generic.library_dispatch_passes(target),
        relax.transform.LegalizeOps(cpu.legalizations(cpu.isa_of(target))),
        relax.transform.DeadCodeElimination(),
        relax.transform.LegalizeOps(),  # transposes that are still wanted
        relax.transform.AnnotateTIROpPattern(),
        relax.transform.FoldConstant(),
        relax.transform.FuseOps(),
        relax.transform.FuseTIR(),
        cpu.schedule_rest(),
        *generic.dataflow_lower_passes(target),
        *generic.finalize_passes(target),
    ]
