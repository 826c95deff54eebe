"""Changes of a sequence: a computation comes, goes or moves, and the profile follows.

Each takes time linear in the length of the sequence with a small factor (a profile is one row) and in the
number of edges of the operation and its inputs, not in the number of all edges.
"""

from __future__ import annotations

import numpy as np

from .compiled import compiled
from .state import (
    AFTER,
    AT,
    BEFORE,
    BUDGET,
    COST,
    COUNT,
    EXPENSE,
    FIRST,
    INPUTS_FROM,
    INPUTS_TO,
    LAST,
    LENGTH,
    OP,
    OVER,
    PROFILE,
    SCRATCH,
    SIZE,
    SLOT,
    SPARE,
    TWIN,
    TWIN_AT,
    TWINS,
    UNUSED,
    Graph,
    State,
    end_of,
    last_read,
    serving,
)


@compiled
def _add(s: State, low: int, high: int, size: int) -> None:
    """Add bytes to slots low..high."""
    budget, profile = s.totals[BUDGET], s.table[PROFILE]
    over = 0
    for t in range(low, high + 1):
        old = profile[t]
        profile[t] = old + size
        over += max(old + size - budget, 0) - max(old - budget, 0)
    s.totals[OVER] += over


@compiled
def _open(g: Graph, s: State, x: int, slot: int) -> None:
    """Make room for x before what stands at the slot; x is in the sequence but not attached."""
    through = s.table[AT, slot]
    across = s.table[PROFILE, slot] - g.ops[SIZE, s.table[OP, through]] - g.ops[SCRATCH, s.table[OP, through]]
    at, slots, profile = s.table[AT], s.table[SLOT], s.table[PROFILE]
    for t in range(s.totals[LENGTH], slot, -1):
        y = at[t - 1]
        at[t] = y
        slots[y] = t
        profile[t] = profile[t - 1]
    s.table[AT, slot] = x
    s.table[SLOT, x] = slot
    s.table[PROFILE, slot] = across
    s.totals[LENGTH] += 1
    s.totals[OVER] += max(across - s.totals[BUDGET], 0)


@compiled
def _close(s: State, slot: int) -> None:
    """Take the slot of a detached computation away."""
    s.totals[OVER] -= max(s.table[PROFILE, slot] - s.totals[BUDGET], 0)
    s.totals[LENGTH] -= 1
    at, slots, profile = s.table[AT], s.table[SLOT], s.table[PROFILE]
    for t in range(slot, s.totals[LENGTH]):
        y = at[t + 1]
        at[t] = y
        slots[y] = t
        profile[t] = profile[t + 1]


@compiled
def _slide(g: Graph, s: State, x: int, to: int) -> None:
    """Move the slot of a detached computation; those between move by one."""
    here = s.table[SLOT, x]
    s.totals[OVER] -= max(s.table[PROFILE, here] - s.totals[BUDGET], 0)
    step = 1 if to > here else -1
    at, slots, profile = s.table[AT], s.table[SLOT], s.table[PROFILE]
    for t in range(here, to, step):
        y = at[t + step]
        at[t] = y
        slots[y] = t
        profile[t] = profile[t + step]
    s.table[AT, to] = x
    s.table[SLOT, x] = to
    through = s.table[OP, s.table[AT, to + 1]]
    s.table[PROFILE, to] = s.table[PROFILE, to + 1] - g.ops[SIZE, through] - g.ops[SCRATCH, through]
    s.totals[OVER] += max(s.table[PROFILE, to] - s.totals[BUDGET], 0)


@compiled
def _attach(g: Graph, s: State, x: int) -> None:
    """Let x, which has a slot, compute: later reads get its output, and its inputs live to its slot."""
    op, slot = s.table[OP, x], s.table[SLOT, x]
    for k in range(g.ops[INPUTS_FROM, op], g.ops[INPUTS_TO, op]):
        y = serving(s, g.edges[k], slot)
        _add(s, end_of(g, s, y) + 1, slot, g.ops[SIZE, g.edges[k]])
    before = serving(s, op, slot)
    after = s.table[AFTER, before] if before >= 0 else s.ops[FIRST, op]
    limit = s.table[SLOT, after] if after >= 0 else s.totals[LENGTH]
    end = max(slot, last_read(g, s, op, slot, limit))
    if before >= 0:
        here = s.table[SLOT, before]
        old = max(here, last_read(g, s, op, here, limit))
        _add(s, max(here, last_read(g, s, op, here, slot)) + 1, old, -g.ops[SIZE, op])
    _add(s, slot, end, g.ops[SIZE, op])
    _add(s, slot, slot, g.ops[SCRATCH, op])
    s.table[BEFORE, x], s.table[AFTER, x] = before, after
    if before >= 0:
        s.table[AFTER, before] = x
    else:
        s.ops[FIRST, op] = x
    if after >= 0:
        s.table[BEFORE, after] = x
    else:
        s.ops[LAST, op] = x


