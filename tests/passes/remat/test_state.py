"""The compiled state after many moves is what a fresh evaluation of its sequence says."""

from __future__ import annotations

import numpy as np
import pytest
from small_problems import random_problem

from kvc_passes.remat import Problem, Schedule, given_order, peak, resident
from kvc_passes.remat.anneal import anneal
from kvc_passes.remat.change import load
from kvc_passes.remat.instances import layered_graph
from kvc_passes.remat.moves import draw, drop, empty_journal, recompute, shift, undo
from kvc_passes.remat.state import (
    AT,
    BUDGET,
    COST,
    LENGTH,
    OP,
    OVER,
    PROFILE,
    TWIN,
    TWINS,
    State,
    empty_state,
    graph_of,
)
from kvc_passes.remat.views import Core, without_views


def loads(core: Core, order: list[int]) -> list[int]:
    plain = Problem(core.sizes, core.costs, core.inputs)
    return [
        b + core.scratch[op] for b, op in zip(resident(plain, Schedule(tuple(order))), order, strict=True)
    ]


def sequence(state: State) -> list[int]:
    return [int(state.table[OP, x]) for x in state.table[AT, : state.totals[LENGTH]]]


def assert_true(core: Core, state: State) -> None:
    order = sequence(state)
    expected = loads(core, order)
    assert state.table[PROFILE, : len(order)].tolist() == expected
    assert state.totals[COST] == sum(core.costs[op] for op in order)
    assert state.totals[OVER] == sum(max(0, b - int(state.totals[BUDGET])) for b in expected)
    repeated = [x for x in range(len(order)) if order.count(order[x]) > 1]
    assert sorted(state.table[TWIN, : state.totals[TWINS]]) == sorted(state.table[AT, repeated])
    assert order[-1] == len(core.sizes) - 1


@pytest.mark.parametrize("fixed", [True, False])
@pytest.mark.parametrize("which", ["layered", *range(10)])
def test_the_profile_stays_true(which: str | int, fixed: bool) -> None:
    problem = (
        layered_graph(60, 0.3)
        if which == "layered"
        else random_problem(np.random.default_rng(int(which)), 12)
    )
    core = without_views(problem)
    graph = graph_of(core)
    state, journal = empty_state(graph, 4 * len(core.sizes) + 64), empty_journal()
    load(
        graph,
        state,
        np.arange(len(core.sizes), dtype=np.int64),
        int(0.8 * peak(problem, given_order(problem))),
    )
    assert_true(core, state)
    random = np.array([7], np.uint64)
    weight, heat = np.array([0.5, 1e-6, 1e6]), np.array([50.0, 5.0, 3000.0])
    best = np.zeros(state.table.shape[1], np.int64)
    for done in range(0, 3000, 500):
        anneal(graph, state, journal, random, weight, heat, done, done + 500, fixed, best, 0, 0)
        assert_true(core, state)
    firsts = list(dict.fromkeys(sequence(state)))
    assert not fixed or firsts == sorted(firsts)


def test_every_move_can_be_taken_back() -> None:
    core = without_views(layered_graph(60, 0.3))
    graph = graph_of(core)
    state, journal = empty_state(graph, 300), empty_journal()
    load(graph, state, np.arange(len(core.sizes), dtype=np.int64), 12_000)
    random = np.array([3], np.uint64)
    done = [0, 0, 0, 0]
    for i in range(4000):
        before, totals = sequence(state), state.totals.copy()
        journal.size[0] = 0
        kind = i % 4
        if kind == 0:
            moved = recompute(graph, state, journal, random, 1e18)
        elif kind == 1:
            moved = drop(graph, state, journal, random, False)
        else:
            moved = shift(graph, state, journal, random, False, kind == 2)
        done[kind] += moved and sequence(state) != before
        if draw(random, 2) == 0 or state.totals[LENGTH] > 90:
            undo(graph, state, journal)
            assert sequence(state) == before
            assert (state.totals == totals).all()
    assert_true(core, state)
    assert min(done) > 100
