"""A proved lower bound on the cost of every schedule that keeps the order of first computations.

The bound is the optimum of a relaxation, solved with CP-SAT (OR-tools). Time is cut at some first
computations, the cuts: a value is retained over a cut or not, and what is not retained has to be computed
again between the cuts around its next read. Memory is checked at the cuts, and while something is computed
between two cuts: there, against what is retained over both. Values may be computed any number of times and in
any order between cuts, so the bound holds for every schedule; where memory between cuts decides, it is too
low.

This is the formulation of Checkmate (Jain et al., MLSys 2020) with fewer stages and retention as in MOCCASIN
(Bartan et al., ICML 2023). That the search found a schedule with some extra cost makes it small: an operation
that costs more than that is never repeated, and only cuts where the given order needs too much memory force
anything.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any

from ..errors import InputError
from .views import Core

_LEVELS = (1.0, 0.95, 0.85, 0.7, 0.0)  # cuts: where the given order takes more than this part of the budget


@dataclass(frozen=True)
class Certificate:
    """No schedule costs less than `bound`; `seconds` is what the proof took."""

    bound: int
    seconds: float


def certify(core: Core, loads: list[int], budget: int, best: int, seconds: float) -> Certificate:
    """A lower bound on the cost, at most `best`, the cost of a schedule that is known.

    `loads` are the bytes resident at each step of the given order. More cuts are tried while seconds are left
    and the bound is below `best`. Raises InputError where OR-tools is not installed.
    """
    start = time.perf_counter()
    base = sum(core.costs)
    bound, cuts = base, 0
    for level in _LEVELS:
        left = seconds - (time.perf_counter() - start)
        at = [t for t, load in enumerate(loads) if load > level * budget]
        if len(at) == cuts or bound >= best or left <= 0:
            continue
        cuts = len(at)
        relaxation = _Relaxation(core, at, budget, best - base)
        bound = max(bound, base + relaxation.bound(left))
    return Certificate(bound, time.perf_counter() - start)


@dataclass
class _Relaxation:
    """The model for some cuts. Literals of value i at cut k:

    `carried` retained over cuts k-1 and k without a computation between them, or over k where it is first
    computed between them; `again` computed again between them and retained over k; `briefly` computed again
    between them and not retained over k.
    """

    core: Core
    cuts: list[int]
    budget: int
    extra: int
    model: Any = None
    carried: dict[tuple[int, int], Any] = field(default_factory=dict)
    again: dict[tuple[int, int], Any] = field(default_factory=dict)
    briefly: dict[tuple[int, int], Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        core = self.core
        once = set(core.once)
        self.unit = math.gcd(*core.costs) or 1
        self.grain = math.gcd(*core.sizes, *core.scratch) or 1
        self.repeatable = [op not in once and cost < self.extra for op, cost in enumerate(core.costs)]
        self.block = [0] * len(core.sizes)  # the cut at or before which the operation first runs
        cut = 0
        for op in range(len(core.sizes)):
            self.block[op] = cut
            cut += cut < len(self.cuts) and op == self.cuts[cut]
        # What may be retained over a cut.
        self.live: list[list[int]] = [[] for _ in range(len(self.cuts) + 1)]
        self.readers: list[list[int]] = [[] for _ in core.sizes]
        for op, inputs in enumerate(core.inputs):
            for i in inputs:
                self.readers[i].append(op)

    def bound(self, seconds: float) -> int:
        """The least extra cost, or what was proved of it; `extra` if nothing below it is possible."""
        deadline = time.perf_counter() + seconds
        cp = _cp_model()
        self.model = cp.CpModel()
        self._variables()
        for cut in range(len(self.cuts) + 1):
            self._retention(cut)
            self._memory(cut)
        cost = sum(
            (self.core.costs[op] // self.unit) * literal
            for table in (self.again, self.briefly)
            for (op, _), literal in table.items()
        )
        limit = -(-self.extra // self.unit) - 1  # cheaper than what is known
        self.model.add(cost <= limit)
        self.model.minimize(cost)
        solver = cp.CpSolver()
        solver.parameters.max_time_in_seconds = max(1.0, deadline - time.perf_counter())
        solver.parameters.num_workers = 1  # only this strategy proves anything here
        solver.parameters.optimize_with_lb_tree_search = True
        solver.parameters.linearization_level = 2
        status, proved = solver.solve(self.model), float(solver.best_objective_bound)
        if status == cp.INFEASIBLE:
            return self.extra
        if status == cp.MODEL_INVALID:
            raise AssertionError("the model of the certificate is invalid")
        return max(0, math.ceil(proved - 1e-6)) * self.unit if math.isfinite(proved) else 0

    def _variables(self) -> None:
        """Literals for the cuts at which a value can be of use."""
        last = [self.block[op] for op in range(len(self.block))]
        for op in reversed(range(len(self.block))):
            for reader in self.readers[op]:
                last[op] = max(last[op], last[reader] if self.repeatable[reader] else self.block[reader])
            for cut in range(self.block[op], min(last[op] + 1, len(self.cuts))):
                self.carried[op, cut] = self.model.new_bool_var("")
                self.live[cut].append(op)
            if self.repeatable[op]:
                for cut in range(self.block[op] + 1, last[op] + 1):
                    self.briefly[op, cut] = self.model.new_bool_var("")
                    if cut < len(self.cuts):
                        self.again[op, cut] = self.model.new_bool_var("")

    def _available(self, op: int, cut: int) -> list[Any] | None:
        """Literals, one of which holds where the value can be read before the cut; None if it always can."""
        if self.block[op] == cut:
            return None
        tables = ((self.carried, cut - 1), (self.again, cut - 1), (self.again, cut), (self.briefly, cut))
        return [table[op, at] for table, at in tables if (op, at) in table]

    def _retention(self, cut: int) -> None:
        """What is read between a cut and the one before it is retained or computed again."""
        model = self.model
        for op, first in enumerate(self.block):
            if first < cut and (op, cut) in self.carried:
                before = [t[op, cut - 1] for t in (self.carried, self.again) if (op, cut - 1) in t]
                model.add_bool_or([*before, self.carried[op, cut].negated()])
            repeated = [t[op, cut] for t in (self.again, self.briefly) if (op, cut) in t]
            if (op, cut) in self.again:
                model.add_at_most_one([*repeated, self.carried[op, cut]])
            for i in self.core.inputs[op]:
                available = self._available(i, cut)
                if available is not None and first == cut:
                    model.add_bool_or(available)
                if available is not None:
                    for literal in repeated:
                        model.add_bool_or([*available, literal.negated()])

    def _memory(self, cut: int) -> None:
        """Resident bytes at the cut, and while something is computed between it and the cut before."""
        core, model, grain = self.core, self.model, self.grain
        size = [bytes_ // grain for bytes_ in core.sizes]
        through = sum(size[op] * self.carried[op, cut] for op in self.live[cut] if self.block[op] < cut)
        budget = self.budget // grain
        if cut < len(self.cuts):
            at_cut = self.cuts[cut]
            for op in (at_cut, *core.inputs[at_cut]):
                model.add_bool_or([t[op, cut] for t in (self.carried, self.again) if (op, cut) in t])
            new = sum(size[op] * self.carried[op, cut] for op in self.live[cut] if self.block[op] == cut)
            made = sum(size[op] * self.again[op, cut] for op in self.live[cut] if (op, cut) in self.again)
            retained = through + new + made
            model.add(retained + core.scratch[at_cut] // grain <= budget)
        load = model.new_int_var(0, max(budget, 0), "")
        model.add(load >= through)
        for op, first in enumerate(self.block):
            if first == cut:
                self._while_running(op, cut, load, [])
            for table in (self.again, self.briefly):
                if (op, cut) in table:
                    self._while_running(op, cut, load, [table[op, cut]])

    def _while_running(self, op: int, cut: int, load: Any, condition: list[Any]) -> None:
        """An operation runs before the cut: its output and inputs that are not in `load` come on top."""
        sizes, grain = self.core.sizes, self.grain
        needed = sizes[op] + self.core.scratch[op]
        counted = 0
        for i in self.core.inputs[op]:
            if self.block[i] < cut and (i, cut) in self.carried:
                counted = counted + (sizes[i] // grain) * self.carried[i, cut]
            needed += sizes[i]
        constraint = self.model.add(load - counted + needed // grain <= self.budget // grain)
        if condition:
            constraint.only_enforce_if(condition)


def _cp_model() -> Any:
    try:
        from ortools.sat.python import cp_model
    except ImportError as error:
        raise InputError("a certificate needs OR-tools: pip install 'kvc[certify]'") from error
    return cp_model
