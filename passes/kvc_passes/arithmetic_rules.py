"""Arithmetic on elements: numbers are computed, indices combined; floats of an index are affine."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from tvm import tirx

from .affine import Affine, affine_add, affine_divide, affine_multiply, affine_subtract, is_fractional
from .conditions import Unprovable
from .indices import int64


def _number(value: Any) -> Any:
    """An integer expression."""
    if isinstance(value, float):
        if is_fractional(value):
            raise Unprovable(f"mixes the number {value} with an index")
        return tirx.IntImm("int64", int(value))
    return int64(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float))


def _binary(
    function: Callable[[Any, Any], Any], fractional: Callable[[Any, Any], Any] | None = None
) -> Callable[[Any, Any], Any]:
    """`function` of numbers or integer expressions, `fractional` where a float depends on the index."""

    def rule(x: Any, y: Any) -> Any:
        if _is_number(x) and _is_number(y):
            return function(x, y)
        if fractional is not None and (is_fractional(x) or is_fractional(y)):
            return fractional(x, y)
        return function(_number(x), _number(y))

    return rule


def _divide(x: Any, y: Any) -> Any:
    """Of floats; of integers that are proved to be no negative numbers it is `floor_divide`."""
    if _is_number(x) and _is_number(y):
        if y == 0:
            raise Unprovable("divides by zero")
        if isinstance(x, int) and isinstance(y, int):  # ONNX drops the remainder
            return abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1)
        return x / y
    return affine_divide(x, y)


def _floor_divide(x: Any, y: Any) -> Any:
    if not _is_number(y) or y <= 0:
        raise Unprovable("divides by a value that depends on the position")
    return x // y if _is_number(x) else tirx.floordiv(_number(x), _number(y))


def _modulo(x: Any, y: Any) -> Any:
    if not _is_number(y) or y <= 0:
        raise Unprovable("divides by a value that depends on the position")
    return x % y if _is_number(x) else tirx.floormod(_number(x), _number(y))


def _power(x: Any, y: Any) -> Any:
    if _is_number(x) and _is_number(y):
        return float(x) ** float(y)
    raise Unprovable("takes a power of an index")


def _numeric(function: Callable[[float], float], what: str) -> Callable[[Any], Any]:
    def rule(x: Any) -> Any:
        if not _is_number(x):
            raise Unprovable(f"takes the {what} of an index")
        return function(x)

    return rule


def _floor(x: Any) -> Any:
    """Of a number, of an integer, or of an integer divided by one."""
    if _is_number(x):
        return float(math.floor(x)) if math.isfinite(x) else x
    if not isinstance(x, Affine):
        return x
    if len(x.terms) == 1 and x.constant == 0:
        value, factor = x.terms[0]
        divisor = round(1 / factor) if factor > 0 else 0
        if divisor > 0 and factor == 1 / divisor:
            return tirx.floordiv(int64(value), int64(divisor))
    raise Unprovable("rounds a value that depends on the position")


ARITHMETIC: dict[str, Callable[..., Any]] = {
    "add": _binary(lambda x, y: x + y, affine_add),
    "subtract": _binary(lambda x, y: x - y, affine_subtract),
    "multiply": _binary(lambda x, y: x * y, affine_multiply),
    "divide": _divide,
    "floor_divide": _floor_divide,
    "floor_mod": _modulo,
    "mod": _modulo,
    "power": _power,
    "maximum": _binary(lambda x, y: max(x, y) if _is_number(x) and _is_number(y) else tirx.max(x, y)),
    "minimum": _binary(lambda x, y: min(x, y) if _is_number(x) and _is_number(y) else tirx.min(x, y)),
    "negative": lambda x: -x if not is_fractional(x) or _is_number(x) else affine_multiply(x, -1.0),
    "cos": _numeric(math.cos, "cosine"),
    "sin": _numeric(math.sin, "sine"),
    "exp": _numeric(math.exp, "exponential"),
    "log": _numeric(math.log, "logarithm"),
    "sqrt": _numeric(math.sqrt, "root"),
    "floor": _floor,
}
