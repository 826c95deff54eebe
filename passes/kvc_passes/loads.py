"""What is alive at every step of a function whose order stands, in outline: nothing is written for it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from .remat.memory import given_order, resident
from .remat.problem import Problem


@dataclass(frozen=True)
class Layout(Problem):
    """A problem whose memory is looked at, and that nothing reorders: what that would take is not checked."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "scratch", (0,) * len(self.sizes))


@dataclass(frozen=True)
class Loads:
    """Bytes that are alive at every step of the given order, chains in slices where their last one stands.

    Attributes:
        owners: for every step the operation of the function that it is, or is a slice of.
    """

    bytes: tuple[int, ...]
    owners: tuple[int, ...]

    @cached_property
    def peak(self) -> int:
        return max(self.bytes, default=0)

    def most(self, owners: Iterable[int]) -> int:
        """The most while one of these operations runs."""
        among = set(owners)
        return max((b for b, owner in zip(self.bytes, self.owners, strict=True) if owner in among), default=0)


@dataclass(frozen=True)
class Step:
    """An operation or a slice of one, by numbers of operations.

    Attributes:
        size: bytes of its own.
        alias: what its value lies in, -1 for memory of its own.
        overwrites: what its value may lie over, -1 for nothing.
    """

    op: int
    size: int
    read: tuple[int, ...]
    alias: int
    overwrites: int


class Sketch:
    """A layout, written step by step; `at` is the last step of every operation."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.inputs: list[tuple[int, ...]] = []
        self.alias: list[int] = []
        self.overwrites: list[int] = []
        self.owners: list[int] = []
        self.at: dict[int, int] = {}

    def add(self, step: Step) -> None:
        at, old = self.at, step.overwrites
        self.sizes.append(step.size)
        self.inputs.append(tuple(at[source] for source in step.read))
        self.alias.append(at[step.alias] if step.alias >= 0 else -1)
        self.overwrites.append(self._memory(at[old]) if old >= 0 else -1)
        at[step.op] = len(self.owners)
        self.owners.append(step.op)

    def _memory(self, step: int) -> int:
        """The step whose output a value lies in."""
        while self.alias[step] >= 0:
            step = self.alias[step]
        return step

    def loads(self, kept: Iterable[int]) -> Loads:
        """What is alive, and to the end the values of the operations `kept`."""
        layout = Layout(
            tuple(self.sizes),
            (0,) * len(self.sizes),
            tuple(self.inputs),
            kept=tuple(self.at[op] for op in kept),
            alias=tuple(self.alias),
            overwrites=tuple(self.overwrites),
        )
        return Loads(tuple(resident(layout, given_order(layout))), tuple(self.owners))
