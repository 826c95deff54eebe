"""Any graph of bounded shapes, compiled so that what it computes with fits a number of bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

import tvm
from tvm import IRModule, relax

from kvc_passes.base import Result
from kvc_passes.errors import BudgetError, TargetError
from kvc_passes.overwrite_inputs import OverwriteInputs
from kvc_passes.place_arena import Arena, PlaceArena, element_bytes, evaluate
from kvc_passes.remat.solve import Solution
from kvc_passes.remat.views import without_views
from kvc_passes.rematerialize import Operations, Rematerialize, tensors_of
from kvc_passes.split_chains import SplitChains, Splits

from .codegen.lower import allocated, fused, scheduled, to_vm
from .codegen.workspaces import HEADER, PAGE, whole_pages
from .machine import CpuMachine, Machine
from .options import parse_size
from .pipeline import Runner
from .targets import parse_target

_ATTEMPTS: Final = 6


@dataclass(frozen=True)
class CompiledGraph:
    """A function `main` for this CPU.

    Attributes:
        executable: TVM's; `relax.VirtualMachine(executable, tvm.cpu())["main"]` runs it.
        arena: bytes of its temporaries, allocated at once.
        workspace: bytes that kernels need for themselves, on all threads.
        outputs: bytes of what it returns.
        natural: bytes of the temporaries as the graph stands.
        solution: how the operations were put in order, None where they are as they stand.
        splits: chains of kernels that are computed slice by slice.
    """

    executable: Any
    arena: int
    workspace: int
    outputs: int
    natural: int
    solution: Solution | None
    splits: int = 0

    @property
    def peak(self) -> int:
        """Bytes that a call takes, beside its arguments and constants."""
        return whole_pages(self.arena) + self.workspace + self.outputs


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
        fixed_order: compute again, but leave operations where they are, and split no chains.
        certify: prove how much better another schedule could be (with `fixed_order`).
        seconds: that the search may take.

    Raises:
        BudgetError: no schedule fits, with chains of kernels in slices either; `needed` is the lowest that
            was reached.
        InputError, TargetError: a budget that is no size, another target than a CPU.
        PlanningError: a symbol without a bound, a call that is no kernel.
    """
    runner, bounds, machine = runner or Runner(), dict(bounds or {}), parse_target(target)
    size = None if budget is None else parse_size(budget)
    if not isinstance(machine, CpuMachine):
        raise TargetError(f"any graph is compiled for CPUs alone, not for the target {target}")
    lowering = Lowering.of_graph(machine, bounds, runner, mod)
    base = lowering.of(fused(relax.transform.CanonicalizeBindings()(mod), machine.target, runner))
    chosen, solution, splits = base, None, 0
    if size is not None and base.peak > size:
        search = Search(fixed_order, certify, seconds)
        chosen, solution, splits = within(base, size, lowering, search)
    placed = runner.apply(allocated(chosen.kernels, runner), PlaceArena(bounds, returned="apart"))
    executable = tvm.compile(
        relax.transform.AttachGlobalSymbol()(to_vm(placed.module, runner)),
        machine.target,
        relax_pipeline=tvm.transform.Sequential([]),
        tir_pipeline="default",
    )
    outputs = chosen.outputs
    return CompiledGraph(executable, placed.facts, chosen.workspace, outputs, base.arena, solution, splits)


@dataclass(frozen=True)
class LoweredGraph:
    """A module of kernel calls, the same with its kernels scheduled, and what it takes."""

    module: IRModule
    kernels: IRModule
    arena: int
    workspace: int
    outputs: int

    @property
    def peak(self) -> int:
        return whole_pages(self.arena) + self.workspace + self.outputs


@dataclass(frozen=True)
class Lowering:
    """From kernel calls in their final order to the bytes that they take."""

    machine: Machine
    bounds: Mapping[str, int]
    runner: Runner
    outputs: int

    @classmethod
    def of_graph(cls, machine: Machine, bounds: Mapping[str, int], runner: Runner, mod: IRModule) -> Lowering:
        """For a module that returns what `mod` does."""
        outputs = sum(whole_pages(_bytes(t, bounds)) for t in tensors_of(mod["main"].ret_ty))
        return cls(machine, bounds, runner, outputs)

    def of(self, mod: IRModule, overwriting: bool = False) -> LoweredGraph:
        """overwriting: with outputs over inputs where that is possible."""
        kernels = scheduled(mod, self.machine.target, self.machine.schedule("prefill"), self.runner)
        if overwriting:
            kernels = self.runner.apply(kernels, OverwriteInputs()).module
        workspace = self.machine.workspace_bytes([kernels], self.bounds)
        return LoweredGraph(mod, kernels, self.arena(kernels), workspace, self.outputs)

    def arena(self, mod: IRModule) -> int:
        return Arena.of(allocated(mod, self.runner), "apart").size(self.bounds)


@dataclass(frozen=True)
class Search:
    """How to look for a schedule; the options of `compile_graph`."""

    fixed_order: bool = False
    certify: bool = False
    seconds: float = 60.0


