"""The state of the local search: a sequence of computations and its memory profile, in tables of numbers.

A computation has a number (`x` here) that it keeps while it moves. The tables are few, with named rows:
compiled functions pass every array as seven arguments; with an array for each row, moves take twice as long.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .compiled import compiled
from .views import Core

# Rows of Graph.ops: bytes, cost, bytes while it runs, 1 where it runs once, neighbors in `once` (-1: none).
SIZE, EXPENSE, SCRATCH, ONCE, PREVIOUS_ONCE, NEXT_ONCE = range(6)
# Where its inputs and its readers lie in Graph.edges.
INPUTS_FROM, INPUTS_TO, READERS_FROM, READERS_TO = range(6, 10)
# Rows of State.table by slot: computation and resident bytes.
AT, PROFILE = range(2)
# By computation: operation, slot, computations of that operation before and after (-1: none), place in TWIN.
OP, SLOT, BEFORE, AFTER, TWIN_AT = range(2, 7)
# Stacks: numbers that are unused, computations of operations that stand more than once.
UNUSED, TWIN = range(7, 9)
# Rows of State.ops: first and last computation, how many there are.
FIRST, LAST, COUNT = range(3)
# Entries of State.totals: computations, heights of the stacks, bytes over the budget (a sum over slots),
# cost, budget.
LENGTH, SPARE, TWINS, OVER, COST, BUDGET = range(6)


class Graph(NamedTuple):
    """The problem."""

    ops: np.ndarray
    edges: np.ndarray


class State(NamedTuple):
    """A sequence."""

    table: np.ndarray
    ops: np.ndarray
    totals: np.ndarray


def graph_of(core: Core) -> Graph:
    """The tables of a problem."""
    count = len(core.sizes)
    readers: list[list[int]] = [[] for _ in range(count)]
    for op, inputs in enumerate(core.inputs):
        for i in inputs:
            readers[i].append(op)
    ops = np.zeros((10, count), np.int64)
    ops[SIZE], ops[EXPENSE], ops[SCRATCH] = core.sizes, core.costs, core.scratch
    ops[ONCE, list(core.once)] = 1
    ops[[PREVIOUS_ONCE, NEXT_ONCE]] = -1
    ops[PREVIOUS_ONCE, list(core.once[1:])] = core.once[:-1]
    ops[NEXT_ONCE, list(core.once[:-1])] = core.once[1:]
    edges: list[int] = []
    for rows, start, stop in ((core.inputs, INPUTS_FROM, INPUTS_TO), (readers, READERS_FROM, READERS_TO)):
        lists: Sequence[Sequence[int]] = rows
        for op, row in enumerate(lists):
            ops[start, op], ops[stop, op] = len(edges), len(edges) + len(row)
            edges.extend(row)
    return Graph(ops, np.array(edges, np.int64))


def empty_state(graph: Graph, capacity: int) -> State:
    """Tables for up to `capacity` computations; `load` in change.py fills them."""
    operations = graph.ops.shape[1]
    return State(
        np.zeros((9, capacity), np.int64), np.zeros((3, operations), np.int64), np.zeros(6, np.int64)
    )


@compiled
def last_read(g: Graph, s: State, op: int, low: int, high: int) -> int:
    """The last slot strictly between low and high that reads op; -1 for none."""
    best = -1
    for k in range(g.ops[READERS_FROM, op], g.ops[READERS_TO, op]):
        x = s.ops[LAST, g.edges[k]]
        while x >= 0 and s.table[SLOT, x] >= high:
            x = s.table[BEFORE, x]
        if x >= 0 and s.table[SLOT, x] > low and s.table[SLOT, x] > best:
            best = s.table[SLOT, x]
    return int(best)


@compiled
def first_read(g: Graph, s: State, op: int, low: int, high: int) -> int:
    """The first slot strictly between low and high that reads op; high for none."""
    best = high
    for k in range(g.ops[READERS_FROM, op], g.ops[READERS_TO, op]):
        x = s.ops[FIRST, g.edges[k]]
        while x >= 0 and s.table[SLOT, x] <= low:
            x = s.table[AFTER, x]
        if x >= 0 and s.table[SLOT, x] < best:
            best = s.table[SLOT, x]
    return int(best)


@compiled
def serving(s: State, op: int, slot: int) -> int:
    """The computation that a read of op at the slot gets; -1 for none."""
    x = s.ops[LAST, op]
    while x >= 0 and s.table[SLOT, x] >= slot:
        x = s.table[BEFORE, x]
    return int(x)


@compiled
def next_slot(s: State, x: int) -> int:
    """Where x is computed again; the length if nowhere."""
    return int(s.table[SLOT, s.table[AFTER, x]] if s.table[AFTER, x] >= 0 else s.totals[LENGTH])


@compiled
def end_of(g: Graph, s: State, x: int) -> int:
    """The last slot at which the output of x is needed: its own if nothing reads it."""
    return int(max(s.table[SLOT, x], last_read(g, s, s.table[OP, x], s.table[SLOT, x], next_slot(s, x))))
