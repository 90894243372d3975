"""Loops for everything that has no function of ours: elementwise chains, gathers, sums.

Outer loops are fused and run on several threads, the last one is made of vectors where its size is known.
"""

from __future__ import annotations

from typing import Any, Final

import tvm
from tvm import s_tir, tirx

from qbb_export.runtimes.tvm.cpu.ir import LANES

_WORTH_THREADS: Final = 1 << 14  # numbers written; fewer are done before the second thread is awake


def schedule_rest() -> Any:
    """The pass."""

    def run(module: Any, _: Any) -> Any:
        changed = {}
        for name, function in module.functions.items():
            if isinstance(function, tirx.PrimFunc) and "tirx.is_scheduled" not in (function.attrs or {}):
                changed[name] = _scheduled(function)
        module = tvm.IRModule(dict(module.functions.items()), attrs=module.attrs)
        for name, function in changed.items():
            module[name] = function
        return module

    return tvm.transform.module_pass(run, opt_level=0, name="qbb_schedule_rest")


def _scheduled(function: Any) -> Any:
    schedule = s_tir.Schedule(tvm.IRModule({"main": function}), error_render_level="none")
    for block in schedule.get_child_blocks(schedule.get_sblock("root")):
        try:
            _schedule_block(schedule, block)
        except s_tir.ScheduleError:
            continue  # its loops stay as they are: right, only slower
    return schedule.mod["main"].with_attr("tirx.is_scheduled", True)


def _schedule_block(schedule: Any, block: Any) -> None:
    loops = schedule.get_loops(block)
    kinds = [variable.iter_type for variable in schedule.get(block).iter_vars]
    spatial = 0
    while spatial < min(len(loops), len(kinds)) and kinds[spatial] == tirx.IterVar.DataPar:
        spatial += 1
    if spatial == 0:
        return
    extents = [schedule.get(loop).extent for loop in loops]
    known = [int(e) if isinstance(e, tirx.IntImm) else None for e in extents]
    outer = loops[:spatial]
    inner = known[spatial - 1]
    if spatial == len(loops) and inner is not None and inner >= LANES and inner % LANES == 0:
        split, vector = schedule.split(outer[-1], [None, LANES])
        schedule.vectorize(vector)
        outer = [*outer[:-1], split]
    size = 1
    for extent in known[:spatial]:
        size *= 64 if extent is None else extent  # a free size may be large
    if size >= _WORTH_THREADS:
        schedule.parallel(schedule.fuse(*outer) if len(outer) > 1 else outer[0])
