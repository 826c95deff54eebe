"""Case distinctions inside an element: values that depend on a condition of the index."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from tvm import tirx


class Unprovable(Exception):
    """An element has no expression; the message says which operation or input stands in the way."""


class Choice:
    """`when` ? `then` : `other`, for elements that are not plain integers."""

    def __init__(self, when: Any, then: Any, other: Any) -> None:
        self.when, self.then, self.other = when, then, other


def lift(function: Callable[..., Any], *values: Any) -> Any:
    """Apply `function` below the choices of its arguments."""
    for position, value in enumerate(values):
        if isinstance(value, Choice):
            before, after = values[:position], values[position + 1 :]
            return choose(
                value.when,
                lift(function, *before, value.then, *after),
                lift(function, *before, value.other, *after),
            )
    return function(*values)


def choose(when: Any, then: Any, other: Any) -> Any:
    """A choice, decided at once where its condition is a constant."""
    if isinstance(when, Choice):
        return choose(when.when, choose(when.then, then, other), choose(when.other, then, other))
    if isinstance(when, (bool, np.bool_)):
        return then if when else other
    if isinstance(when, tirx.IntImm):
        return then if when.value else other
    if isinstance(then, (int, float)) and isinstance(other, (int, float)) and then == other:
        return then
    return Choice(when, then, other)


def as_condition(value: Any, true: Callable[[Any], bool] = bool) -> Any:
    """A boolean element as one condition without choices. `true` decides constants that are no conditions."""
    if isinstance(value, Choice):
        then, other = as_condition(value.then, true), as_condition(value.other, true)
        if isinstance(then, bool) and isinstance(other, bool):
            return (value.when if then else negate(value.when)) if then != other else then
        return either(both(value.when, then), both(negate(value.when), other))
    if isinstance(value, (bool, np.bool_, int, float)):
        return true(value)
    return value


def both(a: Any, b: Any) -> Any:
    if isinstance(a, bool):
        return b if a else False
    if isinstance(b, bool):
        return a if b else False
    return tirx.And(a, b)


def either(a: Any, b: Any) -> Any:
    if isinstance(a, bool):
        return True if a else b
    if isinstance(b, bool):
        return True if b else a
    return tirx.Or(a, b)


def negate(a: Any) -> Any:
    return (not a) if isinstance(a, bool) else tirx.Not(a)


def is_condition(value: Any) -> bool:
    """Whether a value is a boolean tirx expression."""
    return str(getattr(getattr(value, "ty", None), "dtype", "")) == "bool"
