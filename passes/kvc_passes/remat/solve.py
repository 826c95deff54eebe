"""Order and rematerialization for a budget: the one entry to the solvers."""

from __future__ import annotations

import time
from dataclasses import dataclass

from ..errors import BudgetError, PlanningError
from .certificate import certify as prove
from .memory import given_order, peak, resident
from .problem import Problem, Schedule
from .views import Core, with_views, without_views


@dataclass(frozen=True)
class Solution:
    """A schedule within the budget.

    Attributes:
        schedule: the operations in the order in which they run, with those that are repeated.
        peak: bytes resident at most.
        cost: of the schedule, in the problem's unit.
        base: of computing everything once.
        bound: what was proved that every schedule (with a fixed order: every one of that order) costs at
        least. seconds: what the search took. proof_seconds: what the certificate took.
    """

    schedule: Schedule
    peak: int
    cost: int
    base: int
    bound: int
    seconds: float
    proof_seconds: float = 0.0

    @property
    def overhead(self) -> float:
        """Extra cost as a part of the cost of computing everything once."""
        return (self.cost - self.base) / self.base if self.base else 0.0

    @property
    def gap(self) -> float:
        """The part of the base cost that may still be saved: 0 is proved optimal."""
        return (self.cost - self.bound) / self.base if self.base else 0.0


def solve(
    problem: Problem,
    budget: int,
    *,
    seconds: float = 60.0,
    moves: int | None = None,
    fixed_order: bool = False,
    certify: bool = False,
    proof_seconds: float = 60.0,
    seed: int = 0,
) -> Solution:
    """A schedule whose peak is at most `budget` bytes, with as little extra cost as the search finds.

    With `fixed_order` the first computations stay in the problem's order (views apart: they cost nothing).
    `moves` per chain are by default chosen by size; while `seconds` do not cut them short, the same problem,
    budget and seed give the same schedule. `certify` proves a bound with OR-tools, for fixed orders and where
    the given order fits; with a free order the bound is the cost of computing everything once.

    Raises BudgetError with the lowest peak that was reached in `needed` where the budget cannot be met,
    InputError where a certificate is asked for and OR-tools is not installed.
    """
    start = time.perf_counter()
    core = without_views(problem)
    order = _within(problem, core, budget, fixed_order, seed, seconds, moves)
    schedule = Schedule(with_views(problem, core, order))
    found = time.perf_counter() - start
    bytes_, cost, base = peak(problem, schedule), schedule.cost(problem), problem.cost
    if bytes_ > budget:
        raise PlanningError(f"a schedule for {budget} bytes takes {bytes_} (a bug in the search)")
    if not (certify and fixed_order and cost > base):
        return Solution(schedule, bytes_, cost, base, base, found)
    proof = prove(core, core_loads(core), budget, cost, proof_seconds)
    return Solution(schedule, bytes_, cost, base, proof.bound, found, proof.seconds)


def _within(
    problem: Problem, core: Core, budget: int, fixed_order: bool, seed: int, seconds: float, moves: int | None
) -> list[int]:
    """A sequence of the core within the budget. Raises BudgetError."""
    order = list(range(len(core.sizes)))
    if peak(problem, given_order(problem)) <= budget:
        return order
    # Only here: numba takes half a second to import.
    from .lowest import least_conceivable, lowest_peak
    from .search import search, usual_moves

    moves = moves or usual_moves(core)
    deadline = time.perf_counter() + seconds

    def improve(start: list[int]) -> list[int] | None:
        for each in (core, without_views(problem, overwriting=False)):
            found = search(
                each, budget, start, moves=moves, fixed_order=fixed_order, seed=seed, deadline=deadline
            )
            if found is None or peak(problem, Schedule(with_views(problem, core, found))) <= budget:
                return found
        return None

    floor = least_conceivable(core)
    if budget >= floor and (found := improve(order)):
        return found
    lowest = lowest_peak(problem, fixed_order=fixed_order, seed=seed)
    needed = peak(problem, lowest)
    if needed > budget:
        where = "the given order" if fixed_order else "any order"
        raise BudgetError(
            f"{budget} bytes are too few for the operations in {where}, whatever is computed again: "
            f"the lowest peak reached is {needed} bytes (less than {floor} is impossible)",
            needed=needed,
            given=budget,
        )
    deadline += seconds
    number = {op: i for i, op in enumerate(core.names)}
    start = [*(number[op] for op in lowest.order if op in number), len(core.names)]
    return improve(start) or start


def core_loads(core: Core) -> list[int]:
    """Bytes resident at each step of the core's given order."""
    plain = Problem(core.sizes, core.costs, core.inputs)
    return [bytes_ + scratch for bytes_, scratch in zip(resident(plain, given_order(plain)), core.scratch)]