def within(
    base: LoweredGraph, budget: int, lowering: Lowering, search: Search
) -> tuple[LoweredGraph, Solution | None, int]:
    """The module within `budget` bytes, and the chains that had to be split for that."""
    lowest: BudgetError | None = None
    if search.fixed_order or _conceivable(base, budget, lowering):
        try:
            return *_ordered(base, budget, lowering, search), 0
        except BudgetError as error:
            if search.fixed_order:
                raise
            lowest = error
    wanted = _room(budget - base.outputs - base.workspace)
    splits = _Splits(base, lowering, search)
    waiting = []
    for limit in (wanted, wanted * 9 // 10):  # with less than is needed, since places leave gaps
        waiting.append(splits.of(max(0, limit)))
        if found := splits.standing(waiting[-1], budget):
            return found
    for split in waiting:  # with another order, which takes long to look for
        if found := splits.within(split, budget):
            return found
    # All the way: what that reaches is what a refusal names, and does not depend on the budget.
    finest = splits.of(0)
    if lowest is not None and not finest.sites:
        raise lowest
    try:
        return splits.ordered(finest, budget)
    except BudgetError as error:
        raise min((e for e in (lowest, error) if e), key=lambda e: e.needed) from None


class _Splits:
    """What a module's chains in slices come to, each asked once."""

    def __init__(self, base: LoweredGraph, lowering: Lowering, search: Search) -> None:
        self.base, self.lowering, self.search = base, lowering, search
        self.found: dict[Splits, Result] = {}
        self.parts: dict[Splits, LoweredGraph] = {}
        self.refused: dict[Splits, BudgetError] = {}

    def of(self, limit: int) -> Result:
        """The module with chains split where more than `limit` bytes are alive; facts: Splits."""
        found = self.lowering.runner.apply(self.base.module, SplitChains(limit, self.lowering.bounds))
        return self.found.setdefault(found.facts, found)

    def lowered(self, facts: Splits) -> LoweredGraph:
        if facts not in self.parts:
            found = self.found[facts]
            self.parts[facts] = self.lowering.of(found.module) if found.sites else self.base
        return self.parts[facts]

    def standing(self, split: Result, budget: int) -> tuple[LoweredGraph, Solution | None, int] | None:
        """In the order as it stands; None where that takes more."""
        room = _room(budget - self.base.outputs)
        if not split.sites or split.facts.peak > room:
            return None
        over = self.lowering.of(split.module, overwriting=True)
        return (over, None, split.sites) if over.peak <= budget else None

    def within(self, split: Result, budget: int) -> tuple[LoweredGraph, Solution | None, int] | None:
        """None where that cannot be, or was not found."""
        if not split.sites or not _conceivable(self.lowered(split.facts), budget, self.lowering):
            return None
        try:
            return self.ordered(split, budget)
        except BudgetError:
            return None

    def ordered(self, split: Result, budget: int) -> tuple[LoweredGraph, Solution | None, int]:
        """Raises BudgetError, also where it was asked for before."""
        if split.facts in self.refused:
            raise self.refused[split.facts]
        try:
            parts = self.lowered(split.facts)
            return *_ordered(parts, budget, self.lowering, self.search), split.sites
        except BudgetError as error:
            self.refused[split.facts] = error
            raise


def _conceivable(lowered: LoweredGraph, budget: int, lowering: Lowering) -> bool:
    """Whether no operation by itself takes more than the budget; its output may lie over an input."""
    # Only here: numba takes half a second to import.
    from kvc_passes.remat.lowest import least_conceivable

    core = without_views(Operations(lowered.module, lowering.bounds, {}).problem)
    return least_conceivable(core) + lowered.outputs + lowered.workspace <= budget


def _ordered(
    base: LoweredGraph, budget: int, lowering: Lowering, search: Search
) -> tuple[LoweredGraph, Solution | None]:
    """The module within `budget` bytes: where places leave gaps, less may be alive."""
    over = lowering.of(base.module, overwriting=True)
    if over.peak <= budget:
        return over, None
    fixed = over.outputs + max(base.workspace, over.workspace)
    room = target = _room(budget - fixed)
    gaps = 0
    for _ in range(_ATTEMPTS):
        step = Rematerialize(target, lowering.bounds, **asdict(search))
        try:
            done = lowering.runner.apply(base.module, step)
        except BudgetError as error:
            needed = whole_pages(min(error.needed + gaps, over.arena)) + fixed
            raise BudgetError(
                f"the operations take {needed} bytes or more, {fixed} of them results and what kernels need "
                f"for themselves, whatever is computed again; {budget} were given",
                needed=needed,
                given=budget,
            ) from None
        found = lowering.of(done.module, overwriting=True)
        if found.peak <= budget:
            return found, done.facts
        gaps = max(gaps, found.arena - target)
        target -= max(found.arena - room, found.peak - budget)
    raise BudgetError(
        f"what is alive fits {room} bytes, but its places in memory take {found.arena}",
        needed=found.peak,
        given=budget,
    )


def _bytes(tensor: Any, bounds: Mapping[str, int]) -> int:
    count = 1
    for dim in tensor.shape.values:
        count *= evaluate(dim, bounds)
    return count * element_bytes(str(tensor.dtype.dtype))


def _room(size: int) -> int:
    """The largest allocation that touches pages of at most so many bytes."""
    return size // PAGE * PAGE - HEADER
