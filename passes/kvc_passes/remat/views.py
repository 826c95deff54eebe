"""Views and in-place updates taken out of a problem, and put back into its schedules.

A view costs nothing and adds no bytes, so reading it is reading its storage: the search never sees it. An
in-place update becomes an operation with an output of its own that gives back the bytes of what it overwrites
while it runs; so does one whose output takes the storage of an input that nothing reads later.
"""

from __future__ import annotations

from dataclasses import dataclass

from .problem import Problem


@dataclass(frozen=True)
class Core:
    """A problem without views, as the search needs it. The last operation returns the outputs: it reads them.

    `scratch` is below zero where an operation overwrites one of its inputs. `names` are the operations in the
    whole problem; the one that returns has none.
    """

    sizes: tuple[int, ...]
    costs: tuple[int, ...]
    inputs: tuple[tuple[int, ...], ...]
    scratch: tuple[int, ...]
    once: tuple[int, ...]
    names: tuple[int, ...]


def without_views(problem: Problem, overwriting: bool = True) -> Core:
    """The problem that the search solves.

    overwriting: outputs lie in the storage of what they may overwrite. The search takes it for granted that
    nothing reads that later, which a schedule that it finds may break: `peak` tells.
    """
    once = set(problem.once)
    names = [op for op, base in enumerate(problem.alias) if base < 0 or op in once]
    number = {op: i for i, op in enumerate(names)}
    sizes = list(problem.sizes)
    scratch = list(problem.scratch)

    def owner(op: int) -> int:
        while op not in number:
            op = problem.alias[op]
        return op

    for op in names:
        if (base := problem.alias[op]) >= 0:
            sizes[op] = sizes[owner(base)]
            scratch[op] -= sizes[op]
        elif overwriting and problem.overwrites[op] >= 0:
            scratch[op] -= sizes[op]
    inputs = [tuple(sorted({number[owner(i)] for i in problem.inputs[op]})) for op in names]
    inputs.append(tuple(sorted({number[owner(op)] for op in problem.kept})))
    return Core(
        sizes=(*(sizes[op] for op in names), 0),
        costs=(*(problem.costs[op] for op in names), 0),
        inputs=tuple(inputs),
        scratch=(*(scratch[op] for op in names), 0),
        once=(*(number[op] for op in problem.once), len(names)),
        names=tuple(names),
    )


def with_views(problem: Problem, core: Core, order: list[int]) -> tuple[int, ...]:
    """A schedule of the whole problem from one of its core: views come where they are read."""
    made = [-1] * len(problem.sizes)  # the step that computed the value last
    views = set(range(len(problem.sizes))) - set(core.names)
    idle = _idle_views(problem, views)
    result: list[int] = []

    def emit(op: int) -> None:
        made[op] = len(result)
        result.append(op)
        for view in idle.pop(op, ()):
            emit(view)

    def refresh(op: int) -> None:
        """Make the view again if its base is newer."""
        if op in views:
            refresh(problem.alias[op])
            if made[op] < made[problem.alias[op]]:
                emit(op)

    for number in order[:-1]:
        for op in problem.inputs[core.names[number]]:
            refresh(op)
        emit(core.names[number])
    for op in (*problem.kept, *sorted(views)):
        if op in problem.kept or made[op] < 0:
            refresh(op)
    return tuple(result)


def _idle_views(problem: Problem, views: set[int]) -> dict[int, list[int]]:
    """Views that nothing reads but such views, by what they are a view of."""
    read = set(problem.kept)
    idle: dict[int, list[int]] = {}
    for op in reversed(range(len(problem.sizes))):
        if op in views and op not in read:
            idle.setdefault(problem.alias[op], []).append(op)
        else:
            read.update(problem.inputs[op])
    return idle
