"""The lowest peak that can be reached: what a refusal has to say."""

from __future__ import annotations

import time
from typing import Final

import numpy as np

from .memory import given_order, peak
from .problem import Problem, Schedule
from .search import search, usual_moves
from .views import Core, with_views, without_views

_CLOSE: Final = 1000  # peaks that differ by less than one part in this many are taken as equal
_SHARE: Final = 20  # each budget is tried with this part of the usual moves
_LEAST: Final = 100_000  # and with so many at least: small problems take no time, and budgets are tight
_ANY: Final = int(np.iinfo(np.int64).max) - 1  # every cost that a schedule can have


def least_conceivable(core: Core) -> int:
    """Bytes that no schedule can do without: those of the operation that needs most, with its inputs."""
    return max(
        core.sizes[op] + core.scratch[op] + sum(core.sizes[i] for i in inputs)
        for op, inputs in enumerate(core.inputs)
    )


def lowest_peak(
    problem: Problem, *, fixed_order: bool = False, seed: int = 0, deadline: float = float("inf")
) -> Schedule:
    """The schedule of the lowest peak that the search reaches, whatever it costs; `peak` tells its bytes.

    Bisects between the given order and what no schedule can do without. What lies lower is not proved
    impossible, unless it is below `least_conceivable`.
    """
    core = without_views(problem)
    order = list(range(len(core.sizes)))
    best = given_order(problem)
    high, low = peak(problem, best), least_conceivable(core)
    while high - low > high // _CLOSE and time.perf_counter() < deadline:
        budget = (low + high) // 2
        found = search(
            *(core, budget, order),
            moves=max(_LEAST, usual_moves(core) // _SHARE),
            fixed_order=fixed_order,
            seed=seed,
            deadline=deadline,
            enough=_ANY,
        )
        schedule = None if found is None else Schedule(with_views(problem, core, found))
        if found is None or schedule is None or peak(problem, schedule) > budget:
            low = budget + 1
            continue
        order, best = found, schedule
        high = peak(problem, best)
    return best
