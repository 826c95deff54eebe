"""Float elements that depend on the index: sums of index expressions times numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import tirx

from .conditions import Unprovable

_LARGEST = 2.0**31


@dataclass(frozen=True)
class Affine:
    """constant + sum of number * index expression; the floats that masks and biases are made of."""

    constant: float
    terms: tuple[tuple[Any, float], ...]

    @staticmethod
    def of(value: Any) -> Affine:
        """A number, an index expression, or what is an Affine already."""
        if isinstance(value, Affine):
            return value
        if isinstance(value, (bool, int, float)):
            return Affine(float(value), ())
        return Affine(0.0, ((value, 1.0),))

    def plus(self, other: Affine, factor: float = 1.0) -> Affine:
        scaled = tuple((e, c * factor) for e, c in other.terms)
        return Affine(self.constant + factor * other.constant, self.terms + scaled)

    def times(self, factor: float) -> Affine:
        return Affine(self.constant * factor, tuple((e, c * factor) for e, c in self.terms))


def is_fractional(value: Any) -> bool:
    """Whether arithmetic with `value` leaves the integers: also numbers that no index can reach."""
    return isinstance(value, Affine) or (
        isinstance(value, float) and not (value.is_integer() and abs(value) < _LARGEST)
    )


def affine_add(x: Any, y: Any) -> Any:
    return Affine.of(x).plus(Affine.of(y))


def affine_subtract(x: Any, y: Any) -> Any:
    return Affine.of(x).plus(Affine.of(y), -1.0)


def affine_multiply(x: Any, y: Any) -> Any:
    a, b = Affine.of(x), Affine.of(y)
    if not b.terms:
        return a.times(b.constant)
    if not a.terms:
        return b.times(a.constant)
    raise Unprovable("multiplies two values that depend on the position")


def affine_divide(x: Any, y: Any) -> Any:
    divisor = Affine.of(y)
    if divisor.terms or divisor.constant == 0:
        raise Unprovable("divides by a value that depends on the position")
    return Affine.of(x).times(1 / divisor.constant)


def slope(before: Any, after: Any, simplify: Any) -> float | None:
    """after - before, if that is a number: two elements at neighbouring indices."""
    a, b = Affine.of(before), Affine.of(after)
    if len(a.terms) != len(b.terms):
        return None
    total = b.constant - a.constant
    for (old, factor), (new, other) in zip(a.terms, b.terms):
        difference = simplify(new - old)
        if isinstance(difference, tirx.IntImm):
            difference = int(difference.value)
        if not isinstance(difference, int) or factor != other:
            return None
        total += factor * difference
    return total
