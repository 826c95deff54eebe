"""Chains of kernels that can be computed slice by slice, and what is alive when they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from .boxes import Box, extents, hull, whole
from .loads import Loads, Sketch, Step
from .operation_boxes import OperationBoxes, count
from .rematerialize import CALL, Operations

Members = tuple[int, ...]
_KERNELS: Final = 10
"""Kernels in a chain, at most."""
_AGAIN: Final = 5
"""Operations in a row that a chain computes again, at most."""
_AHEAD: Final = 12
"""Operations behind one that are looked at for the last of a chain around it."""


@dataclass(frozen=True)
class Chain:
    """Operations whose values are used by each other alone, but for the last one's.

    Attributes:
        members: their numbers, in order.
        axis: of the last one's output, which is computed in parts along it.
        slices: the number of parts.
        again: members that others read, too, of what is computed where it stands; that does not wait for the
            chain.
    """

    members: tuple[int, ...]
    axis: int
    slices: int
    again: tuple[int, ...] = ()

    @property
    def own(self) -> tuple[int, ...]:
        """The members that are computed in the chain alone."""
        return tuple(op for op in self.members if op not in self.again)

    @property
    def exit(self) -> int:
        return self.members[-1]

    def box(self, shape: Sequence[int], number: int) -> Box:
        """The part of the last output that slice `number` computes."""
        size, parts = shape[self.axis], self.slices
        box = list(whole(shape))
        box[self.axis] = (size * number // parts, size * (number + 1) // parts)
        return tuple(box)


class Chains:
    """The chains of a function, and what its operations read."""

    def __init__(self, operations: Operations) -> None:
        self.of = OperationBoxes(operations)
        self.problem = problem = operations.problem
        self.once, self.kept = set(problem.once), set(problem.kept)
        self.users: list[list[int]] = []
        self._readers: list[set[int]] = [set() for _ in operations.vars]
        for user, read in enumerate(problem.inputs):
            for op in read:
                self._readers[op].add(user)
        self._boxes: dict[Chain, tuple[dict[int, Box], ...] | None] = {}
        self._over: dict[Chain, int] = {}
        self._extra: dict[Chain, int] = {}
        self._steps: dict[tuple[Chain, int], list[list[Step]]] = {}
        self.assume([])

    def assume(self, chains: Sequence[Chain]) -> bool:
        """Take these as split: users are who reads the value where it stands. Whether all are chains."""
        inside = {op: chain for chain in chains for op in chain.own}
        self.users = [[] for _ in self.problem.inputs]
        for user in reversed(range(len(self.users))):
            chain = inside.get(user)
            if self.is_dead(user):
                continue
            for op in self.problem.inputs[user]:
                if chain is None or op not in chain.again:
                    self.users[op].insert(0, user)
            if chain is not None and user == chain.exit:
                for op in (op for again in chain.again for op in self.problem.inputs[again]):
                    if op not in chain.members and user not in self.users[op]:
                        self.users[op].insert(0, user)
        return all(set(chain.members).issuperset(self.users[op]) for chain in chains for op in chain.own[:-1])

    def is_dead(self, op: int) -> bool:
        """Whether nothing reads it any more, since chains compute it themselves."""
        return not self.users[op] and op not in self.kept and op not in self.once

    def boxes(self, chain: Chain) -> tuple[dict[int, Box], ...] | None:
        """For every slice the boxes of the members' values; None where one cannot be computed by itself."""
        if chain not in self._boxes:
            found = [self._slice(chain, number) for number in range(chain.slices)]
            self._boxes[chain] = None if None in found else tuple(f for f in found if f)
        return self._boxes[chain]

    def around(self, op: int) -> list[tuple[int, ...]]:
        """Members of the chains that `op` is in, all of them of which no value but the last leaves."""
        found: dict[tuple[int, ...], None] = {}
        reached = {op}
        for last in range(op, min(len(self.users), op + _AHEAD)):
            if last != op and not reached.intersection(self.problem.inputs[last]):
                continue
            reached.add(last)
            if last in self.once or self.of.accesses[last] is None or not self.of.shapes[last]:
                continue
            for first in self._cone(last):
                part = self._cone(last, first)
                if op in part and sum(not self.of.views[m] for m in part) > 1:
                    found[tuple(part)] = None
        return list(found)

    def repeating(self, members: Members, op: int) -> list[tuple[Members, Members]]:
        """These with `op`, which they read, and with more and more of what it is computed from."""
        found, again = [], {op}
        for _ in range(_AGAIN):
            if not all(self._fits(each) and not self.of.views[each] for each in again):
                break
            whole_ = tuple(sorted({*members, *again}))
            found.append((whole_, tuple(sorted(again - set(members)))))
            more = {source for each in again for source in self.problem.inputs[each]} - again
            if not more:
                break
            again |= more
        return found

    def like(self, members: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Other chains of the same kernels, as far from each other."""
        names = [self.of.names[op] for op in members]
        found = []
        for by in range(-members[0], len(self.users) - members[-1]):
            other = tuple(op + by for op in members)
            if by and [self.of.names[op] for op in other] == names and self._closed(other):
                found.append(other)
        return found

    def without_whole(self, chain: Chain) -> Chain | None:
        """The chain without what all slices need all of: that is computed once, before it."""
        boxes = self.boxes(chain)
        if boxes is None:
            return None
        first, last = boxes[0], boxes[-1]
        full = [op for op in chain.members if first[op] == last[op] == whole(self.of.shape(op))]
        if not full or chain.again:
            return chain
        members = self._cone(chain.exit, chain.members[0], frozenset(full))
        if chain.exit in full or len(members) < 2:
            return None
        return Chain(tuple(members), chain.axis, chain.slices)

    def over(self, chain: Chain) -> int:
        """The operation whose value the last of a chain may be written over, -1 for none.

        Nothing but the chain reads it, and no slice what an earlier one has overwritten.
        """
        if chain not in self._over:
            outside = {op for member in chain.members for op in self.problem.inputs[member]}
            fitting = (op for op in sorted(outside - set(chain.members)) if self._may_go(op, chain))
            self._over[chain] = -1 if chain.again else next(fitting, -1)
        over = self._over[chain]
        return over if over >= 0 and set(self.users[over]) <= set(chain.members) else -1

    def extra(self, chain: Chain) -> int:
        """Nanoseconds that computing it by slices costs more."""
        if chain in self._extra:
            return self._extra[chain]
        costs, total = self.problem.costs, 0
        for part in self.boxes(chain) or ():
            for op, box in part.items():
                share = count(extents(box)) / max(1, count(self.of.shape(op)))
                total += 0 if self.of.views[op] else CALL + round(share * max(0, costs[op] - CALL))
        found = self._extra[chain] = total - sum(costs[op] for op in chain.own)
        return found

    def loads(self, chains: Sequence[Chain]) -> Loads:
        """What is alive with these chains in slices."""
        problem = self.problem
        inside = {op: chain for chain in chains for op in chain.own}
        sketch = Sketch()
        for op, read in enumerate(problem.inputs):
            chain = inside.get(op)
            if self.is_dead(op):
                continue
            if chain is None:
                old = problem.overwrites[op]
                sketch.add(Step(op, problem.sizes[op], read, problem.alias[op], old))
            elif op == chain.exit:
                standing = {again: sketch.at[again] for again in chain.again if again in sketch.at}
                for part in self._sliced_steps(chain):
                    for step in part:
                        sketch.add(step)
                    if (over := self.over(chain)) >= 0:
                        sketch.at[over] = sketch.at[op]
                sketch.at.update(standing)
        return sketch.loads(problem.kept)

    def _sliced_steps(self, chain: Chain) -> list[list[Step]]:
        key = (chain, self.over(chain))
        if key not in self._steps:
            parts = enumerate(self.boxes(chain) or ())
            self._steps[key] = [
                [self._step(chain, op, number, part) for op in chain.members] for number, part in parts
            ]
        return self._steps[key]

    def _step(self, chain: Chain, op: int, number: int, part: dict[int, Box]) -> Step:
        """An operation of a chain for one slice."""
        read, old = self.problem.inputs[op], self.problem.overwrites[op]
        if self.of.views[op]:
            return Step(op, 0, read, self.problem.alias[op], -1)
        if op != chain.exit:
            same = old in part and extents(part[old]) == extents(part[op])
            return Step(op, self.of.bytes(op, part[op]), read, -1, old if same else -1)
        before = op if number else self.over(chain)  # what holds the output already
        if before < 0:
            return Step(op, self.problem.sizes[op], read, -1, -1)
        return Step(op, 0, (*read, before), before, -1)

    def _slice(self, chain: Chain, number: int) -> dict[int, Box] | None:
        found: dict[int, Box] = {chain.exit: chain.box(self.of.shape(chain.exit), number)}
        members = set(chain.members)
        for op in reversed(chain.members):
            for source, box in self.of.reads(op, found[op]):
                if box is None:
                    return None
                if source in members:
                    found[source] = hull(found.get(source, box), box)
        for op in chain.members:
            if self.of.views[op]:  # what else reads its source may need more of it
                ((source, box),) = self.of.reads(op, found[op])
                if found[source] != box:
                    return None
        return found

    def _may_go(self, op: int, chain: Chain) -> bool:
        """Whether the last of a chain may be written over the value of `op`, which is outside."""
        last, variables, parts = chain.exit, self.of.operations.vars, self.boxes(chain) or ()
        alike = (
            self.of.shapes[op] == self.of.shapes[last] and variables[op].ty.dtype == variables[last].ty.dtype
        )
        private = (
            op not in self.kept | self.once and min(self.problem.sizes[op], self.problem.sizes[last]) > 0
        )
        if not (alike and private and self.of.arguments[op] and self._readers[op] <= set(chain.members)):
            return False
        access = self.of.accesses[last]
        places = [i for i, source in enumerate(self.of.arguments[last]) if source == op]
        if access is None or len(places) > 1 or not set(places) <= set(access.kernel.overwritable()):
            return False
        return all(
            box is not None and box[chain.axis][0] >= part[last][chain.axis][0]
            for part in parts
            for member in chain.members
            for source, box in self.of.reads(member, part[member])
            if source == op
        )

    def _cone(self, last: int, first: int = 0, without: frozenset[int] = frozenset()) -> list[int]:
        """`last` and what from `first` on is computed for it alone, in order."""
        members, kernels = {last}, 1
        for op in range(last - 1, first - 1, -1):
            users = self.users[op]
            if not users or not members.issuperset(users) or not self._fits(op) or op in without:
                continue
            kernels += not self.of.views[op]
            if kernels > _KERNELS:
                break
            members.add(op)
        for op in sorted(members):
            if self.of.views[op] and self.problem.alias[op] not in members:
                members.remove(op)  # of something whole
        return sorted(members)

    def _closed(self, members: tuple[int, ...]) -> bool:
        """Whether these are a chain: only members read their values, and all can be in one."""
        inside, last = set(members), members[-1]
        if last in self.once or self.of.accesses[last] is None:
            return False
        if any(self.of.views[op] and self.problem.alias[op] not in inside for op in members):
            return False
        return all(inside.issuperset(self.users[op]) and self._fits(op) for op in members[:-1])

    def _fits(self, op: int) -> bool:
        """Whether an operation can be inside a chain."""
        if op in self.once or op in self.kept or not self.of.shapes[op]:
            return False
        return self.problem.alias[op] >= 0 if self.of.views[op] else self.of.accesses[op] is not None
