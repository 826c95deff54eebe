"""From a served function to one whose temporaries are explicit: legalize, fuse, schedule, find lifetimes."""

from __future__ import annotations

from dataclasses import dataclass

from tvm import IRModule, relax, tirx, transform
from tvm.ir import GlobalVar
from tvm.relax import PyExprMutator, expr_functor
from tvm.target import Target

from kvc_passes.base import Result
from kvc_passes.place_arena import PlaceArena

from ..kernels.schedule import schedule_elementwise
from ..kernels.traits import CpuTraits
from ..kernels.vector_math import replace_math
from ..pipeline import Phase, Runner
from .legalize import legalize_ops


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


def lower(mod: IRModule, phase: Phase, target: Target, runner: Runner) -> IRModule:
    """Down to kernel calls on tensors that `builtin.alloc_tensor` makes; no code is generated yet."""
    label = f"{phase}-"
    with target:
        mod = runner.apply_tvm(
            mod,
            f"{label}fuse",
            transform.module_pass(lambda mod, context: legalize_ops(mod), opt_level=0),
            relax.transform.AnnotateTIROpPattern(),
            relax.transform.FoldConstant(),
            relax.transform.FuseOps(),
            relax.transform.FuseTIR(),
            relax.transform.DeadCodeElimination(),
        )
        mod = runner.apply(mod, ScheduleKernels(target, phase == "prefill"), label).module
        return runner.apply_tvm(
            mod,
            f"{label}allocate",
            relax.transform.RewriteDataflowReshape(),
            relax.transform.ToNonDataflow(),
            relax.transform.RemovePurityChecking(),
            relax.transform.CallTIRRewrite(),
        )


def finish(mod: IRModule, phase: Phase, bounds: dict[str, int], arena: int, runner: Runner) -> IRModule:
    """Place all temporaries in one arena of `arena` bytes and lower to the virtual machine's builtins."""
    mod = runner.apply(mod, PlaceArena(bounds, arena), f"{phase}-").module
    return runner.apply_tvm(
        mod,
        f"{phase}-to-vm",
        relax.transform.LowerAllocTensor(),
        relax.transform.KillAfterLastUse(),
        relax.transform.LowerRuntimeBuiltin(),
        relax.transform.ComputePrimValue(),
        relax.transform.VMShapeLower(),
    )


def join(functions: dict[Phase, IRModule]) -> IRModule:
    """One module with one function a phase; kernels that several phases share are kept once."""
    builder = relax.BlockBuilder()
    for phase, mod in functions.items():
        kernels = {
            v: builder.add_func(f, v.name_hint)
            for v, f in mod.functions_items()
            if isinstance(f, tirx.PrimFunc)
        }
        builder.add_func(_Renamed(kernels).visit_expr(mod["main"]).with_attr("global_symbol", phase), phase)
    return relax.transform.AttachGlobalSymbol()(builder.get())


@expr_functor.mutator
class _Renamed(PyExprMutator):  # type: ignore[misc]
    """Calls of kernels under the names they have in the joined module."""

    def __init__(self, kernels: dict[GlobalVar, GlobalVar]) -> None:
        super().__init__()
        self.kernels = kernels

    def visit_global_var_(self, op: GlobalVar) -> GlobalVar:
        return self.kernels[op]
