"""Symbolic indices and their bounds."""

from __future__ import annotations

from itertools import count
from typing import Any

from tvm import tirx
from tvm.ir import Range
from tvm.sym import Analyzer
from tvm_ffi import structural_map

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
