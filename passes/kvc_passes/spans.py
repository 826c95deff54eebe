"""Interval arithmetic on values of a graph: what they may be at least and at most, in any rounding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from .conditions import Unprovable

_ROUNDING: Final = 2.0**-20
"""By which a float may be off, relatively: a few operations in float32."""
_WHOLE: Final = 1 << 24
"""Up to here float32 has every integer."""


@dataclass(frozen=True)
class Span:
    """What each of several numbers may be at least and at most; arrays of float64."""

    low: np.ndarray
    high: np.ndarray

    @staticmethod
    def of(value: Any, count: int = 1) -> Span:
        """So often the same number."""
        array = np.full(count, float(value))
        return Span(array, array)

    @property
    def exact(self) -> bool:
        return bool((self.low == self.high).all())

    def rounded(self) -> Span:
        """With what float32 may make of it."""
        low, high = (_ROUNDING * np.abs(end) + 1e-30 for end in (self.low, self.high))
        return Span(self.low - low, self.high + high)

    def kept_in(self, dtype: str) -> Span:
        """As integers of a type: any of them where one may not fit."""
        info = np.iinfo(dtype)
        fits = (self.low >= info.min) & (self.high < float(info.max) + 1)
        return Span(np.where(fits, self.low, info.min), np.where(fits, self.high, info.max))

    def cast(self, source: str, target: str) -> Span:
        """As numbers of the type `target`; both are bool, or integers and floats of at least 32 bits."""
        if target == "bool":
            surely, maybe = (self.low > 0) | (self.high < 0), (self.low != 0) | (self.high != 0)
            return Span(surely.astype(float), maybe.astype(float))
        if "int" in target:
            return Span(np.trunc(self.low), np.trunc(self.high)).kept_in(target)
        if source == target:
            return self
        loose, inexact = self.rounded(), 0 if "float" in source else _WHOLE
        return Span(
            np.where(np.abs(self.low) > inexact, loose.low, self.low),
            np.where(np.abs(self.high) > inexact, loose.high, self.high),
        )


def _monotone(function: Callable[[Any], Any]) -> Callable[[Span], Span]:
    return lambda x: Span(function(x.low), function(x.high))


def _products(x: Span, y: Span, function: Callable[[Any, Any], Any]) -> Span:
    """Of a product or a quotient: its ends are among those of the ends."""
    ends = [function(a, b) for a in (x.low, x.high) for b in (y.low, y.high)]
    return Span(np.minimum.reduce(ends), np.maximum.reduce(ends))


def _quotient(x: Span, y: Span) -> Span:
    if ((y.low <= 0) & (y.high >= 0)).any():
        raise Unprovable("divides by what may be 0")
    return _products(x, y, np.divide)


def _logarithm(x: Span) -> Span:
    """Where a number is not above 0, anything: another choice has to be taken there."""
    good = x.low > 0
    low = np.where(good, np.log(np.where(good, x.low, 1)), -np.inf)
    high = np.where(good, np.log(np.where(good, x.high, 1)), np.inf)
    return Span(low, high)


def _absolute(x: Span) -> Span:
    crosses = (x.low < 0) & (x.high > 0)
    a, b = np.abs(x.low), np.abs(x.high)
    return Span(np.where(crosses, 0, np.minimum(a, b)), np.maximum(a, b))


def _less(x: Span, y: Span) -> Span:
    return Span((x.high < y.low).astype(float), (x.low < y.high).astype(float))


def _less_equal(x: Span, y: Span) -> Span:
    return Span((x.high <= y.low).astype(float), (x.low <= y.high).astype(float))


def _where(condition: Span, then: Span, other: Span) -> Span:
    sure, never = condition.low > 0, condition.high <= 0
    low = np.where(sure, then.low, np.where(never, other.low, np.minimum(then.low, other.low)))
    high = np.where(sure, then.high, np.where(never, other.high, np.maximum(then.high, other.high)))
    return Span(low, high)


OPERATIONS: Final[dict[str, Callable[..., Span]]] = {
    "add": lambda x, y: Span(x.low + y.low, x.high + y.high),
    "subtract": lambda x, y: Span(x.low - y.high, x.high - y.low),
    "multiply": lambda x, y: _products(x, y, np.multiply),
    "divide": _quotient,
    "negative": lambda x: Span(-x.high, -x.low),
    "abs": _absolute,
    "log": _logarithm,
    "minimum": lambda x, y: Span(np.minimum(x.low, y.low), np.minimum(x.high, y.high)),
    "maximum": lambda x, y: Span(np.maximum(x.low, y.low), np.maximum(x.high, y.high)),
    "floor": _monotone(np.floor),
    "ceil": _monotone(np.ceil),
    "less": _less,
    "less_equal": _less_equal,
    "greater": lambda x, y: _less(y, x),
    "greater_equal": lambda x, y: _less_equal(y, x),
    "where": _where,
}
_NEVER_LARGER: Final = ("minimum", "maximum", "where")
"""What they compute is one of their operands."""


def computed(name: str, dtype: str, *operands: Span) -> Span:
    """What an operation of `OPERATIONS` computes in a type: bool, or of at least 32 bits."""
    result = OPERATIONS[name](*operands)
    if "float" in dtype:
        return result.rounded()
    return result if dtype == "bool" or name in _NEVER_LARGER else result.kept_in(dtype)
