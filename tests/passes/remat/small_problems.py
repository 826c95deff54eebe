"""Small random problems, random schedules of them, and their exact solution by exhaustive search."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator

import numpy as np
from hypothesis import strategies as st

from kvc_passes.remat import Problem

Groups = frozenset[frozenset[int]]  # live values, those that share storage together


def random_problem(random: np.random.Generator, count: int, plain: bool = False) -> Problem:
    """Up to three inputs each; unless `plain`: scratch, outputs, views, operations that run once, updates."""
    inputs = [tuple(sorted(random.permutation(op)[: random.integers(4)].tolist())) for op in range(count)]
    sizes, costs = random.integers(0, 7, count), random.integers(0, 6, count)
    if plain:
        return Problem(tuple(sizes.tolist()), tuple(costs.tolist()), tuple(inputs))
    alias = [-1] * count
    for op in range(1, count):
        if inputs[op] and random.random() < 0.25:
            alias[op] = int(random.choice(inputs[op]))
            inputs[op] = (alias[op],)
            sizes[op] = costs[op] = 0
    once = [op for op in range(count) if alias[op] < 0 and random.random() < 0.15]
    kept = [op for op in range(count) if random.random() < 0.2]
    scratch = np.where(random.random(count) < 0.3, random.integers(0, 4, count), 0)
    scratch[np.array(alias) >= 0] = 0
    fields = tuple(tuple(int(x) for x in column) for column in (sizes, costs))
    problem = Problem(*fields, tuple(inputs), tuple(scratch.tolist()), tuple(kept), tuple(once), tuple(alias))
    return _with_update(problem, random)


def _with_update(problem: Problem, random: np.random.Generator) -> Problem:
    """One more operation that overwrites the last one's storage, if nothing else needs that."""
    last = len(problem.sizes) - 1
    if last < 0 or last in problem.kept or problem.alias[last] >= 0 or random.random() < 0.5:
        return problem
    return Problem(
        (*problem.sizes, 0),
        (*problem.costs, 1),
        (*problem.inputs, (last,)),
        (*problem.scratch, 1),
        (*problem.kept, last + 1),
        (*problem.once, last + 1),
        (*problem.alias, last),
    )


@st.composite
def problems(draw: st.DrawFn, most: int = 7, plain: bool = False) -> Problem:
    seed = draw(st.integers(0, 2**32 - 1))
    return random_problem(np.random.default_rng(seed), draw(st.integers(1, most)), plain)


@st.composite
def schedules(draw: st.DrawFn, problem: Problem) -> tuple[int, ...]:
    """Any schedule that computes everything: now and then something that can be computed again is."""
    order: list[int] = []
    missing = list(range(len(problem.sizes)))
    updates = [op for op in problem.once if problem.alias[op] >= 0]
    while missing:
        if updates and updates[0] in order:  # nothing may read what was overwritten, so nothing is repeated
            repeatable = []
        else:
            repeatable = [op for op in dict.fromkeys(order) if op not in problem.once]
        able = [
            op
            for op in missing
            if all(i in order for i in problem.inputs[op])
            and (op not in problem.once or op == next(o for o in problem.once if o in missing))
        ]
        op = draw(st.sampled_from(able + repeatable))
        order.append(op)
        if op in missing:
            missing.remove(op)
    return tuple(order)


def least_cost(problem: Problem, budget: int, fixed_order: bool = False) -> int | None:
    """The exact optimum, None where nothing fits: Dijkstra over what is live and what was computed."""
    start: tuple[Groups, frozenset[int]] = (frozenset(), frozenset())
    done = frozenset(range(len(problem.sizes)))
    best = {start: 0}
    ties = itertools.count()
    heap = [(0, next(ties), start)]
    while heap:
        cost, _, state = heapq.heappop(heap)
        if cost > best[state]:
            continue
        groups, computed = state
        if computed == done and set(problem.kept) <= set().union(*groups):
            return cost
        for extra, following in _steps(problem, budget, fixed_order, groups, computed):
            if cost + extra < best.get(following, 1 << 60):
                best[following] = cost + extra
                heapq.heappush(heap, (cost + extra, next(ties), following))
    return None


def _steps(
    problem: Problem, budget: int, fixed_order: bool, groups: Groups, computed: frozenset[int]
) -> Iterator[tuple[int, tuple[Groups, frozenset[int]]]]:
    """Forget a live value, or compute one that is not live: the extra cost and the next state."""
    live = set().union(*groups)
    for group in groups:
        for value in group:
            rest = group - {value}
            yield 0, (groups - {group} | ({rest} if rest else set()), computed)
    views = {op for op, base in enumerate(problem.alias) if base >= 0 and op not in problem.once}
    missing = set(range(len(problem.sizes))) - computed
    for op, inputs in enumerate(problem.inputs):
        if op in live or not set(inputs) <= live:
            continue
        if op in problem.once and (op in computed or any(o < op for o in problem.once if o in missing)):
            continue
        if fixed_order and op in missing - views and op != min(missing - views):
            continue
        base = problem.alias[op]
        if base < 0:
            after = groups | {frozenset({op})}
        else:
            group = next(g for g in groups if base in g)
            after = groups - {group} | {frozenset({op}) if op in problem.once else group | {op}}
        held = groups | after if base < 0 else groups
        if sum(_bytes(problem, group) for group in held) + problem.scratch[op] <= budget:
            yield problem.costs[op], (after, computed | {op})


def _bytes(problem: Problem, group: frozenset[int]) -> int:
    """The bytes of the storage that the values share."""
    op = min(group)
    while problem.alias[op] >= 0:
        op = problem.alias[op]
    return problem.sizes[op]


def least_peak(problem: Problem, fixed_order: bool = False) -> int:
    """The smallest budget for which there is a schedule, found one byte after the other."""
    return next(b for b in itertools.count() if least_cost(problem, b, fixed_order) is not None)
