"""Any graph of bounded shapes, compiled so that what it computes with fits a number of bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import tvm
from tvm import IRModule, relax

from kvc_passes.errors import BudgetError, TargetError
from kvc_passes.place_arena import Arena, PlaceArena, element_bytes, evaluate
from kvc_passes.remat.solve import Solution
from kvc_passes.rematerialize import Rematerialize

from .codegen.lower import allocated, fused, to_vm
from .machine import CpuMachine
from .options import parse_size
from .pipeline import Runner
from .targets import parse_target

_ATTEMPTS: Final = 6
_PAGE: Final = 4096
"""TVM's allocator rounds up to whole pages."""


@dataclass(frozen=True)
class CompiledGraph:
    """A function `main` for this CPU.

    Attributes:
        executable: TVM's; `relax.VirtualMachine(executable, tvm.cpu())["main"]` runs it.
        arena: bytes of its temporaries, allocated at once.
        outputs: bytes of what it returns.
        natural: bytes of the temporaries as the graph stands.
        solution: how the operations were put in order, None where they are as they stand.
    """

    executable: Any
    arena: int
    outputs: int
    natural: int
    solution: Solution | None

    @property
    def peak(self) -> int:
        """Bytes that a call takes, beside its arguments and constants."""
        return _whole(self.arena) + self.outputs


def compile_graph(
    mod: IRModule,
    *,
    target: str = "cpu",
    budget: str | int | None = None,
    bounds: Mapping[str, int] | None = None,
    fixed_order: bool = False,
    certify: bool = False,
    seconds: float = 60.0,
    runner: Runner | None = None,
) -> CompiledGraph:
    """Compile `main`, whatever it computes: a decoder, an image network, a step of training.

    Args:
        mod: a module whose `main` is one dataflow block, such as `import_graph` or Relax's gradients give.
        target: "cpu", or "cpu:<LLVM name of a CPU>".
        budget: most bytes of temporaries and results, "40MB" or a number; None takes what the graph takes as
            it stands.
        bounds: for every symbol in a shape its largest value.
        fixed_order: compute again, but leave operations where they are.
        certify: prove how much better another schedule could be (with `fixed_order`).
        seconds: that the search may take.

    Raises:
        BudgetError: no schedule fits; `needed` is the lowest that was reached.
        InputError, TargetError: a budget that is no size, another target than a CPU.
        PlanningError: a symbol without a bound, a call that is no kernel.
    """
    runner, bounds, machine = runner or Runner(), dict(bounds or {}), parse_target(target)
    size = None if budget is None else parse_size(budget)
    if not isinstance(machine, CpuMachine):
        raise TargetError(f"any graph is compiled for CPUs alone, not for the target {target}")
    outputs = sum(_whole(_bytes(t, bounds)) for t in _tensors(mod["main"].ret_ty))
    base = fused(relax.transform.CanonicalizeBindings()(mod), machine.target, runner)
    natural = _arena(base, bounds, runner)
    chosen, solution = base, None
    if size is not None and _whole(natural) + outputs > size:
        room = (size - outputs) // _PAGE * _PAGE
        chosen, solution = _within(base, room, outputs, bounds, runner, fixed_order, certify, seconds)
    with machine.target:
        scheduled = runner.apply(chosen, machine.schedule("prefill")).module
    placed = runner.apply(allocated(scheduled, runner), PlaceArena(bounds, leave=True))
    executable = tvm.compile(
        relax.transform.AttachGlobalSymbol()(to_vm(placed.module, runner)),
        machine.target,
        relax_pipeline=tvm.transform.Sequential([]),
        tir_pipeline="default",
    )
    return CompiledGraph(executable, placed.facts, outputs, natural, solution)


def _within(
    mod: IRModule,
    budget: int,
    outputs: int,
    bounds: Mapping[str, int],
    runner: Runner,
    fixed_order: bool,
    certify: bool,
    seconds: float,
) -> tuple[IRModule, Solution]:
    """The module with an arena of at most `budget` bytes: where places leave gaps, less may be alive."""
    target, arena = budget, 0
    for _ in range(_ATTEMPTS):
        step = Rematerialize(target, bounds, fixed_order=fixed_order, certify=certify, seconds=seconds)
        try:
            done = runner.apply(mod, step)
        except BudgetError as error:
            needed = _whole(error.needed + max(arena - target, 0)) + outputs
            raise BudgetError(
                f"the operations take {needed} bytes or more, {outputs} of them results, whatever is "
                f"computed again; {budget + outputs} were given",
                needed=needed,
                given=budget + outputs,
            ) from None
        arena = _arena(done.module, bounds, runner)
        if arena <= budget:
            return done.module, done.facts
        target -= arena - budget
    raise BudgetError(
        f"what is alive fits {budget} bytes, but its places in memory take {arena}",
        needed=_whole(arena) + outputs,
        given=budget + outputs,
    )


def _arena(mod: IRModule, bounds: Mapping[str, int], runner: Runner) -> int:
    return Arena.of(allocated(mod, runner), leave=True).size(bounds)


def _tensors(ty: Any) -> list[Any]:
    return [ty] if isinstance(ty, relax.TensorType) else [t for f in ty.fields for t in _tensors(f)]


def _bytes(tensor: Any, bounds: Mapping[str, int]) -> int:
    count = 1
    for dim in tensor.shape.values:
        count *= evaluate(dim, bounds)
    return count * element_bytes(str(tensor.dtype.dtype))


def _whole(size: int) -> int:
    return -(-size // _PAGE) * _PAGE
