"""The abstract problem of rematerialization: operations, sizes, costs, and what may not be repeated."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import InputError


@dataclass(frozen=True)
class Problem:
    """Operations 0..n-1 in an order in which they can run; each has one output. Parameters are no operations.

    An output lives from its computation to its last read before it is computed again. While an operation
    runs, its inputs, its output and its scratch memory are all resident.

    Attributes:
        sizes: bytes of each output; 0 where the output is a view.
        costs: what computing it takes, whole numbers of any unit.
        inputs: the operations whose outputs it reads, each of them smaller than its own number.
        scratch: bytes needed only while it runs; () is none anywhere.
        kept: operations whose last output lives to the end (the function's outputs).
        once: operations that run exactly once, in the order given (impure or in-place ones), in increasing
        order. alias: the input whose storage the output shares, -1 for storage of its own; () is -1
        everywhere.
            A view reads nothing else, costs nothing and may be repeated; its storage lives as long as it is
            read through any view. In `once` it is an in-place update: it overwrites the storage, so every
            other operation that reads what the storage held before has to be in `once` and to come before it.
        overwrites: the operation whose output's storage this one's output may take where nothing reads that
            any more; -1 for none, () is -1 everywhere. Both are equally large; whatever else reads it comes
            before this one in every order.

    Raises InputError where the numbers contradict each other.
    """

    sizes: tuple[int, ...]
    costs: tuple[int, ...]
    inputs: tuple[tuple[int, ...], ...]
    scratch: tuple[int, ...] = ()
    kept: tuple[int, ...] = ()
    once: tuple[int, ...] = ()
    alias: tuple[int, ...] = ()
    overwrites: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        count = len(self.sizes)
        object.__setattr__(self, "scratch", self.scratch or (0,) * count)
        object.__setattr__(self, "alias", self.alias or (-1,) * count)
        object.__setattr__(self, "overwrites", self.overwrites or (-1,) * count)
        columns = (self.costs, self.inputs, self.scratch, self.alias, self.overwrites)
        if any(len(column) != count for column in columns):
            raise InputError("sizes, costs, inputs, scratch, alias and overwrites have to be equally long")
        if min((*self.sizes, *self.costs, *self.scratch), default=0) < 0:
            raise InputError("sizes, costs and scratch bytes cannot be negative")
        for op, read in enumerate(self.inputs):
            if any(not 0 <= i < op for i in read) or len(set(read)) < len(read):
                raise InputError(f"operation {op} has to read different operations before it, not {read}")
        if list(self.once) != sorted(set(self.once)):
            raise InputError("`once` has to be in the order of the operations")
        if any(not 0 <= op < count for op in (*self.once, *self.kept)):
            raise InputError("`once` and `kept` have to name operations")
        self._check_views()
        for op, old in enumerate(self.overwrites):
            if old >= 0 and (old >= op or self.sizes[old] != self.sizes[op] or self.alias[op] >= 0):
                raise InputError(f"operation {op} cannot take the storage of {old}")

    def _check_views(self) -> None:
        once = set(self.once)
        for op, base in enumerate(self.alias):
            if base < 0:
                continue
            if base not in self.inputs[op] or self.sizes[op]:
                raise InputError(
                    f"operation {op} has to read what it is a view of, and to have no bytes of its own"
                )
            if op not in once and (self.costs[op] or self.scratch[op] or len(self.inputs[op]) > 1):
                raise InputError(f"operation {op} is a view, so it costs nothing and reads nothing else")
            if op in once:
                self._check_update(op, once)

    def _check_update(self, update: int, once: set[int]) -> None:
        """What an in-place update overwrites is not read any more."""
        old = {update}
        while (base := self.alias[min(old)]) >= 0:
            old.add(base)
            if (
                base in once
            ):  # an earlier update of the same storage: what was there before it is gone already
                break
        old.remove(update)
        for op in range(min(old) + 1, len(self.sizes)):
            if op == update or not old & set(self.inputs[op]):
                continue
            if self.alias[op] in old and op not in once:
                old.add(op)
            elif op not in once or op > update:
                raise InputError(
                    f"operation {op} reads what {update} overwrites: it has to be in `once`, before {update}"
                )
        if old & set(self.kept):
            raise InputError(f"operation {update} overwrites an output")

    @property
    def cost(self) -> int:
        """The cost of computing everything once."""
        return sum(self.costs)


@dataclass(frozen=True)
class Schedule:
    """Operations in the order in which they run; one that stands there again is computed again."""

    order: tuple[int, ...]

    def cost(self, problem: Problem) -> int:
        return sum(problem.costs[op] for op in self.order)
