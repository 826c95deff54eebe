"""The least time under a limit of bytes: one option for every item, exactly.

A multiple-choice knapsack. Partial sums are kept while nothing else is both smaller and faster, and while the
relaxation of what remains, solved as a linear program by its convex hull, could still beat a known solution
(Kellerer, Pferschy, Pisinger: Knapsack Problems, 2004, chapter 11).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

_ROUNDING: Final = 1e-12
"""Relative difference of two sums of the same seconds."""
_MOST: Final = 2**62
"""Bytes that sums of 64 bits hold: more is treated as what does not fit."""


@dataclass(frozen=True)
class Option:
    """Something that an item can be, with what it takes."""

    bytes: int
    seconds: float


@dataclass(frozen=True)
class Item:
    """`count` things that are alike; each is one of the options."""

    options: tuple[Option, ...]
    count: int = 1


@dataclass(frozen=True)
class Choice:
    """For every item, how many of it are each of its options; and the sums."""

    counts: tuple[tuple[int, ...], ...]
    bytes: int
    seconds: float


@dataclass(frozen=True)
class _Points:
    """Sums in ascending bytes and descending seconds, and what each was made of."""

    bytes: NDArray[np.int64]
    seconds: NDArray[np.float64]
    made: NDArray[np.int64]
    """[points, columns]"""


def solve(items: Sequence[Item], limit: int) -> Choice | None:
    """The choice of the fewest seconds within `limit` bytes, None if even the smallest is larger.

    Of choices that take as long, one of the fewest bytes.
    """
    most = _MOST // max(sum(item.count for item in items), 1)
    if smallest(items).bytes > min(limit, most):
        return None
    points = [_alike(item, most) for item in items]
    rests = [_Relaxed.of(points[i + 1 :]) for i in range(len(points))]
    known = _greedy(points, limit)
    states = _Points(np.zeros(1, np.int64), np.zeros(1), np.zeros((1, 0), np.int64))
    trail: list[NDArray[np.int64]] = []
    for each, rest in zip(points, rests):
        bytes_, seconds, pairs = _sums(states, each)
        bound = seconds + rest.seconds(limit - bytes_)
        keep = (bytes_ + rest.least <= limit) & (bound <= known + _ROUNDING * abs(known))
        states = _pruned(bytes_[keep], seconds[keep], pairs[keep])
        trail.append(states.made)
    best = len(states.bytes) - 1  # the seconds descend
    total, time = int(states.bytes[best]), float(states.seconds[best])
    counts: list[tuple[int, ...]] = []
    for made, each in zip(reversed(trail), reversed(points)):
        before, at = made[best]
        counts.append(tuple(int(n) for n in each.made[at]))
        best = int(before)
    return Choice(tuple(reversed(counts)), total, time)


def smallest(items: Sequence[Item]) -> Choice:
    """The choice of the fewest bytes; of those, of the fewest seconds."""
    counts, bytes_, seconds = [], 0, 0.0
    for item in items:
        least = min(item.options, key=lambda o: (o.bytes, o.seconds))
        at = item.options.index(least)
        counts.append(tuple(item.count * (i == at) for i in range(len(item.options))))
        bytes_ += item.count * least.bytes
        seconds += item.count * least.seconds
    return Choice(tuple(counts), bytes_, seconds)


def _alike(item: Item, most: int) -> _Points:
    """All sums worth having of an item's `count` options of at most `most` bytes; made: how many are each."""
    columns = len(item.options)
    small = [i for i, o in enumerate(item.options) if o.bytes <= most]
    one = _pruned(
        np.array([item.options[i].bytes for i in small], np.int64),
        np.array([item.options[i].seconds for i in small]),
        np.eye(columns, dtype=np.int64)[small],
    )
    result = _Points(np.zeros(1, np.int64), np.zeros(1), np.zeros((1, columns), np.int64))
    count = item.count
    while count:  # by doubling
        if count & 1:
            result = _joined(result, one)
        count >>= 1
        one = _joined(one, one) if count else one
    return result


