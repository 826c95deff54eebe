"""The local search: annealing runs from several seeds at once, which go on from the best schedule of all."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from .anneal import anneal
from .change import load
from .moves import Journal, empty_journal
from .state import COST, EXPENSE, OVER, SIZE, Graph, State, empty_state, graph_of
from .views import Core

CHAINS: Final = 2  # as many cores are always there; the schedule depends on it, so it is no option
_ROUNDS: Final = (0.15, 0.3, 0.55)  # parts of the moves; after each the chains go on from the best schedule
_HOT, _COLD = (
    1e-2,
    1e-6,
)  # temperatures, in parts of the cost of everything; at first one operation's at least
_CHUNK: Final = 20_000  # moves between two looks at the clock


def usual_moves(core: Core) -> int:
    """Moves per chain that a problem of this size takes; a move takes time linear in the size."""
    count = len(core.sizes)
    return max(20_000, min(5_000 * count, 5_000_000_000 // count))


@dataclass
class _Chain:
    """One annealing run after another, with a random generator of its own."""

    graph: Graph
    budget: int
    fixed: bool
    random: np.ndarray
    state: State
    journal: Journal = field(default_factory=empty_journal)

    def run(self, start: np.ndarray, moves: int, best_cost: int, enough: int, deadline: float) -> list[int]:
        """Anneal from a sequence; the best one within the budget that costs less than `best_cost`, or []."""
        graph, state = self.graph, self.state
        load(graph, state, start, self.budget)
        cost = max(1.0, float(graph.ops[EXPENSE].sum()))
        per_byte = cost / max(1.0, float(graph.ops[SIZE].sum()))
        weight = np.array([2 * per_byte, 1e-4 * per_byte, 1e5 * per_byte])
        heat = np.array([max(_HOT, 1 / graph.ops.shape[1]) * cost, _COLD * cost, moves])
        best = np.zeros(state.table.shape[1], np.int64)
        found: list[int] = []
        if state.totals[OVER] == 0 and state.totals[COST] < best_cost:
            found, best_cost = start.tolist(), int(state.totals[COST])
        for done in range(0, moves, _CHUNK):
            if best_cost <= enough or time.perf_counter() > deadline:
                break
            until = min(done + _CHUNK, moves)
            length, best_cost = anneal(
                *(graph, state, self.journal, self.random, weight, heat),
                *(done, until, self.fixed, best, best_cost, enough),
            )
            if length:
                found = best[:length].tolist()
        return found


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

    `moves` per chain; the result depends on nothing but the arguments unless the deadline
    (`time.perf_counter`) cuts it short. It stops at a cost of `enough` (by default that of computing
    everything once).
    """
    graph = graph_of(core)
    enough = sum(core.costs) if enough is None else enough
    capacity = 4 * len(core.sizes) + len(start) + 64
    seeds = np.random.SeedSequence(seed).generate_state(CHAINS, np.uint64)
    chains = [
        _Chain(graph, budget, fixed_order, np.array([s | np.uint64(1)]), empty_state(graph, capacity))
        for s in seeds
    ]
    best: list[int] = []
    best_cost = np.iinfo(np.int64).max
    with ThreadPoolExecutor(CHAINS) as pool:
        for part in _ROUNDS:
            first = np.array(best or start, np.int64)
            share = max(1, round(part * moves))
            runs = [pool.submit(c.run, first, share, best_cost, enough, deadline) for c in chains]
            for found in (run.result() for run in runs):
                cost = sum(core.costs[op] for op in found)
                if found and cost < best_cost:
                    best, best_cost = found, cost
            if best and best_cost <= enough or time.perf_counter() > deadline:
                break
    return best or None
