"""Reading a Relax dataflow function as a graph: definitions, users, operators, dependence."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import tvm
from tvm import relax
from tvm_ffi import structural_equal


class Graph:
    """Definitions and users of one Relax function whose body is a straight line of bindings."""

    def __init__(self, function: relax.Function) -> None:
        self.function = function
        self.definitions: dict[relax.Var, relax.Expr] = {}
        self.users: dict[relax.Var, list[relax.Var]] = defaultdict(list)
        self.order: list[relax.Var] = []
        for block in function.body.blocks:
            for binding in block.bindings:
                self.definitions[binding.var] = binding.value
                self.order.append(binding.var)
                for operand in operands(binding.value):
                    if isinstance(operand, relax.Var):
                        self.users[operand].append(binding.var)

    def resolve(self, value: relax.Expr) -> relax.Expr:
        """The expression that defines `value`; parameters and constants are their own."""
        while isinstance(value, relax.Var) and value in self.definitions:
            value = self.definitions[value]
        return value

    def alias(self, value: relax.Expr) -> relax.Expr:
        """`value` with plain renamings (y = x) removed."""
        while isinstance(value, relax.Var) and isinstance(self.definitions.get(value), relax.Var):
            value = self.definitions[value]
        return value

    def reachable_from(self, sources: Iterable[relax.Var]) -> set[relax.Var]:
        """Every variable that depends on one of `sources` (themselves included)."""
        found = set(sources)
        for var in self.order:
            if any(isinstance(o, relax.Var) and o in found for o in operands(self.definitions[var])):
                found.add(var)
        return found

    def ancestors(self, values: Iterable[relax.Expr]) -> set[relax.Var]:
        """Every variable that one of `values` depends on (themselves included)."""
        found: set[relax.Var] = set()
        stack = list(values)
        while stack:
            value = stack.pop()
            if isinstance(value, relax.Var) and value not in found:
                found.add(value)
                stack.extend(operands(self.definitions[value]) if value in self.definitions else ())
        return found


@lru_cache(maxsize=2)
def graph_of(function: relax.Function) -> Graph:
    """The graph of a function; the last ones are kept, since passes and `rebuild` read the same function."""
    return Graph(function)


def operands(value: relax.Expr) -> list[relax.Expr]:
    """Operands of a binding's value, tuples flattened."""
    if isinstance(value, relax.Call):
        found: list[relax.Expr] = []
        for argument in value.args:
            found.extend(operands(argument) if isinstance(argument, relax.Tuple) else [argument])
        return found
    if isinstance(value, relax.Tuple):
        return [
            o
            for field in value.fields
            for o in (operands(field) if isinstance(field, relax.Tuple) else [field])
        ]
    if isinstance(value, relax.TupleGetItem):
        return [value.tuple_value]
    return [value] if isinstance(value, relax.Var) else []


def numbers(value: relax.Expr) -> list[relax.Expr]:
    """The integers among a call's arguments, such as bounds of a range; no shapes of results."""
    parts = operands(value) if isinstance(value, relax.Call) else []
    return [p for p in parts if isinstance(getattr(p, "ty", None), tvm.ir.PrimType)]


def op_name(value: relax.Expr) -> str:
    """`add` for a call of relax.add, the symbol for an extern call, "" for anything else."""
    if not isinstance(value, relax.Call):
        return ""
    if isinstance(value.op, relax.ExternFunc):
        return str(value.op.global_symbol)
    name = getattr(value.op, "name", "")
    if name == "relax.call_pure_packed":
        return str(value.args[0].global_symbol)
    return str(name).removeprefix("relax.").removeprefix("nn.")


_FOLDED: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "divide": np.divide,
    "multiply": np.multiply,
    "negative": np.negative,
    "power": np.power,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "sqrt": np.sqrt,
    "subtract": np.subtract,
}


def scalar(value: relax.Expr, graph: Graph | None = None) -> float | None:
    """The value of a constant with one element, or (given the graph) of arithmetic on such; else None."""
    value = value if graph is None else graph.resolve(value)
    if isinstance(value, tvm.ir.GenericConst):
        array = value.value.numpy()
        return float(array.reshape(-1)[0]) if array.size == 1 else None
    name = op_name(value)
    if graph is not None and name in ("reshape", "squeeze", "expand_dims"):
        return scalar(value.args[0], graph)
    if graph is not None and name == "astype" and "float" in str(value.attrs.dtype):
        return scalar(value.args[0], graph)
    if graph is not None and name in _FOLDED:
        known = [scalar(a, graph) for a in value.args]
        return None if None in known else float(_FOLDED[name](*known))
    return None


def dims(value: relax.Expr) -> list[tvm.ir.PrimExpr]:
    """Dimensions of a tensor, [] for scalars and values of unknown shape."""
    shape = getattr(value.ty, "shape", None)
    return [] if shape is None else list(shape.values)


def aligned(operand: relax.Expr, index: Sequence[Any]) -> list[Any]:
    """The index into an operand that was broadcast to the rank of `index`."""
    shape = dims(operand)
    rest = list(index)[len(index) - len(shape) :]
    return [0 if static(d) == 1 else i for d, i in zip(shape, rest)]


def same_shape(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two lists of dimensions are written alike."""
    return len(a) == len(b) and all(structural_equal(x, y) for x, y in zip(a, b))


def static(dim: object) -> int | None:
    """A dimension that is known at compile time."""
    return int(dim.value) if isinstance(dim, tvm.tirx.IntImm) else None
