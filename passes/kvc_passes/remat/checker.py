"""A check of schedules that shares nothing with the solvers: a slow simulation of an allocator."""

from __future__ import annotations

from dataclasses import dataclass, field

from .problem import Problem


@dataclass
class _Buffer:
    """Storage of one computed output; `values` (operation, step) lie in it."""

    size: int
    values: set[tuple[int, int]] = field(default_factory=set)


class InvalidSchedule(Exception):
    """A schedule breaks a rule of the problem; the message says which and where."""


def check(
    problem: Problem, order: tuple[int, ...], budget: int, fixed_order: bool = False
) -> tuple[int, int]:
    """Run the schedule against an allocator of `budget` bytes; returns its (peak bytes, cost).

    A buffer is freed at the first step at which none of the values in it is ever read again before its
    recomputation. With `fixed_order` the first computations have to come in the problem's order, views apart.
    Raises InvalidSchedule.
    """
    _check_counts(problem, order, fixed_order)
    current: dict[int, tuple[int, int]] = {}  # operation -> its newest value: (operation, step)
    buffers: dict[tuple[int, int], _Buffer] = {}  # value -> the storage that it lies in
    peak = cost = 0
    for step, op in enumerate(order):
        for source in problem.inputs[op]:
            if source not in current:
                raise InvalidSchedule(f"step {step}: {op} reads {source} before it is computed")
            if current[source] not in buffers:
                raise InvalidSchedule(
                    f"step {step}: {op} reads {source}, whose storage was overwritten or freed"
                )
        value = (op, step)
        base = problem.alias[op]
        buffer = buffers[current[base]] if base >= 0 else _Buffer(problem.sizes[op])
        current[op] = value
        alive = {id(b): b for b in buffers.values()} | {id(buffer): buffer}
        shared = _overwritten(problem, order, step, current, buffers)
        peak = max(peak, sum(b.size for b in alive.values()) + problem.scratch[op] - shared)
        cost += problem.costs[op]
        if base >= 0 and op in problem.once:
            for overwritten in buffer.values:
                buffers.pop(overwritten, None)
            buffer.values.clear()
        buffer.values.add(value)
        buffers[value] = buffer
        _free_dead(problem, order, step, buffers)
    for op in problem.kept:
        if current[op] not in buffers:
            raise InvalidSchedule(f"output {op} is gone at the end")
    if peak > budget:
        raise InvalidSchedule(f"the peak is {peak} bytes, more than {budget}")
    return peak, cost


def _check_counts(problem: Problem, order: tuple[int, ...], fixed_order: bool) -> None:
    if set(order) != set(range(len(problem.sizes))):
        raise InvalidSchedule("not every operation is computed")
    computing = [op for op in order if problem.alias[op] < 0 or op in problem.once]
    firsts = list(dict.fromkeys(computing))
    if fixed_order and firsts != sorted(firsts):
        raise InvalidSchedule("the first computations are not in the given order")
    if [op for op in order if op in problem.once] != list(problem.once):
        raise InvalidSchedule("operations that run once are repeated or out of order")


def _overwritten(
    problem: Problem,
    order: tuple[int, ...],
    step: int,
    current: dict[int, tuple[int, int]],
    buffers: dict[tuple[int, int], _Buffer],
) -> int:
    """Bytes of an input that the step's output lies in: nothing reads it later."""
    old = problem.overwrites[order[step]]
    if old < 0 or current[old] not in buffers:
        return 0
    buffer = buffers[current[old]]
    return 0 if any(_needed(problem, order, step, v) for v in buffer.values) else buffer.size


def _free_dead(
    problem: Problem, order: tuple[int, ...], step: int, buffers: dict[tuple[int, int], _Buffer]
) -> None:
    """Forget values that nothing reads any more, unless one that is still read lies in the same storage."""
    for value in list(buffers):
        buffer = buffers[value]
        if not any(_needed(problem, order, step, v) for v in buffer.values):
            del buffers[value]


def _needed(problem: Problem, order: tuple[int, ...], step: int, value: tuple[int, int]) -> bool:
    """Whether a later step reads the value before its operation runs again."""
    op, computed = value
    if op in order[computed + 1 : step + 1]:
        return False
    for later in order[step + 1 :]:
        if op in problem.inputs[later]:
            return True
        if op == later:
            return False
    return op in problem.kept
