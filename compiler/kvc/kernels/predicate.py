"""Mask predicates, Python expressions over q, k and h, as conditions on vectors of int32."""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from typing import Any

from tvm import tirx

from .emit import Expr, lanes_of, splat

_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Lt: tirx.LT,
    ast.LtE: tirx.LE,
    ast.Gt: tirx.GT,
    ast.GtE: tirx.GE,
    ast.Eq: tirx.EQ,
    ast.NotEq: tirx.NE,
}
_SUMS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
}
_INT32 = range(-(2**31), 2**31)


def names(predicate: str) -> frozenset[str]:
    """Which of q, k and h a predicate reads. Raises ValueError if it is no predicate."""
    tree = _parse(predicate)
    _Vectors(predicate, {name: tirx.Var(name, "int32") for name in "qkh"}).condition(tree)
    return frozenset(node.id for node in ast.walk(tree) if isinstance(node, ast.Name)) & set("qkh")


def condition(predicate: str, values: Mapping[str, Expr]) -> Expr:
    """A predicate as a boolean expression.

    Args:
        predicate: `and`, `or`, `not`, comparisons (chained ones too), +, -, *, // and % as in Python (rounded
            down), min(...) and max(...) of integers; constants are ints, True and False. A divisor is a
            constant other than 0. Numbers are int32 and wrap.
        values: int32 expressions of `q`, `k` and `h`, all scalars or all vectors of the same lanes; names
            that the predicate does not read may be absent.

    Raises ValueError, with the part that it is about, for anything else.
    """
    return _Vectors(predicate, values).condition(_parse(predicate))


def _parse(predicate: str) -> ast.expr:
    try:
        return ast.parse(predicate.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"mask predicate {predicate!r} is not an expression: {error}") from None


class _Vectors:
    """Translates the nodes of one predicate."""

    def __init__(self, text: str, values: Mapping[str, Expr]) -> None:
        self.text, self.values = text, values
        self.lanes = max((lanes_of(v) for v in values.values()), default=1)

    def condition(self, node: ast.expr) -> Expr:
        """A boolean expression."""
        match node:
            case ast.Constant(value=bool(value)):
                return splat(tirx.const(value, "bool"), self.lanes)
            case ast.BoolOp(op=op, values=parts):
                join = tirx.And if isinstance(op, ast.And) else tirx.Or
                result, *rest = [self.condition(part) for part in parts]
                for part in rest:
                    result = join(result, part)
                return result
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return tirx.Not(self.condition(operand))
            case ast.Compare(left=left, ops=ops, comparators=others):
                return self._comparison(node, [left, *others], ops)
        raise self._refusal(node, "is no condition")

    def _comparison(self, node: ast.expr, operands: list[ast.expr], ops: list[ast.cmpop]) -> Expr:
        values = [self._number(operand) for operand in operands]
        result = None
        for op, a, b in zip(ops, values, values[1:], strict=False):
            if type(op) not in _COMPARISONS:
                raise self._refusal(node, "is no comparison of numbers")
            pair = _COMPARISONS[type(op)](a, b)
            result = pair if result is None else tirx.And(result, pair)
        return result

    def _number(self, node: ast.expr) -> Expr:
        """An int32 expression."""
        constant = self._constant(node)
        if constant is not None:
            return self._int(constant)
        match node:
            case ast.Name(id=name) if name in self.values:
                return self.values[name]
            case ast.UnaryOp(op=ast.USub() | ast.UAdd() as op, operand=operand):
                value = self._number(operand)
                return self._int(0) - value if isinstance(op, ast.USub) else value
            case ast.BinOp(left=left, op=ast.FloorDiv() | ast.Mod() as op, right=right):
                return self._quotient(node, self._number(left), isinstance(op, ast.Mod), right)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _SUMS:
                return _SUMS[type(op)](self._number(left), self._number(right))
            case ast.Call(func=ast.Name(id="min" | "max" as name), args=[_, _, *_] as args, keywords=[]):
                result, *rest = [self._number(arg) for arg in args]
                for arg in rest:
                    result = (tirx.Min if name == "min" else tirx.Max)(result, arg)
                return result
        raise self._refusal(node, "is no number")

    def _quotient(self, node: ast.expr, value: Expr, remainder: bool, by: ast.expr) -> Expr:
        divisor = self._constant(by)
        if not divisor:
            raise self._refusal(node, "divides by something else than a constant that is not 0")
        if divisor < 0:  # rounded down: a // -b is -a // b, and a % -b is -(-a % b)
            value = self._int(0) - value
        operation = tirx.floormod if remainder else tirx.floordiv
        result = operation(value, self._int(abs(divisor)))
        return self._int(0) - result if remainder and divisor < 0 else result

    def _constant(self, node: ast.expr) -> int | None:
        """The value of an expression of constants alone, else None."""
        match node:
            case ast.Constant(value=int(value)) if not isinstance(value, bool):
                if value not in _INT32:
                    raise self._refusal(node, "is more than 32 bits")
                return value
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                inner = self._constant(operand)
                return None if inner is None else -inner
        return None

    def _int(self, value: int) -> Expr:
        return splat(tirx.const(value, "int32"), self.lanes)

    def _refusal(self, node: ast.expr, reason: str) -> ValueError:
        part = ast.get_source_segment(self.text.strip(), node) or "part of it"
        return ValueError(f"mask predicate {self.text!r}: {part!r} {reason}")
