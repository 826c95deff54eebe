"""What the elements of an index may be at least and at most, in requests of up to some length."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np
from tvm import relax, tirx
from tvm.ir import GenericConst

from kvc_passes.conditions import Unprovable
from kvc_passes.facts import EncoderInput
from kvc_passes.graph import Graph, dims, op_name, operands, same_shape, scalar, static
from kvc_passes.place_arena import evaluate
from kvc_passes.spans import OPERATIONS, Span, computed

from .frontend.roles import SEQUENCE

_MOVES: Final = (
    *("reshape", "permute_dims", "expand_dims", "squeeze", "broadcast_to", "strided_slice", "flip"),
    *("take", "gather_nd", "gather_elements"),
)
"""Their elements are some of those of the first operand."""

_FLOATS: Final = float(np.finfo(np.float32).max)


class Spans:
    """Of every value one Span, of all its elements in requests of 1 .. `extent`.

    Args:
        given: the function's inputs; masks are ones.
        known: what is known of the elements of some values besides.
    """

    def __init__(
        self,
        graph: Graph,
        given: Mapping[relax.Var, EncoderInput],
        extent: int,
        known: Mapping[relax.Var, Span] | None = None,
        outside: Spans | None = None,
    ) -> None:
        self.graph, self.given, self.extent, self.known = graph, given, extent, known or {}
        self.outside = outside or self
        """Without what is known of the same elements."""
        self._memo: dict[relax.Var, Span] = {}

    def of(self, value: relax.Expr) -> Span:
        """Raises Unprovable for what has no known bounds."""
        value = self.graph.alias(value)
        if isinstance(value, GenericConst):
            array = value.value.numpy().astype(np.float64)
            return _between(array.min(initial=np.inf), array.max(initial=-np.inf))
        if not isinstance(value, relax.Var):
            raise Unprovable("has no known bounds")
        if value not in self._memo:
            self._memo[value] = self._of_var(value)
        return self._memo[value]

    def _of_var(self, var: relax.Var) -> Span:
        dtype = str(var.ty.dtype.dtype)
        if var in self.known:
            return self.known[var]
        if var in self.given:
            return self._of_input(var, dtype)
        if var not in self.graph.definitions or dtype not in ("bool", "int32", "int64", "float32", "float64"):
            raise Unprovable(f"is computed in {dtype}, or from an input of which nothing is known")
        try:
            return self._of_call(var, self.graph.definitions[var], dtype)
        except Unprovable:
            if dtype == "bool":
                return _between(0, 1)
            if op_name(self.graph.definitions[var]) == "astype" and "int" in dtype:
                return _all(dtype)
            raise

    def _of_input(self, var: relax.Var, dtype: str) -> Span:
        facts = self.given[var]
        if facts.mask:
            return Span.of(1)
        if facts.ids is not None:
            return _between(0, facts.ids - 1)
        if "int" in dtype:
            return _all(dtype)
        raise Unprovable(f"is computed from the input '{var.name}'")

    def _of_call(self, var: relax.Var, call: Any, dtype: str) -> Span:
        name = op_name(call)
        if isinstance(call, relax.TupleGetItem):
            parts = self.graph.resolve(call.tuple_value)
            if op_name(parts) == "split":
                return self.outside.of(parts.args[0])
        if name in _MOVES:
            return self.outside.of(call.args[0])
        if name == "astype":
            return self._at_same(call.args[0], var).cast(str(call.args[0].ty.dtype.dtype), dtype)
        if name == "where":
            return self._where(var, call)
        if name in OPERATIONS and (name != "divide" or "float" in dtype):
            given = [self._at_same(o, var) for o in call.args]
            if name == "log" and given[0].low.min() < 0:
                raise Unprovable("takes the logarithm of what may be below 0")
            return _finite(computed(name, dtype, *given))
        if name not in _RULES:
            raise Unprovable(f"is computed by {name or 'an operation'}, whose results have no known bounds")
        found = _RULES[name](self.outside, call)
        return found.kept_in(dtype) if "int" in dtype else found

    def _at_same(self, operand: relax.Expr, var: relax.Var) -> Span:
        """Of an operand, of the same element where it has the result's shape."""
        return (self if same_shape(dims(operand), dims(var)) else self.outside).of(operand)

    def _where(self, var: relax.Var, call: relax.Call) -> Span:
        """Each choice with what the condition says of the number that it compares."""
        found = []
        for operand, known in zip(call.args[1:], self._learned(var, call.args[0])):
            if known is None:
                found.append(self._at_same(operand, var))
                continue
            value, span = known
            if span.low.max() > span.high.min():
                continue  # it is never chosen
            inside = Spans(self.graph, self.given, self.extent, {**self.known, value: span}, self.outside)
            found.append(inside._at_same(operand, var))
        return _hull(found)

    def _learned(self, var: relax.Var, condition: relax.Expr) -> tuple[Any, Any]:
        """Where the condition holds, and where it does not: a value and its elements there."""
        call = self.graph.resolve(condition)
        name = op_name(call)
        if name not in _COMPARISONS:
            return None, None
        value, number = self.graph.alias(call.args[0]), scalar(call.args[1], self.graph)
        whole = "int" in str(call.args[0].ty.dtype.dtype)  # no comparison says anything of what is no number
        if not isinstance(value, relax.Var) or number is None or not number.is_integer() or not whole:
            return None, None
        if not same_shape(dims(value), dims(var)):
            return None, None
        span, least = self.of(value), number + _COMPARISONS[name][1]
        below, above = (value, _cut(span, high=least - 1)), (value, _cut(span, low=least))
        return (below, above) if _COMPARISONS[name][0] == "below" else (above, below)

    def most(self, dim: Any) -> int:
        """The largest that an extent is, which does not shrink with a request's length."""
        return evaluate(dim, {SEQUENCE: self.extent})

    def between(self, number: Any) -> Span:
        """Of an index expression. Raises Unprovable where it may shrink."""
        if not grows(number):
            raise Unprovable(f"is computed from {number}, which has no known bounds")
        return _between(evaluate(number, {SEQUENCE: 1}), self.most(number))


