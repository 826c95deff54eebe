"""Mask predicates as text: a Python expression over the ints q (position), k (key position) and h (head)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from tvm import tirx

from .conditions import Unprovable

CAUSAL = "k <= q"

_INFIX = {
    tirx.Add: "+",
    tirx.Sub: "-",
    tirx.Mul: "*",
    tirx.FloorDiv: "//",
    tirx.FloorMod: "%",
    tirx.LT: "<",
    tirx.LE: "<=",
    tirx.GT: ">",
    tirx.GE: ">=",
    tirx.EQ: "==",
    tirx.NE: "!=",
    tirx.And: "and",
    tirx.Or: "or",
}
_CALLS = {tirx.Min: "min", tirx.Max: "max"}


def to_text(value: Any, names: Mapping[Any, str]) -> str:
    """A tirx expression as Python.

    Raises:
        Unprovable: it depends on a variable that `names` does not have, or on an operator without a spelling.
    """
    if isinstance(value, tirx.Not):
        return f"(not {to_text(value.a, names)})"
    if type(value) in _INFIX:
        return f"({to_text(value.a, names)} {_INFIX[type(value)]} {to_text(value.b, names)})"
    if type(value) in _CALLS:
        return f"{_CALLS[type(value)]}({to_text(value.a, names)}, {to_text(value.b, names)})"
    return to_text(value.value, names) if isinstance(value, tirx.Cast) else _leaf(value, names)


def _leaf(value: Any, names: Mapping[Any, str]) -> str:
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, tirx.IntImm):
        boolean = str(getattr(value.ty, "dtype", "")) == "bool"
        return str(bool(value.value)) if boolean else str(int(value.value))
    if not isinstance(value, tirx.Var):
        raise Unprovable(f"has the form {type(value).__name__}, which a predicate cannot have")
    for var, name in names.items():
        if var.same_as(value):
            return name
    raise Unprovable(f"depends on {value.name}")


def holds(text: str, q: int, k: int, h: int = 0) -> bool:
    """The predicate at one place. `text` is what `to_text` made."""
    return bool(eval(text, {"__builtins__": {}, "min": min, "max": max}, {"q": q, "k": k, "h": h}))


def counter_example(text: str, claim: str, heads: int = 1, largest: int = 40) -> tuple[int, int] | None:
    """A place (q, k) where the predicates differ, among small positions; None if there is none."""
    for q, k in itertools.product(range(largest), repeat=2):
        if any(holds(text, q, k, h) != holds(claim, q, k, h) for h in range(heads)):
            return q, k
    return None
