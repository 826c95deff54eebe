"""Symbolic indices and their bounds."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any

from tvm import tirx
from tvm.ir import Range
from tvm.sym import Analyzer
from tvm_ffi import structural_equal, structural_map

LARGEST = 1 << 31  # more tokens than any extent has
_NUMBERS = count()


def int64(value: Any) -> Any:
    """A Python int as an int64 immediate; expressions and bools unchanged."""
    return tirx.IntImm("int64", value) if isinstance(value, int) and not isinstance(value, bool) else value


def bind_index(analyzer: Analyzer, name: str, extent: Any) -> tirx.Var:
    """A fresh index 0 <= index < extent. Its name is its own: elements are remembered by such names."""
    var = tirx.Var(f"{name}_{next(_NUMBERS)}", "int64")
    analyzer.bind(var, Range(int64(0), int64(extent)), True)
    return var


def bind_extent(analyzer: Analyzer, extent: Any, least: int) -> None:
    """Tell the analyzer that a symbolic extent is at least `least`; constants need no telling."""
    if isinstance(extent, tirx.Var):
        analyzer.bind(extent, Range(int64(least), int64(LARGEST)), True)


def replaced(expression: Any, var: tirx.Var, value: Any) -> Any:
    """An index expression with `value` in the place of `var`; Python ints have no variables."""
    if isinstance(expression, int):
        return expression
    return structural_map(expression, (tirx.Var, lambda v: int64(value) if v.same_as(var) else v))


def divided(value: Any, extent: Any, prove: Callable[[Any], bool]) -> tuple[Any, Any]:
    """(value // extent, value % extent), without divisions where value is written as a * extent + b."""
    value, extent = int64(value), int64(extent)
    whole: Any = int64(0)
    rest: Any = int64(0)
    for term in _terms(value):
        times = _multiple(term, extent)
        if times is None:
            rest = rest + term
        else:
            whole = whole + times
    if not isinstance(extent, tirx.IntImm) and prove(tirx.And(rest >= 0, rest < extent)):
        return whole, rest
    return tirx.floordiv(value, extent), tirx.floormod(value, extent)


def _terms(value: Any) -> list[Any]:
    return [*_terms(value.a), *_terms(value.b)] if isinstance(value, tirx.Add) else [value]


def _multiple(term: Any, extent: Any) -> Any:
    """How often a term is the extent, None if it is not written as a multiple of it."""
    if structural_equal(term, extent):
        return int64(1)
    if isinstance(term, tirx.Mul):
        for factor, other in ((term.a, term.b), (term.b, term.a)):
            if structural_equal(factor, extent):
                return other
    return None