_COMPARISONS: Final = {
    "less": ("below", 0),
    "less_equal": ("below", 1),
    "greater": ("above", 1),
    "greater_equal": ("above", 0),
}
"""On which side of its bound the condition holds; the least number above it, from the compared one on."""


def grows(dim: Any) -> bool:
    """Whether an extent is never smaller for a longer input: then it is largest for the longest."""
    number = static(dim)
    if number is not None:
        return number >= 0
    if isinstance(dim, tirx.Var):
        return str(dim.name) == SEQUENCE
    kind = type(dim)
    if kind is tirx.Add:  # a negative constant may stand on the right
        return grows(dim.a) and (grows(dim.b) or static(dim.b) is not None)
    if kind is tirx.Sub:
        return grows(dim.a) and static(dim.b) is not None
    if kind is tirx.FloorDiv:
        return grows(dim.a) and (static(dim.b) or 0) > 0
    return kind in (tirx.Mul, tirx.Max, tirx.Min) and grows(dim.a) and grows(dim.b)


def _between(low: float, high: float) -> Span:
    return Span(np.array([float(low)]), np.array([float(high)]))


def _all(dtype: str) -> Span:
    info = np.iinfo(dtype)
    return _between(info.min, info.max)


def _cut(span: Span, *, low: float = -np.inf, high: float = np.inf) -> Span:
    return Span(np.maximum(span.low, low), np.minimum(span.high, high))


def _hull(spans: list[Span]) -> Span:
    return _between(np.min([s.low for s in spans]), np.max([s.high for s in spans]))


def _finite(span: Span) -> Span:
    """Raises Unprovable where a float may be infinite: what is computed from it may be no number."""
    if not (np.abs(span.low).max() < _FLOATS and np.abs(span.high).max() < _FLOATS):
        raise Unprovable("is computed from what may be infinite")
    return span


def _arange(spans: Spans, call: relax.Call) -> Span:
    start, step = call.args[0], static(call.args[2])
    if step is None:
        raise Unprovable("is computed by arange with an unknown step")
    begin, last = spans.between(start), (spans.most(dims(call)[0]) - 1) * step
    return Span(begin.low + min(last, 0), begin.high + max(last, 0))


def _total(spans: Spans, call: relax.Call) -> Span:
    """Of sums, and of running ones: of up to as many numbers as there are along the axes."""
    shape, axis = dims(call.args[0]), call.attrs.axis
    if "int" not in str(call.ty.dtype.dtype):
        raise Unprovable("is computed by a sum of floats")
    if axis is None:
        axes = list(range(len(shape)))
    else:
        axes = [int(a) for a in (axis if op_name(call) == "sum" else [axis])]
    count = float(np.prod([spans.most(shape[a]) for a in axes]))
    one = spans.of(call.args[0])
    least = 0 if op_name(call) == "cumsum" and bool(call.attrs.exclusive) else np.inf
    return Span(
        np.minimum(np.minimum(one.low, one.low * count), least),
        np.maximum(np.maximum(one.high, one.high * count), -least),
    )


def _place(spans: Spans, call: relax.Call) -> Span:
    """Of the largest or smallest element."""
    if call.attrs.axis is None:
        raise Unprovable(f"is computed by {op_name(call)} of all elements")
    return _between(0, spans.most(dims(call.args[0])[int(call.attrs.axis)]) - 1)


def _shape(spans: Spans, call: relax.Call) -> Span:
    shape = spans.graph.resolve(call.args[0])
    values = shape.values if isinstance(shape, relax.ShapeExpr) else shape.ty.values
    return _hull([spans.between(value) for value in values])


_RULES: Final[dict[str, Callable[[Spans, Any], Span]]] = {
    "arange": _arange,
    "cumsum": _total,
    "sum": _total,
    "argmax": _place,
    "argmin": _place,
    "shape_to_tensor": _shape,
    "full": lambda spans, call: spans.of(call.args[1]),
    "full_like": lambda spans, call: spans.of(call.args[1]),
    "zeros": lambda spans, call: Span.of(0),
    "ones": lambda spans, call: Span.of(1),
    "concat": lambda spans, call: _hull([spans.of(o) for o in operands(call)]),
    "tril": lambda spans, call: _hull([Span.of(0), spans.of(call.args[0])]),
    "triu": lambda spans, call: _hull([Span.of(0), spans.of(call.args[0])]),
}
