"""How many bytes are resident at every step of a schedule."""

from __future__ import annotations

from itertools import accumulate

from .problem import Problem, Schedule


def resident(problem: Problem, schedule: Schedule) -> list[int]:
    """Bytes resident while each step runs, in one pass over the schedule.

    Raises ValueError if a step reads what was not computed before it.
    """
    order = schedule.order
    latest = [-1] * len(problem.sizes)  # the step that computed the value last
    storage = list(range(len(order)))  # the step whose output the value of a step lies in
    end = list(range(len(order)))  # the last step that needs the storage
    taken: list[tuple[int, int]] = []  # steps, and the storage that they may overwrite
    for step, op in enumerate(order):
        for value in problem.inputs[op]:
            if latest[value] < 0:
                raise ValueError(f"step {step}: operation {op} reads {value}, which was not computed")
            end[storage[latest[value]]] = step
        if problem.alias[op] >= 0:
            storage[step] = storage[latest[problem.alias[op]]]
        if (old := problem.overwrites[op]) >= 0:
            taken.append((step, latest[old]))
        latest[op] = step
    for value in problem.kept:
        end[storage[latest[value]]] = len(order)
    change = [0] * (len(order) + 2)
    for step, op in enumerate(order):
        change[step] += problem.sizes[op]
        change[end[step] + 1] -= problem.sizes[op]
    found = [live + problem.scratch[op] for live, op in zip(accumulate(change), order, strict=False)]
    for step, old in taken:
        if end[old] == step:  # one storage for both
            found[step] -= problem.sizes[order[step]]
    return found


def peak(problem: Problem, schedule: Schedule) -> int:
    """The most bytes resident at any step."""
    return max(resident(problem, schedule), default=0)


def given_order(problem: Problem) -> Schedule:
    """Everything once, in the problem's order."""
    return Schedule(tuple(range(len(problem.sizes))))
