"""The local search: two annealing runs side by side, of which the cheaper schedule is taken."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import numpy as np

from .anneal import anneal, tidy
from .change import load
from .moves import empty_journal
from .state import COST, EXPENSE, OVER, SIZE, Graph, empty_state, graph_of
from .views import Core

CHAINS: Final = 2  # as many cores are always there; the schedule depends on it, so it is no option
_HOT, _COLD = 2.0, 1e-3  # the first and the last temperature, in costs of an average operation
_CHUNK: Final = 20_000  # moves between two looks at the clock
_NONE: Final = int(np.iinfo(np.int64).max)  # costs more than any schedule


def usual_moves(core: Core) -> int:
    """Moves per chain that a problem of this size takes; a move takes time linear in the size."""
    count = len(core.sizes)
    return max(20_000, min(10_000 * count, 3_000_000_000 // count))


def search(
    core: Core,
    budget: int,
    start: Sequence[int],
    *,
    moves: int,
    fixed_order: bool = False,
    seed: int = 0,
    deadline: float = float("inf"),
    enough: int | None = None,
) -> list[int] | None:
    """The cheapest sequence within the budget that the search finds from `start`; None if it finds none.

    `moves` per chain; the result depends on nothing but the arguments unless the deadline (by
    `time.perf_counter`) makes the chains cool faster. A chain stops at a cost of `enough`, by default that of
    computing everything once.
    """
    graph = graph_of(core)
    enough = sum(core.costs) if enough is None else enough
    seeds = np.random.SeedSequence(seed).generate_state(CHAINS, np.uint64)
    first = np.array(start, np.int64)

    def chain(number: int) -> list[int]:
        return _anneal(graph, budget, first, moves, fixed_order, seeds[number], deadline, enough)

    # Compiles what the threads run: they would do so at the same time, and numba can then wait for itself.
    _anneal(graph, budget, first, 0, fixed_order, seeds[0], deadline, enough)
    with ThreadPoolExecutor(CHAINS) as pool:
        found = [order for order in pool.map(chain, range(CHAINS)) if order]
    return min(found, key=lambda order: sum(core.costs[op] for op in order), default=None)


def _anneal(
    graph: Graph,
    budget: int,
    start: np.ndarray,
    moves: int,
    fixed: bool,
    seed: np.uint64,
    deadline: float,
    enough: int,
) -> list[int]:
    """One annealing run; the best sequence within the budget, or []."""
    state = empty_state(graph, 4 * graph.ops.shape[1] + len(start) + 64)
    load(graph, state, start, budget)
    expense = max(1.0, float(graph.ops[EXPENSE].mean()))
    per_byte = expense / max(1.0, float(graph.ops[SIZE].mean()))
    weight = np.array([2 * per_byte, 1e-4 * per_byte, 1e5 * per_byte])
    random = np.array([seed | np.uint64(1)])
    best = np.zeros(state.table.shape[1], np.int64)
    found: list[int] = []
    best_cost = _NONE
    if state.totals[OVER] == 0:
        found, best_cost = start.tolist(), int(state.totals[COST])
    done, begin = 0, time.perf_counter()
    while True:
        until = min(done + _CHUNK, moves) if best_cost > enough else done
        heat = np.array([_HOT * expense, _COLD * expense, max(1, moves)])
        length, best_cost = anneal(
            *(graph, state, empty_journal(), random, weight, heat),
            *(done, until, fixed, best, best_cost, enough),
        )
        if length:
            found = best[:length].tolist()
        done, now = until, time.perf_counter()
        if now - begin > 0.5 * (deadline - begin):  # not earlier: cold moves are faster
            moves = min(moves, done + int(done * max(0.0, deadline - now) / (now - begin)))
        if done >= moves or best_cost <= enough:
            break
    load(graph, state, np.array(found or start.tolist(), np.int64), budget)
    length = tidy(graph, state, best)
    return best[:length].tolist() if found else []