@compiled
def _detach(g: Graph, s: State, x: int) -> None:
    """The inverse of `_attach`. Reads go to the computation before; there may be none for the moment."""
    op, slot = s.table[OP, x], s.table[SLOT, x]
    end = end_of(g, s, x)
    before, after = s.table[BEFORE, x], s.table[AFTER, x]
    if before >= 0:
        s.table[AFTER, before] = after
    else:
        s.ops[FIRST, op] = after
    if after >= 0:
        s.table[BEFORE, after] = before
    else:
        s.ops[LAST, op] = before
    _add(s, slot, slot, -g.ops[SCRATCH, op])
    _add(s, slot, end, -g.ops[SIZE, op])
    if before >= 0:
        here = s.table[SLOT, before]
        limit = s.table[SLOT, after] if after >= 0 else s.totals[LENGTH]
        old = max(here, last_read(g, s, op, here, slot))
        _add(s, old + 1, max(here, last_read(g, s, op, here, limit)), g.ops[SIZE, op])
    for k in range(g.ops[INPUTS_FROM, op], g.ops[INPUTS_TO, op]):
        y = serving(s, g.edges[k], slot)
        _add(s, end_of(g, s, y) + 1, slot, -g.ops[SIZE, g.edges[k]])


@compiled
def _twin(s: State, x: int, add: bool) -> None:
    """Put x into the list of computations that stand more than once, or take it out."""
    if add:
        s.table[TWIN_AT, x] = s.totals[TWINS]
        s.table[TWIN, s.totals[TWINS]] = x
        s.totals[TWINS] += 1
    else:
        s.totals[TWINS] -= 1
        y = s.table[TWIN, s.totals[TWINS]]
        s.table[TWIN, s.table[TWIN_AT, x]] = y
        s.table[TWIN_AT, y] = s.table[TWIN_AT, x]
        s.table[TWIN_AT, x] = -1


@compiled
def insert(g: Graph, s: State, op: int, slot: int) -> int:
    """Compute op again before what stands at the slot, behind its inputs; returns the computation."""
    s.totals[SPARE] -= 1
    x = s.table[UNUSED, s.totals[SPARE]]
    s.table[OP, x] = op
    _open(g, s, x, slot)
    _attach(g, s, x)
    s.totals[COST] += g.ops[EXPENSE, op]
    s.ops[COUNT, op] += 1
    if s.ops[COUNT, op] > 1:
        _twin(s, x, True)
        if s.ops[COUNT, op] == 2:
            _twin(s, s.table[BEFORE, x] if s.table[BEFORE, x] >= 0 else s.table[AFTER, x], True)
    return int(x)


@compiled
def remove(g: Graph, s: State, x: int) -> None:
    """Take a computation away; its reads have to have another before them."""
    op = s.table[OP, x]
    if s.ops[COUNT, op] > 1:
        _twin(s, x, False)
        if s.ops[COUNT, op] == 2:
            _twin(s, s.table[BEFORE, x] if s.table[BEFORE, x] >= 0 else s.table[AFTER, x], False)
    _detach(g, s, x)
    _close(s, s.table[SLOT, x])
    s.totals[COST] -= g.ops[EXPENSE, op]
    s.ops[COUNT, op] -= 1
    s.table[UNUSED, s.totals[SPARE]] = x
    s.totals[SPARE] += 1


@compiled
def move(g: Graph, s: State, x: int, to: int) -> None:
    """Move a computation to a slot; its inputs have to stand before it there and its reads behind."""
    _detach(g, s, x)
    _slide(g, s, x, to)
    _attach(g, s, x)


@compiled
def load(g: Graph, s: State, order: np.ndarray, budget: int) -> None:
    """Set the state to a sequence. Operations that stand once get their own number."""
    ops, capacity = g.ops.shape[1], s.table.shape[1]
    s.totals[:] = 0
    s.totals[BUDGET] = budget
    s.ops[COUNT, :] = 0
    s.ops[FIRST, :] = -1
    s.ops[LAST, :] = -1
    s.table[TWIN_AT, :] = -1
    for x in range(capacity - 1, ops - 1, -1):
        s.table[UNUSED, s.totals[SPARE]] = x
        s.totals[SPARE] += 1
    for slot in range(len(order)):
        op = order[slot]
        x = op
        if s.ops[COUNT, op] > 0:
            s.totals[SPARE] -= 1
            x = s.table[UNUSED, s.totals[SPARE]]
        s.table[OP, x] = op
        s.table[AT, slot] = x
        s.table[SLOT, x] = slot
        s.table[BEFORE, x], s.table[AFTER, x] = s.ops[LAST, op], -1
        if s.ops[COUNT, op] > 0:
            s.table[AFTER, s.ops[LAST, op]] = x
        else:
            s.ops[FIRST, op] = x
        s.ops[LAST, op] = x
        s.ops[COUNT, op] += 1
        s.totals[COST] += g.ops[EXPENSE, op]
    s.totals[LENGTH] = len(order)
    s.table[PROFILE, : len(order)] = 0
    for slot in range(len(order)):
        x = s.table[AT, slot]
        op = s.table[OP, x]
        _add(s, slot, end_of(g, s, x), g.ops[SIZE, op])
        _add(s, slot, slot, g.ops[SCRATCH, op])
        if s.ops[COUNT, op] > 1:
            _twin(s, x, True)
    s.totals[OVER] = 0
    for slot in range(len(order)):
        s.totals[OVER] += max(s.table[PROFILE, slot] - budget, 0)
