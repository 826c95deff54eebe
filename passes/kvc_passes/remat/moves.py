"""The moves of the local search. Each changes the state and writes into a journal how to take it back."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .change import insert, move, remove
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
    LENGTH,
    NEXT_ONCE,
    ONCE,
    OP,
    OVER,
    PREVIOUS_ONCE,
    PROFILE,
    SIZE,
    SLOT,
    SPARE,
    TWIN,
    TWINS,
    Graph,
    State,
    end_of,
    first_read,
    last_read,
    next_slot,
    serving,
)

INSERTED, REMOVED, MOVED = range(3)
_MOST = 24  # entries of one journal: a move does not start what could need more
_CHAIN = 8  # computations that one move repeats together


class Journal(NamedTuple):
    """What one move did: `size[0]` steps, each with its kind, computation, operation and slot."""

    steps: np.ndarray
    size: np.ndarray


def empty_journal() -> Journal:
    return Journal(np.zeros((_MOST + 2 * _CHAIN, 4), np.int64), np.zeros(1, np.int64))


@compiled
def draw(random: np.ndarray, bound: int) -> int:
    """A number below the bound from a xorshift generator, whose state is `random[0]`."""
    r = random[0]
    r ^= r << np.uint64(13)
    r ^= r >> np.uint64(7)
    r ^= r << np.uint64(17)
    random[0] = r
    return int(np.int64(r >> np.uint64(11)) % bound)


@compiled
def _note(j: Journal, kind: int, x: int, op: int, slot: int) -> None:
    k = j.size[0]
    j.steps[k, 0], j.steps[k, 1], j.steps[k, 2], j.steps[k, 3] = kind, x, op, slot
    j.size[0] = k + 1


@compiled
def undo(g: Graph, s: State, j: Journal) -> None:
    """Take back what the journal says."""
    while j.size[0] > 0:
        k = j.size[0] - 1
        j.size[0] = k
        kind, x, op, slot = j.steps[k, 0], j.steps[k, 1], j.steps[k, 2], j.steps[k, 3]
        if kind == INSERTED:
            remove(g, s, x)
        elif kind == REMOVED:
            insert(g, s, op, slot)  # gets the same number: the spare ones are a stack
        else:
            move(g, s, x, slot)


@compiled
def _held(g: Graph, s: State, x: int, fixed: bool) -> bool:
    """Whether the computation has to stay: it runs once, or first ones keep their order."""
    return g.ops[ONCE, s.table[OP, x]] == 1 or (fixed and s.table[BEFORE, x] < 0)


@compiled
def _place(g: Graph, s: State, j: Journal, op: int, slot: int) -> int:
    x = insert(g, s, op, slot)
    _note(j, INSERTED, x, op, slot)
    return x


@compiled
def _crowded_slot(s: State, random: np.ndarray) -> int:
    """A slot over the budget, any slot if there is none."""
    length = s.totals[LENGTH]
    t = draw(random, length)
    if s.totals[OVER] > 0:
        while s.table[PROFILE, t] <= s.totals[BUDGET]:
            t = t + 1 if t + 1 < length else 0
    return t


@compiled
def _idle_at(g: Graph, s: State, t: int, random: np.ndarray, most: float) -> int:
    """A computation whose output lies unread across slot t, rather a large and cheap one; -1 for none found.

    `most` is what the whole sequence may cost with it.
    """
    best, found, wanted = -1, 0, 1 + draw(random, 4)
    for _ in range(40):
        if t == 0 or found == wanted:
            break
        x = s.table[AT, draw(random, t)]
        op = s.table[OP, x]
        if g.ops[ONCE, op] == 1 or g.ops[SIZE, op] == 0 or s.totals[COST] + g.ops[EXPENSE, op] > most:
            continue
        limit = next_slot(s, x)
        read = first_read(g, s, op, t - 1, limit)
        if limit <= t or read in (limit, t):
            continue
        found += 1
        if best < 0 or _saving(g, op) > _saving(g, s.table[OP, best]):
            best = x
    return best


@compiled
def _saving(g: Graph, op: int) -> float:
    """Bytes for a unit of cost."""
    return float(g.ops[SIZE, op] / (g.ops[EXPENSE, op] + 1.0))


@compiled
def recompute(g: Graph, s: State, j: Journal, random: np.ndarray, most: float) -> bool:
    """Drop a value where memory is short and compute it again before its next read, perhaps with its inputs.

    `most` is what the whole sequence may cost afterwards.
    """
    t = _crowded_slot(s, random)
    x = _idle_at(g, s, t, random, most)
    if x < 0 or s.totals[SPARE] <= _CHAIN + 2:
        return False
    slot = first_read(g, s, s.table[OP, x], t, next_slot(s, x))
    if draw(random, 3) == 0:
        slot = t + 1 + draw(random, slot - t)
    start = j.size[0]
    _place(g, s, j, s.table[OP, x], slot)
    if draw(random, 2) == 0:
        _with_inputs(g, s, j, random, t, start, most)
    return True


@compiled
def _with_inputs(g: Graph, s: State, j: Journal, random: np.ndarray, t: int, start: int, most: float) -> None:
    """Compute inputs again too that would otherwise live (across t) for it alone, and inputs of those."""
    k = start
    end = start + 2 + draw(random, _CHAIN - 1)
    while k < j.size[0]:
        y = j.steps[k, 1]
        k += 1
        op = s.table[OP, y]
        for i in range(g.ops[INPUTS_FROM, op], g.ops[INPUTS_TO, op]):
            value = g.edges[i]
            if g.ops[ONCE, value] == 1 or g.ops[SIZE, value] == 0:
                continue
            if s.totals[COST] + g.ops[EXPENSE, value] > most or j.size[0] == end:
                continue
            z = serving(s, value, s.table[SLOT, y])
            here = s.table[SLOT, z]
            needed = max(here, last_read(g, s, value, here, s.table[SLOT, y]))
            chance = 6 if needed < t else 1 if needed < s.table[SLOT, y] - 1 else 0
            if draw(random, 8) < chance:
                _place(g, s, j, value, s.table[SLOT, y])


@compiled
def drop(g: Graph, s: State, j: Journal, random: np.ndarray, fixed: bool) -> bool:
    """Take a repeated computation away, and those that only it needed."""
    if s.totals[TWINS] == 0:
        return False
    x = s.table[TWIN, draw(random, s.totals[TWINS])]
    if fixed and s.table[BEFORE, x] < 0:
        x = s.table[AFTER, x]
    return _drop(g, s, j, x, fixed)


@compiled
def _drop(g: Graph, s: State, j: Journal, x: int, fixed: bool) -> bool:
    if s.table[BEFORE, x] < 0 and end_of(g, s, x) > s.table[SLOT, x]:
        return False
    op, slot = s.table[OP, x], s.table[SLOT, x]
    remove(g, s, x)
    _note(j, REMOVED, x, op, slot)
    for i in range(g.ops[INPUTS_FROM, op], g.ops[INPUTS_TO, op]):
        y = serving(s, g.edges[i], slot)
        unread = s.ops[COUNT, g.edges[i]] > 1 and end_of(g, s, y) == s.table[SLOT, y]
        if unread and not _held(g, s, y, fixed) and j.size[0] < _MOST:
            _drop(g, s, j, y, fixed)
            slot = min(slot, s.totals[LENGTH])  # the sequence is shorter now
    return True


@compiled
def shift(g: Graph, s: State, j: Journal, random: np.ndarray, fixed: bool, twin: bool) -> bool:
    """Move a repeated computation, or any, to another slot between its inputs and its reads."""
    if twin and s.totals[TWINS] == 0:
        return False
    x = (
        s.table[TWIN, draw(random, s.totals[TWINS])]
        if twin
        else s.table[AT, draw(random, s.totals[LENGTH] - 1)]
    )
    if fixed and s.table[BEFORE, x] < 0:
        if not twin:
            return False
        x = s.table[AFTER, x]
    op, here = s.table[OP, x], s.table[SLOT, x]
    low, high = _window(g, s, x, fixed)
    if draw(random, 5) > 0:
        low, high = max(low, here - 25), min(high, here + 25)
    if high <= low:
        return False
    to = low + draw(random, high - low)
    if to >= here:
        to += 1
    move(g, s, x, to)
    _note(j, MOVED, x, op, here)
    return True


@compiled
def _window(g: Graph, s: State, x: int, fixed: bool) -> tuple[int, int]:
    """The slots, first to last, at which x may stand when all else keeps its order."""
    op, here = s.table[OP, x], s.table[SLOT, x]
    low, high = 0, s.totals[LENGTH] - 2
    for i in range(g.ops[INPUTS_FROM, op], g.ops[INPUTS_TO, op]):
        low = max(low, s.table[SLOT, s.ops[FIRST, g.edges[i]]] + 1)
    if s.table[BEFORE, x] < 0:
        high = min(high, first_read(g, s, op, here, next_slot(s, x)) - 1)
    if fixed:
        low = max(low, s.table[SLOT, s.ops[FIRST, op]] + 1)
    if g.ops[ONCE, op] == 1:
        if g.ops[PREVIOUS_ONCE, op] >= 0:
            low = max(low, s.table[SLOT, s.ops[FIRST, g.ops[PREVIOUS_ONCE, op]]] + 1)
        high = min(high, s.table[SLOT, s.ops[FIRST, g.ops[NEXT_ONCE, op]]] - 1)
    return low, high
