"""Loops for the functions that TVM generates: vectors and threads of a CPU, blocks and threads of a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import IRModule, s_tir, tirx
from tvm.s_tir import dlight
from tvm.target import Target
from tvm_ffi import structural_walk

from kvc_passes.base import Result
from kvc_passes.errors import PlanningError

from ..kernels.schedule import schedule_elementwise
from ..kernels.traits import CpuTraits
from ..kernels.vector_math import replace_math


@dataclass(frozen=True)
class ScheduleKernels:
    """Loops for what TVM generated: vectorized, in prefill also parallel.

    Before: PrimFuncs made by legalization and fusion, plain loop nests.
    After: the same with vector loops and polynomial math; `tirx.is_scheduled`.
    Needs: FuseTIR.
    Refuses: nothing; what cannot be scheduled stays a plain loop nest.
    """

    target: Target
    parallel: bool

    def run(self, mod: IRModule) -> Result:
        traits = CpuTraits.of(self.target)
        functions = dict(mod.functions_items())
        count = 0
        for name, function in functions.items():
            if isinstance(function, tirx.PrimFunc) and not function.attrs.get("tirx.is_scheduled", False):
                functions[name] = schedule_elementwise(replace_math(function), traits, self.parallel)
                count += 1
        return Result(IRModule(functions), count)


@dataclass(frozen=True)
class ScheduleForCuda:
    """Threads and blocks for what TVM generated, by its own rules.

    Before: PrimFuncs made by legalization and fusion, plain loop nests.
    After: the same on blocks and threads; `tirx.is_scheduled`.
    Needs: FuseTIR.
    Refuses: a loop nest of several steps that one block of threads cannot do: what is between them would lie
        in memory that no plan counts (PlanningError).
    """

    target: Target

    def run(self, mod: IRModule) -> Result:
        rules = (
            dlight.gpu.Matmul(),
            dlight.gpu.Reduction(),
            dlight.gpu.GeneralReduction(),
            dlight.gpu.Fallback(),
        )
        count = sum(
            isinstance(f, tirx.PrimFunc) and not f.attrs.get("tirx.is_scheduled", False)
            for f in mod.functions.values()
        )
        with self.target:
            scheduled = dlight.ApplyDefaultSchedule(*rules)(mod)
        for variable, function in scheduled.functions_items():
            if isinstance(function, tirx.PrimFunc) and (lost := _global_buffers(function)):
                raise PlanningError(f"the kernel {variable.name_hint} needs memory of its own for {lost}")
        return Result(scheduled, count)


def own_buffers(function: tirx.PrimFunc) -> list[Any]:
    """Buffers that a function allocates in memory, not on chip."""
    found: list[Any] = []

    def visit(block: Any) -> None:
        found.extend(b for b in block.alloc_buffers if str(b.scope()) in ("global", ""))

    structural_walk(function.body, [(s_tir.SBlock, visit)])
    return found


def _global_buffers(function: tirx.PrimFunc) -> list[str]:
    return [str(buffer.name) for buffer in own_buffers(function)]
