"""Simulated annealing over sequences of computations; compiled by numba."""

from __future__ import annotations

import math

import numpy as np

from .change import insert, remove
from .compiled import compiled
from .moves import Journal, draw, drop, recompute, shift, undo
from .state import AT, BEFORE, COST, LENGTH, OP, OVER, SLOT, TWIN, TWINS, Graph, State


@compiled
def _propose(g: Graph, s: State, j: Journal, random: np.ndarray, fixed: bool, most: float) -> bool:
    """One move. Exchanges (drop here, repeat there) matter where the budget is tight."""
    kind = draw(random, 20)
    if kind < 7:
        return recompute(g, s, j, random, most)
    if kind < 11:
        return drop(g, s, j, random, fixed)
    if kind < 13:
        changed = drop(g, s, j, random, fixed)
        return recompute(g, s, j, random, most) or changed
    if kind < 14:
        changed = drop(g, s, j, random, fixed)
        return drop(g, s, j, random, fixed) or changed
    return shift(g, s, j, random, fixed, fixed or kind < 17)


@compiled
def tidy(g: Graph, s: State, best: np.ndarray) -> int:
    """Take away repetitions that the budget does not need; those that cost nothing stay unnoticed otherwise.

    For a sequence within the budget, which it writes into `best`; returns its length.
    """
    for i in range(s.totals[TWINS] - 1, -1, -1):
        if i >= s.totals[TWINS]:
            continue
        x = s.table[TWIN, i]
        op, slot = s.table[OP, x], s.table[SLOT, x]
        if s.table[BEFORE, x] < 0:
            continue
        remove(g, s, x)
        if s.totals[OVER] > 0:
            insert(g, s, op, slot)
    return save(s, best)


@compiled
def save(s: State, best: np.ndarray) -> int:
    """Write the operations into `best`; their number."""
    for t in range(s.totals[LENGTH]):
        best[t] = s.table[OP, s.table[AT, t]]
    return int(s.totals[LENGTH])


@compiled
def anneal(
    g: Graph,
    s: State,
    j: Journal,
    random: np.ndarray,
    weight: np.ndarray,
    heat: np.ndarray,
    done: int,
    until: int,
    fixed: bool,
    best: np.ndarray,
    best_cost: int,
    enough: int,
) -> tuple[int, int]:
    """Proposals done..until of a run that cools from `heat[0]` to `heat[1]` (in cost) over `heat[2]` of them.

    What is minimized is the cost plus `weight[0]` per byte and step over the budget; the weight falls while
    the sequence fits and rises while it does not, so the search stays near the border. Returns (length, cost)
    of the cheapest sequence within the budget below `best_cost`, which is written into `best`; length 0 if
    none was found. Stops at the cost `enough`.
    """
    length = 0
    least, most = weight[1], weight[2]
    cooling = math.log(heat[1] / heat[0]) / heat[2]
    temperature = heat[0]
    for i in range(done, until):
        if i & 63 == 0 or i == done:
            temperature = heat[0] * math.exp(cooling * i)
        old_over = s.totals[OVER]
        # The usual chance exp(-worse / temperature), drawn beforehand: what costs more is not even tried.
        chance = (draw(random, 1 << 30) + 1) / (1 << 30)
        most = s.totals[COST] + weight[0] * old_over - temperature * math.log(chance)
        j.size[0] = 0
        if not _propose(g, s, j, random, fixed, most):
            continue
        fits = s.totals[OVER] == 0
        if fits and s.totals[COST] < best_cost:
            best_cost = s.totals[COST]
            length = save(s, best)
            if best_cost <= enough:
                break
        if s.totals[COST] + weight[0] * s.totals[OVER] > most:
            undo(g, s, j)
        if fits:
            weight[0] = max(weight[0] * 0.9999, least)
        elif old_over > 0:
            weight[0] = min(weight[0] * 1.0002, most)
    return length, best_cost
