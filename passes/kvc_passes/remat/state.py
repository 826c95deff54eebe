"""The state of the local search: a sequence of computations with its memory profile, changed one step at a time.

Compiled by numba: plain loops over arrays. A computation has a number (`x` here) that it keeps while it
moves; the first one of operation `op` has the number `op`. Opening a slot, attaching and detaching a
computation take time linear in the length of the sequence with a small factor (the profile is contiguous),
not in the number of edges.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from .views import Core

LENGTH, SPARE, TWINS, OVER, COST, BUDGET = range(6)  # entries of State.totals


class Graph(NamedTuple):
    """The problem in arrays. Inputs of op are `inputs[input_at[op] : input_at[op + 1]]`; readers likewise."""

    sizes: np.ndarray
    costs: np.ndarray
    scratch: np.ndarray
    input_at: np.ndarray
    inputs: np.ndarray
    reader_at: np.ndarray
    readers: np.ndarray
    once: np.ndarray  # 1 where it runs once
    previous_once: np.ndarray  # the operation of `once` that comes before this one of `once`, -1 for none
    next_once: np.ndarray


class State(NamedTuple):
    """A sequence.

    `at` slot -> computation, `op`, `slot`, `before`, `after` of a computation (before, after: of the same
    operation, -1 for none), `first`, `last`, `count` of an operation, `profile` resident bytes at a slot,
    `spare` unused numbers, `twins` computations of operations that stand more than once, `twin_at` their
    place in it or -1.
    """

    at: np.ndarray
    op: np.ndarray
    slot: np.ndarray
    before: np.ndarray
    after: np.ndarray
    first: np.ndarray
    last: np.ndarray
    count: np.ndarray
    profile: np.ndarray
    spare: np.ndarray
    twins: np.ndarray
    twin_at: np.ndarray
    totals: np.ndarray


def graph_of(core: Core) -> Graph:
    """The arrays of a problem."""
    count = len(core.sizes)
    readers: list[list[int]] = [[] for _ in range(count)]
    for op, inputs in enumerate(core.inputs):
        for i in inputs:
            readers[i].append(op)
    once = np.zeros(count, np.int64)
    once[list(core.once)] = 1
    previous, following = np.full(count, -1, np.int64), np.full(count, -1, np.int64)
    for a, b in zip(core.once, core.once[1:]):
        following[a], previous[b] = b, a
    return Graph(
        np.array(core.sizes, np.int64),
        np.array(core.costs, np.int64),
        np.array(core.scratch, np.int64),
        *_rows(core.inputs),
        *_rows(readers),
        once,
        previous,
        following,
    )


def _rows(rows: object) -> tuple[np.ndarray, np.ndarray]:
    lengths = [len(row) for row in rows]  # type: ignore[attr-defined]
    flat = [i for row in rows for i in row]  # type: ignore[attr-defined]
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64), np.array(flat, np.int64)


def empty_state(graph: Graph, capacity: int) -> State:
    """Arrays for up to `capacity` computations; `load` fills them."""
    ops = len(graph.sizes)
    small = [np.zeros(capacity, np.int64) for _ in range(5)]
    return State(
        *small,
        np.zeros(ops, np.int64),
        np.zeros(ops, np.int64),
        np.zeros(ops, np.int64),
        np.zeros(capacity, np.int64),
        np.zeros(capacity, np.int64),
        np.zeros(capacity, np.int64),
        np.zeros(capacity, np.int64),
        np.zeros(6, np.int64),
    )


@njit(nogil=True, cache=True)
def last_read(g: Graph, s: State, op: int, low: int, high: int) -> int:
    """The last slot strictly between low and high that reads op; -1 for none."""
    best = -1
    for k in range(g.reader_at[op], g.reader_at[op + 1]):
        x = s.last[g.readers[k]]
        while x >= 0 and s.slot[x] >= high:
            x = s.before[x]
        if x >= 0 and s.slot[x] > low and s.slot[x] > best:
            best = s.slot[x]
    return best


@njit(nogil=True, cache=True)
def first_read(g: Graph, s: State, op: int, low: int, high: int) -> int:
    """The first slot strictly between low and high that reads op; high for none."""
    best = high
    for k in range(g.reader_at[op], g.reader_at[op + 1]):
        x = s.first[g.readers[k]]
        while x >= 0 and s.slot[x] <= low:
            x = s.after[x]
        if x >= 0 and s.slot[x] < best:
            best = s.slot[x]
    return best


@njit(nogil=True, cache=True)
def serving(s: State, op: int, slot: int) -> int:
    """The computation that a read of op at the slot gets; -1 for none."""
    x = s.last[op]
    while x >= 0 and s.slot[x] >= slot:
        x = s.before[x]
    return x


@njit(nogil=True, cache=True)
def next_slot(s: State, x: int) -> int:
    """Where x is computed again; the length if nowhere."""
    return s.slot[s.after[x]] if s.after[x] >= 0 else s.totals[LENGTH]


@njit(nogil=True, cache=True)
def end_of(g: Graph, s: State, x: int) -> int:
    """The last slot at which the output of x is needed: its own if nothing reads it."""
    return max(s.slot[x], last_read(g, s, s.op[x], s.slot[x], next_slot(s, x)))


@njit(nogil=True, cache=True)
def _add(s: State, low: int, high: int, size: int) -> None:
    """Add bytes to slots low..high."""
    budget = s.totals[BUDGET]
    over = 0
    for t in range(low, high + 1):
        old = s.profile[t]
        s.profile[t] = old + size
        over += max(old + size - budget, 0) - max(old - budget, 0)
    s.totals[OVER] += over


@njit(nogil=True, cache=True)
def _open(g: Graph, s: State, x: int, slot: int) -> None:
    """Make room for x before what stands at the slot; x is in the sequence but not attached."""
    through = s.at[slot]
    across = s.profile[slot] - g.sizes[s.op[through]] - g.scratch[s.op[through]]
    for t in range(s.totals[LENGTH], slot, -1):
        y = s.at[t - 1]
        s.at[t] = y
        s.slot[y] = t
        s.profile[t] = s.profile[t - 1]
    s.at[slot] = x
    s.slot[x] = slot
    s.profile[slot] = across
    s.totals[LENGTH] += 1
    s.totals[OVER] += max(across - s.totals[BUDGET], 0)


@njit(nogil=True, cache=True)
def _close(s: State, slot: int) -> None:
    """Take the slot of a detached computation away."""
    s.totals[OVER] -= max(s.profile[slot] - s.totals[BUDGET], 0)
    s.totals[LENGTH] -= 1
    for t in range(slot, s.totals[LENGTH]):
        y = s.at[t + 1]
        s.at[t] = y
        s.slot[y] = t
        s.profile[t] = s.profile[t + 1]


@njit(nogil=True, cache=True)
def _slide(g: Graph, s: State, x: int, to: int) -> None:
    """Move the slot of a detached computation; those between move by one."""
    here = s.slot[x]
    s.totals[OVER] -= max(s.profile[here] - s.totals[BUDGET], 0)
    step = 1 if to > here else -1
    for t in range(here, to, step):
        y = s.at[t + step]
        s.at[t] = y
        s.slot[y] = t
        s.profile[t] = s.profile[t + step]
    s.at[to] = x
    s.slot[x] = to
    through = s.op[s.at[to + 1]]
    s.profile[to] = s.profile[to + 1] - g.sizes[through] - g.scratch[through]
    s.totals[OVER] += max(s.profile[to] - s.totals[BUDGET], 0)


@njit(nogil=True, cache=True)
def _attach(g: Graph, s: State, x: int) -> None:
    """Let x, which has a slot, compute: reads after it get its output, and its inputs have to live to its slot."""
    op, slot = s.op[x], s.slot[x]
    for k in range(g.input_at[op], g.input_at[op + 1]):
        y = serving(s, g.inputs[k], slot)
        _add(s, end_of(g, s, y) + 1, slot, g.sizes[g.inputs[k]])
    before = serving(s, op, slot)
    after = s.after[before] if before >= 0 else s.first[op]
    limit = s.slot[after] if after >= 0 else s.totals[LENGTH]
    end = max(slot, last_read(g, s, op, slot, limit))
    if before >= 0:
        here = s.slot[before]
        old = max(here, last_read(g, s, op, here, limit))
        _add(s, max(here, last_read(g, s, op, here, slot)) + 1, old, -g.sizes[op])
    _add(s, slot, end, g.sizes[op])
    _add(s, slot, slot, g.scratch[op])
    s.before[x], s.after[x] = before, after
    if before >= 0:
        s.after[before] = x
    else:
        s.first[op] = x
    if after >= 0:
        s.before[after] = x
    else:
        s.last[op] = x


@njit(nogil=True, cache=True)
def _detach(g: Graph, s: State, x: int) -> None:
    """The inverse of `_attach`. Reads go to the computation before; there may be none for the moment."""
    op, slot = s.op[x], s.slot[x]
    end = end_of(g, s, x)
    before, after = s.before[x], s.after[x]
    if before >= 0:
        s.after[before] = after
    else:
        s.first[op] = after
    if after >= 0:
        s.before[after] = before
    else:
        s.last[op] = before
    _add(s, slot, slot, -g.scratch[op])
    _add(s, slot, end, -g.sizes[op])
    if before >= 0:
        here = s.slot[before]
        limit = s.slot[after] if after >= 0 else s.totals[LENGTH]
        old = max(here, last_read(g, s, op, here, slot))
        _add(s, old + 1, max(here, last_read(g, s, op, here, limit)), g.sizes[op])
    for k in range(g.input_at[op], g.input_at[op + 1]):
        y = serving(s, g.inputs[k], slot)
        _add(s, end_of(g, s, y) + 1, slot, -g.sizes[g.inputs[k]])


@njit(nogil=True, cache=True)
def _twin(s: State, x: int, add: bool) -> None:
    """Put x into the list of computations that stand more than once, or take it out."""
    if add:
        s.twin_at[x] = s.totals[TWINS]
        s.twins[s.totals[TWINS]] = x
        s.totals[TWINS] += 1
    else:
        s.totals[TWINS] -= 1
        y = s.twins[s.totals[TWINS]]
        s.twins[s.twin_at[x]] = y
        s.twin_at[y] = s.twin_at[x]
        s.twin_at[x] = -1


@njit(nogil=True, cache=True)
def insert(g: Graph, s: State, op: int, slot: int) -> int:
    """Compute op again before what stands at the slot; returns the computation. Its inputs have to be there."""
    s.totals[SPARE] -= 1
    x = s.spare[s.totals[SPARE]]
    s.op[x] = op
    _open(g, s, x, slot)
    _attach(g, s, x)
    s.totals[COST] += g.costs[op]
    s.count[op] += 1
    if s.count[op] > 1:
        _twin(s, x, True)
        if s.count[op] == 2:
            _twin(s, s.before[x] if s.before[x] >= 0 else s.after[x], True)
    return x


@njit(nogil=True, cache=True)
def remove(g: Graph, s: State, x: int) -> None:
    """Take a computation away; its reads have to have another before them."""
    op = s.op[x]
    if s.count[op] > 1:
        _twin(s, x, False)
        if s.count[op] == 2:
            _twin(s, s.before[x] if s.before[x] >= 0 else s.after[x], False)
    _detach(g, s, x)
    _close(s, s.slot[x])
    s.totals[COST] -= g.costs[op]
    s.count[op] -= 1
    s.spare[s.totals[SPARE]] = x
    s.totals[SPARE] += 1


@njit(nogil=True, cache=True)
def move(g: Graph, s: State, x: int, to: int) -> None:
    """Move a computation to a slot; its inputs have to stand before it there and its reads behind."""
    _detach(g, s, x)
    _slide(g, s, x, to)
    _attach(g, s, x)


@njit(nogil=True, cache=True)
def load(g: Graph, s: State, order: np.ndarray, budget: int) -> None:
    """Set the state to a sequence. Operations that stand once get their own number."""
    ops, capacity = len(g.sizes), len(s.at)
    s.totals[:] = 0
    s.totals[BUDGET] = budget
    s.count[:] = 0
    s.first[:] = -1
    s.last[:] = -1
    s.twin_at[:] = -1
    for x in range(capacity - 1, ops - 1, -1):
        s.spare[s.totals[SPARE]] = x
        s.totals[SPARE] += 1
    for slot in range(len(order)):
        op = order[slot]
        x = op
        if s.count[op] > 0:
            s.totals[SPARE] -= 1
            x = s.spare[s.totals[SPARE]]
        s.op[x] = op
        s.at[slot] = x
        s.slot[x] = slot
        s.before[x], s.after[x] = s.last[op], -1
        if s.count[op] > 0:
            s.after[s.last[op]] = x
        else:
            s.first[op] = x
        s.last[op] = x
        s.count[op] += 1
        s.totals[COST] += g.costs[op]
    s.totals[LENGTH] = len(order)
    s.profile[: len(order)] = 0
    for slot in range(len(order)):
        x = s.at[slot]
        op = s.op[x]
        _add(s, slot, end_of(g, s, x), g.sizes[op])
        _add(s, slot, slot, g.scratch[op])
        if s.count[op] > 1:
            _twin(s, x, True)
    s.totals[OVER] = 0
    for slot in range(len(order)):
        s.totals[OVER] += max(s.profile[slot] - budget, 0)
