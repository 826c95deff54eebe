"""From a served function to one whose temporaries are explicit: legalize, fuse, schedule, find lifetimes."""

from __future__ import annotations

from collections.abc import Sequence

from tvm import IRModule, relax, tirx, transform
from tvm.ir import GlobalVar
from tvm.relax import PyExprMutator, expr_functor
from tvm.target import Target

from kvc_passes.base import Pass
from kvc_passes.overwrite_inputs import OverwriteInputs
from kvc_passes.place_arena import PlaceArena, Returned
from kvc_passes.prove_overwrites import ProveOverwrites
from kvc_passes.prove_rows import ProveRows
from kvc_passes.row_slices import Segment

from ..pipeline import FunctionName, Phase, Runner
from .legalize import legalize_ops


def lower(
    mod: IRModule, phase: Phase, target: Target, fuse: Sequence[Pass], schedule: Pass, runner: Runner
) -> IRModule:
    """Down to kernel calls on tensors that `builtin.alloc_tensor` makes; no code is generated yet.

    fuse: the target's own passes before TVM's fusion; schedule: the one that schedules what TVM generated.
    """
    label = f"{phase}-"
    for step in fuse:
        mod = runner.apply(mod, step, label).module
    mod = fused(mod, target, runner, label)
    if phase == "prefill":
        mod = runner.apply(mod, ProveRows(), label).module
    mod = scheduled(mod, target, schedule, runner, label)
    return allocated(runner.apply(mod, OverwriteInputs(), label).module, runner, label)


def scheduled(mod: IRModule, target: Target, schedule: Pass, runner: Runner, label: str = "") -> IRModule:
    """Kernels in their final loops, marked where they may write over what they read."""
    mod = runner.apply(mod, ProveOverwrites(), label).module
    with target:
        return runner.apply(mod, schedule, label).module


def fused(mod: IRModule, target: Target, runner: Runner, label: str = "") -> IRModule:
    """Operators as calls of kernels, neighbours in one."""
    with target:
        return runner.apply_tvm(
            mod,
            f"{label}fuse",
            transform.module_pass(lambda mod, context: legalize_ops(mod), opt_level=0),
            relax.transform.AnnotateTIROpPattern(),
            relax.transform.FoldConstant(),
            relax.transform.FuseOps(),
            relax.transform.FuseTIR(),
            relax.transform.DeadCodeElimination(),
            relax.transform.RewriteDataflowReshape(),
        )


def allocated(mod: IRModule, runner: Runner, label: str = "") -> IRModule:
    """Temporaries as tensors that `builtin.alloc_tensor` makes."""
    return runner.apply_tvm(
        mod,
        f"{label}allocate",
        relax.transform.ToNonDataflow(),
        relax.transform.RemovePurityChecking(),
        relax.transform.CallTIRRewrite(),
    )


def finish(
    mod: IRModule,
    phase: FunctionName,
    bounds: dict[str, int],
    arena: int,
    runner: Runner,
    segments: tuple[Segment, ...] = (),
    rows: int = 0,
) -> IRModule:
    """Place all temporaries in one arena of `arena` bytes and lower to the virtual machine's builtins.

    segments: what runs for `rows` tokens after another; 0 for all at once.
    """
    returned: Returned = "within" if phase == "encoder" else "none"
    place = PlaceArena(bounds, arena, returned, segments=segments, rows=rows)
    return to_vm(runner.apply(mod, place, f"{phase}-").module, runner, f"{phase}-")


def to_vm(mod: IRModule, runner: Runner, label: str = "") -> IRModule:
    """Lower to the virtual machine's builtins."""
    return runner.apply_tvm(
        mod,
        f"{label}to-vm",
        relax.transform.LowerAllocTensor(),
        relax.transform.KillAfterLastUse(),
        relax.transform.LowerRuntimeBuiltin(),
        relax.transform.ComputePrimValue(),
        relax.transform.VMShapeLower(),
    )


def join(functions: dict[FunctionName, IRModule]) -> IRModule:
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
