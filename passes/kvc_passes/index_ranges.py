"""The values that an index takes while variables run over ranges: interval arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from tvm import tirx
from tvm.ir import Call

from .graph import static

Range = tuple[int, int]
"""From the first up to the second, which is not in it."""
Bound = Callable[[Sequence[Range]], Range]
"""Given the ranges of the variables, by number, the range of an index."""

_ANY: Final = (-(1 << 62), 1 << 62)


def bound(index: Any, number: Mapping[Any, int]) -> Bound:
    """The range of an index expression with the variables `number`; all numbers where nothing is known."""
    value, place = static(index), number.get(index) if isinstance(index, tirx.Var) else None
    if value is not None:
        return lambda _, at=value: (at, at + 1)  # type: ignore[misc]
    if place is not None:
        return lambda domain: domain[place]
    if isinstance(index, tirx.Cast) and _whole_numbers(index) and _whole_numbers(index.value):
        return bound(index.value, number)
    if isinstance(index, Call) and getattr(index.op, "name", "") == "tirx.if_then_else":
        yes, no = (bound(index.args[i], number) for i in (1, 2))
        return lambda domain: _around(yes(domain), no(domain))
    return _of_two(index, number)


def _of_two(index: Any, number: Mapping[Any, int]) -> Bound:
    """The range of a sum, a quotient, and the like."""
    rule, divide = _RULES.get(type(index)), _QUOTIENTS.get(type(index))
    if (rule is None and divide is None) or not _whole_numbers(index):
        return lambda _: _ANY
    a, b = bound(index.a, number), bound(index.b, number)
    if rule is not None:
        return lambda domain: rule(a(domain), b(domain))
    divisor = static(index.b)
    if divide is None or divisor is None or divisor <= 0:
        return lambda _: _ANY
    return lambda domain: divide(a(domain), divisor)


def _whole_numbers(value: Any) -> bool:
    """Whether an expression is of a type whose range indices do not leave."""
    return str(value.ty.dtype) in ("int32", "int64")


def _around(x: Range, y: Range) -> Range:
    return min(x[0], y[0]), max(x[1], y[1])


def _times(x: Range, y: Range) -> Range:
    corners = [a * b for a in (x[0], x[1] - 1) for b in (y[0], y[1] - 1)]
    return min(corners), max(corners) + 1


def _remainder(x: Range, divisor: int) -> Range:
    low, high = x[0], x[1] - 1
    if low // divisor == high // divisor:
        return low % divisor, high % divisor + 1
    return 0, divisor


def _signed_remainder(x: Range, divisor: int) -> Range:
    return _remainder(x, divisor) if x[0] >= 0 else (1 - divisor, divisor)


def _toward_zero(value: int, divisor: int) -> int:
    return value // divisor if value >= 0 else -(-value // divisor)


_RULES: Final[dict[Any, Callable[[Range, Range], Range]]] = {
    tirx.Add: lambda x, y: (x[0] + y[0], x[1] + y[1] - 1),
    tirx.Sub: lambda x, y: (x[0] - y[1] + 1, x[1] - y[0]),
    tirx.Mul: _times,
    tirx.Min: lambda x, y: (min(x[0], y[0]), min(x[1], y[1])),
    tirx.Max: lambda x, y: (max(x[0], y[0]), max(x[1], y[1])),
}
_QUOTIENTS: Final[dict[Any, Callable[[Range, int], Range]]] = {
    tirx.FloorDiv: lambda x, divisor: (x[0] // divisor, (x[1] - 1) // divisor + 1),
    tirx.FloorMod: _remainder,
    tirx.Div: lambda x, divisor: (_toward_zero(x[0], divisor), _toward_zero(x[1] - 1, divisor) + 1),
    tirx.Mod: _signed_remainder,
}
