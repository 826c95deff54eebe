"""Solutions against the exact optimum of small problems, refusals, and what a plan depends on."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_problems import least_cost, least_peak, problems, random_problem

from kvc_passes.errors import BudgetError, InputError
from kvc_passes.remat import Problem, Schedule, given_order, peak, solve
from kvc_passes.remat.checker import check
from kvc_passes.remat.instances import layered_graph
from kvc_passes.remat.lowest import least_conceivable, lowest_peak
from kvc_passes.remat.views import without_views

MOVES = 4_000


@pytest.mark.parametrize("fixed", [True, False])
@pytest.mark.parametrize("seed", range(25))
def test_small_problems_are_solved_exactly(seed: int, fixed: bool) -> None:
    problem = random_problem(np.random.default_rng(seed), 6)
    budget = least_peak(problem, fixed)
    for more in range(3):
        solution = solve(problem, budget + more, fixed_order=fixed, moves=MOVES)
        assert check(problem, solution.schedule.order, budget + more, fixed) == (solution.peak, solution.cost)
        assert solution.cost == least_cost(problem, budget + more, fixed)


@settings(max_examples=40, deadline=None)
@given(problems(), st.booleans(), st.floats(0, 1))
def test_solutions_are_valid_and_refusals_are_right(problem: Problem, fixed: bool, part: float) -> None:
    floor = least_conceivable(without_views(problem))
    budget = round(floor + part * (peak(problem, given_order(problem)) - floor))
    exact = least_cost(problem, budget, fixed)
    if exact is None:
        with pytest.raises(BudgetError) as raised:
            solve(problem, budget, fixed_order=fixed, moves=MOVES)
        assert raised.value.needed > raised.value.given == budget
        return
    solution = solve(problem, budget, fixed_order=fixed, moves=MOVES)
    assert check(problem, solution.schedule.order, budget, fixed) == (solution.peak, solution.cost)
    assert exact <= solution.cost


@pytest.mark.parametrize("fixed", [True, False])
def test_a_refusal_says_the_lowest_peak_and_that_peak_works(fixed: bool) -> None:
    for seed in range(8):
        problem = random_problem(np.random.default_rng(seed), 7)
        lowest = least_peak(problem, fixed)
        if lowest == 0:
            continue
        with pytest.raises(BudgetError, match=f"the lowest peak reached is {lowest} bytes") as raised:
            solve(problem, lowest - 1, fixed_order=fixed, moves=MOVES)
        assert (raised.value.needed, raised.value.given) == (lowest, lowest - 1)
        assert solve(problem, lowest, fixed_order=fixed, moves=MOVES).peak == lowest


def test_the_lowest_peak_of_a_larger_graph_works_too() -> None:
    """Even with moves too few to find it again, because the search then starts from there."""
    problem = layered_graph(60, 0.3)
    with pytest.raises(BudgetError) as raised:
        solve(problem, 1, moves=50)
    solution = solve(problem, raised.value.needed, moves=50)
    assert solution.peak <= raised.value.needed
    assert raised.value.needed == peak(problem, lowest_peak(problem))
    assert raised.value.needed < peak(problem, given_order(problem))


def test_what_cannot_be_done_in_time_is_done_worse() -> None:
    problem = layered_graph(200, 0.36)
    budget = int(0.9 * peak(problem, given_order(problem)))
    solution = solve(problem, budget, fixed_order=True, moves=10**9, seconds=1)
    assert check(problem, solution.schedule.order, budget, True) == (solution.peak, solution.cost)
    assert problem.cost < solution.cost < 1.2 * problem.cost


def test_nothing_is_repeated_where_everything_fits() -> None:
    problem = layered_graph(40, 0.3)
    solution = solve(problem, peak(problem, given_order(problem)))
    assert solution.schedule == given_order(problem)
    assert (solution.cost, solution.bound, solution.overhead, solution.gap) == (
        problem.cost,
        problem.cost,
        0,
        0,
    )


def test_what_runs_once_is_not_repeated() -> None:
    """Repeating 0, large and cheap, would do; when it runs once, 1 is repeated instead."""
    fields = {
        "sizes": (8, 6, 1, 9, 1, 1),
        "costs": (1, 5, 1, 1, 1, 1),
        "inputs": ((), (), (0, 1), (2,), (3,), (0, 1, 4)),
    }
    assert solve(Problem(**fields), 18, fixed_order=True).schedule.order.count(0) == 2
    once = solve(Problem(**fields, once=(0,)), 18, fixed_order=True)
    assert once.schedule.order.count(0) == 1
    assert once.schedule.order.count(1) == 2


def test_an_update_takes_no_second_storage() -> None:
    """1 is overwritten by 2; with 0 computed late, its 8 bytes and one for what 3 makes of it do."""
    problem = Problem(
        (6, 8, 0, 1, 1), (1, 1, 1, 1, 1), ((), (), (1,), (2,), (0, 3)), once=(2,), alias=(-1, -1, 1, -1, -1)
    )
    solution = solve(problem, 9, moves=MOVES)
    assert (solution.peak, solution.cost) == (9, 5)
    assert check(problem, solution.schedule.order, 9) == (9, 5)


def test_a_view_of_what_is_computed_again_is_made_again() -> None:
    """0 and its view 1 have to go while 3 runs, and to come back for 5."""
    inputs = ((), (0,), (1,), (2,), (3,), (1, 4))
    problem = Problem((8, 0, 1, 9, 1, 1), (3, 0, 1, 1, 1, 1), inputs, alias=(-1, 0, -1, -1, -1, -1))
    solution = solve(problem, 12, fixed_order=True, moves=MOVES)
    assert solution.schedule.order == (0, 1, 2, 3, 4, 0, 1, 5)
    assert check(problem, solution.schedule.order, 12, fixed_order=True) == (10, 10)


def test_a_certificate_needs_or_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ortools.sat.python", None)
    problem = Problem((8, 1, 9, 1, 1), (3, 1, 1, 1, 1), ((), (0,), (1,), (2,), (0, 3)))
    assert solve(problem, 12, fixed_order=True).cost == 10
    with pytest.raises(InputError, match=r"pip install 'kvc\[certify\]'"):
        solve(problem, 12, fixed_order=True, certify=True)


def test_the_same_seed_gives_the_same_plan() -> None:
    problem = layered_graph(80, 0.3)
    budget = int(0.85 * peak(problem, given_order(problem)))
    first, again, other = (solve(problem, budget, fixed_order=True, moves=3_000, seed=s) for s in (1, 1, 2))
    assert first.schedule == again.schedule
    assert first.schedule != other.schedule


def test_a_free_order_is_never_dearer_here() -> None:
    problem = layered_graph(100, 0.27)
    budget = int(0.8 * peak(problem, given_order(problem)))
    fixed, free = (solve(problem, budget, fixed_order=f, moves=30_000) for f in (True, False))
    assert fixed.cost > problem.cost
    assert free.cost < fixed.cost
    for solution, order in ((fixed, True), (free, False)):
        assert check(problem, solution.schedule.order, budget, order) == (solution.peak, solution.cost)


def test_what_costs_nothing_is_not_repeated_for_nothing() -> None:
    """Every repetition is there because the budget needs it, even where all are free."""
    problem = layered_graph(60, 0.3, seed=1)
    problem = Problem(problem.sizes, (0,) * 60, problem.inputs)
    budget = int(0.8 * peak(problem, given_order(problem)))
    order = solve(problem, budget, fixed_order=True, moves=20_000).schedule.order
    repeated = [step for step, op in enumerate(order) if op in order[:step]]
    assert repeated
    for step in repeated:
        assert peak(problem, Schedule(order[:step] + order[step + 1 :])) > budget
