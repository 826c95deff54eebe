"""Mask predicates, Python expressions over q, k and h, as trees that a Triton function can unfold.

A tree is a tuple: an operation and its operands, which are trees; ("int", value) and ("bool", value) are
constants and ("q",), ("k",), ("h",) the variables.
"""

from __future__ import annotations

import ast
from functools import reduce
from typing import Any

from kvc.kernels import predicate as predicates

Tree = tuple[Any, ...]

_OPERATIONS: dict[type[ast.AST], str] = {
    ast.And: "and",
    ast.Or: "or",
    ast.Lt: "<",
    ast.LtE: "<=",
    ast.Gt: ">",
    ast.GtE: ">=",
    ast.Eq: "==",
    ast.NotEq: "!=",
    ast.Add: "+",
    ast.Sub: "-",
    ast.Mult: "*",
    ast.FloorDiv: "//",
    ast.Mod: "%",
}


def tree(predicate: str) -> Tree:
    """The tree of a predicate. Raises ValueError for what kernels.predicate.condition does not take."""
    predicates.names(predicate)
    return _tree(ast.parse(predicate.strip(), mode="eval").body)


def _tree(node: ast.expr) -> Tree:  # noqa: PLR0911 (a line a kind of node)
    match node:
        case ast.Constant(value=bool(value)):
            return ("bool", value)
        case ast.Constant(value=value):
            return ("int", value)
        case ast.Name(id=name):
            return (name,)
        case ast.BoolOp(op=op, values=parts):
            return _joined(_OPERATIONS[type(op)], [_tree(part) for part in parts])
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return ("not", _tree(operand))
        case ast.UnaryOp(op=op, operand=operand):
            inner = _tree(operand)
            if isinstance(op, ast.UAdd):
                return inner
            return ("int", -inner[1]) if inner[0] == "int" else ("-", ("int", 0), inner)
        case ast.Compare(left=left, ops=ops, comparators=others):
            values = [_tree(operand) for operand in (left, *others)]
            pairs = zip(ops, values, values[1:], strict=False)
            return _joined("and", [(_OPERATIONS[type(op)], a, b) for op, a, b in pairs])
        case ast.BinOp(left=left, op=op, right=right):
            return _binary(_OPERATIONS[type(op)], _tree(left), _tree(right))
        case ast.Call(func=ast.Name(id=name), args=arguments):
            return _joined(name, [_tree(a) for a in arguments])
    raise ValueError(f"{ast.unparse(node)!r} is no part of a predicate")


def _joined(operation: str, parts: list[Tree]) -> Tree:
    return reduce(lambda a, b: (operation, a, b), parts)


def _binary(operation: str, left: Tree, right: Tree) -> Tree:
    if operation not in ("//", "%") or right[1] > 0:
        return (operation, left, right[1]) if operation in ("//", "%") else (operation, left, right)
    # Rounded down: a // -b is -a // b, and a % -b is -(-a % b).
    result: Tree = (operation, ("-", ("int", 0), left), -right[1])
    return ("-", ("int", 0), result) if operation == "%" else result