def _joined(a: _Points, b: _Points) -> _Points:
    bytes_, seconds, pairs = _sums(a, b)
    return _pruned(bytes_, seconds, a.made[pairs[:, 0]] + b.made[pairs[:, 1]])


def _sums(a: _Points, b: _Points) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.int64]]:
    """Every point of one with every point of the other, and which two they were."""
    i, j = (index.ravel() for index in np.indices((len(a.bytes), len(b.bytes))))
    return a.bytes[i] + b.bytes[j], a.seconds[i] + b.seconds[j], np.stack([i, j], 1)


def _pruned(bytes_: NDArray[np.int64], seconds: NDArray[np.float64], made: NDArray[np.int64]) -> _Points:
    """The points that no other beats in both."""
    order = np.lexsort((seconds, bytes_))
    bytes_, seconds, made = bytes_[order], seconds[order], made[order]
    before = np.minimum.accumulate(seconds)[:-1]
    keep = np.ones(len(seconds), bool)
    keep[1:] = seconds[1:] < before - _ROUNDING * np.abs(before)
    return _Points(bytes_[keep], seconds[keep], made[keep])


@dataclass(frozen=True)
class _Relaxed:
    """The fewest seconds for every number of bytes, where fractions of points may be taken."""

    least: int
    """Bytes below which there is nothing."""
    at: NDArray[np.float64]
    value: NDArray[np.float64]

    @classmethod
    def of(cls, points: Sequence[_Points]) -> _Relaxed:
        steps: list[tuple[float, int, float]] = []  # seconds a byte, bytes, seconds
        for each in points:
            hull = _hull(each)
            for low, high in itertools.pairwise(hull):
                more = int(each.bytes[high] - each.bytes[low])
                less = float(each.seconds[high] - each.seconds[low])
                steps.append((less / more, more, less))
        steps.sort()
        least = sum(int(each.bytes[0]) for each in points)
        slowest = sum(float(each.seconds[0]) for each in points)
        at = least + np.cumsum([0] + [step[1] for step in steps])
        return cls(least, at.astype(np.float64), slowest + np.cumsum([0.0] + [step[2] for step in steps]))

    def seconds(self, bytes_: NDArray[np.int64]) -> NDArray[np.float64]:
        result: NDArray[np.float64] = np.interp(bytes_.astype(np.float64), self.at, self.value)
        return result - _ROUNDING * np.abs(result)


def _hull(points: _Points) -> list[int]:
    """The lower convex hull, by index."""
    hull: list[int] = []
    for i in range(len(points.bytes)):
        while len(hull) > 1 and _above(points, hull[-2], hull[-1], i):
            hull.pop()
        hull.append(i)
    return hull


def _above(points: _Points, a: int, b: int, c: int) -> bool:
    """Whether b lies on the line from a to c, or above it."""
    width, height = points.bytes[c] - points.bytes[a], points.seconds[c] - points.seconds[a]
    return bool(
        (points.seconds[b] - points.seconds[a]) * width >= height * (points.bytes[b] - points.bytes[a])
    )


def _greedy(points: Sequence[_Points], limit: int) -> float:
    """Seconds of a choice that fits: steps along the hulls, the best first, as long as they fit."""
    at, room = [0] * len(points), limit - sum(int(each.bytes[0]) for each in points)
    steps = []
    for i, each in enumerate(points):
        hull = _hull(each)
        for low, high in itertools.pairwise(hull):
            more = int(each.bytes[high] - each.bytes[low])
            steps.append((float(each.seconds[high] - each.seconds[low]) / more, i, low, high, more))
    for _, i, low, high, more in sorted(steps):
        if at[i] == low and more <= room:
            at[i], room = high, room - more
    return sum(float(each.seconds[k]) for each, k in zip(points, at))
