"""Bounds are never above the exact optimum, and reach it where they should."""

from __future__ import annotations

import numpy as np
import pytest
from small_problems import least_cost, least_peak, random_problem

from kvc_passes.remat import Problem, given_order, peak, solve
from kvc_passes.remat.certificate import certify
from kvc_passes.remat.instances import layered_graph
from kvc_passes.remat.solve import core_loads
from kvc_passes.remat.views import without_views

pytest.importorskip("ortools")


@pytest.mark.parametrize("seed", range(150))
def test_bounds_are_never_above_the_optimum(seed: int) -> None:
    """Even where the schedule that is known costs more, which is all that caps a bound."""
    problem = random_problem(np.random.default_rng(100 + seed), 7, plain=seed % 2 == 0)
    budget = least_peak(problem, fixed_order=True) + seed % 3
    exact = least_cost(problem, budget, fixed_order=True)
    assert exact is not None
    core = without_views(problem)
    loads = core_loads(core)
    for worse in (0, 1, 4, 30):
        bound = certify(core, loads, budget, exact + worse, 20.0).bound
        assert problem.cost <= bound <= exact


def test_most_small_optima_are_proved() -> None:
    proved = extra = 0
    for seed in range(40):
        problem = random_problem(np.random.default_rng(seed), 6, plain=True)
        budget = least_peak(problem, fixed_order=True)
        solution = solve(problem, budget, fixed_order=True, certify=True, moves=4_000)
        extra += solution.cost > solution.base
        proved += solution.cost > solution.base and solution.gap == 0
    assert extra > 5
    assert proved > extra / 2


def test_a_layered_graph_is_proved_optimal() -> None:
    problem = layered_graph(60, 0.3, seed=1)
    budget = int(0.8 * peak(problem, given_order(problem)))
    solution = solve(problem, budget, fixed_order=True, certify=True, moves=30_000)
    assert solution.cost > solution.base
    assert solution.bound == solution.cost
    assert solution.gap == 0


def test_a_chain_by_hand() -> None:
    """0 has to go while 2 runs, and comes back for 3: its cost is the bound."""
    problem = Problem((8, 1, 9, 1), (3, 1, 1, 1), ((), (0,), (1,), (0, 2)))
    solution = solve(problem, 18, fixed_order=True, certify=True)
    assert (solution.cost, solution.bound) == (6, 6)
    problem = Problem((8, 1, 9, 1, 1), (3, 1, 1, 1, 1), ((), (0,), (1,), (2,), (0, 3)))
    solution = solve(problem, 12, fixed_order=True, certify=True)
    assert solution.schedule.order == (0, 1, 2, 3, 0, 4)
    assert (solution.cost, solution.bound) == (10, 10)
