"""Parts of a function that run for some of its tokens after another, written as kernel calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from tvm import relax, tirx
from tvm.ir import GlobalVar, PrimType

from .flatten_tokens import ROWS
from .graph import dims
from .indices import replaced
from .rebuild import substitute

TOKENS: Final = ROWS
"""The symbol of the number of tokens of a call."""


@dataclass(frozen=True)
class Segment:
    """Bindings of a function, by number, whose kernel calls run for one slice of the tokens after another."""

    first: int
    last: int
    """That of the last call."""
    weights: int = 0
    """Bytes that its calls read for every slice."""
    unit: int = 1
    """Slices are multiples of so many tokens: their rows then begin where kernels may load vectors."""

    def holds(self, step: int) -> bool:
        return self.first <= step <= self.last


def is_kernel_call(value: relax.Expr) -> bool:
    """Whether a binding runs a kernel."""
    return isinstance(value, relax.Call) and isinstance(value.op, GlobalVar)


def slices(tokens: int, rows: int) -> int:
    """How many slices of `rows` tokens there are."""
    return -(-tokens // rows)


View = Callable[[relax.Var, int, relax.ShapeExpr], relax.Expr]
"""Of a temporary, or a view of one, the tensor of the slice of that number, with its shape."""


class SliceWriter:
    """Writes the calls of segments of a function of at most `bound` tokens, slice by slice.

    The calls of a slice that begins behind the last token of a call are skipped.
    """

    def __init__(self, builder: relax.BlockBuilder, function: relax.Function, bound: int, rows: int) -> None:
        self.builder, self.rows = builder, rows
        self.tokens = symbol(function)
        self.count = slices(bound, rows)
        self._conditions: dict[int, relax.Expr] = {}

    def write(self, calls: Sequence[relax.Call], view: View, values: dict[relax.Var, relax.Expr]) -> None:
        """The calls for every slice; `values`: by what variables are replaced that have no tokens."""
        for number in range(self.count):
            part = [self._sliced(call, number, view, values) for call in calls]
            if number == 0:
                for call in part:
                    self.builder.emit(call)
                continue
            nothing = relax.TupleType([])
            bindings = [relax.VarBinding(relax.Var("_", nothing), call) for call in part]
            self.builder.emit(relax.If(self._condition(number), _branch(bindings), _branch([])))

    def _sliced(
        self, call: relax.Call, number: int, view: View, values: dict[relax.Var, relax.Expr]
    ) -> relax.Call:
        count = self.length(number)
        given = []
        for argument in call.args:
            if isinstance(argument.ty, PrimType):
                given.append(replaced(argument, self.tokens, count))
            elif has_tokens(argument):
                shape = [replaced(dim, self.tokens, count) for dim in dims(argument)]
                given.append(view(argument, number, relax.ShapeExpr(shape)))
            else:
                given.append(substitute(argument, values))
        return relax.Call(call.op, given, call.attrs, call.ty_args)

    def length(self, number: int) -> Any:
        """The tokens of a slice."""
        rows = tirx.IntImm("int64", self.rows)
        if number == 0:
            return tirx.Min(self.tokens, rows)
        return tirx.Max(tirx.Min(self.tokens - number * self.rows, rows), tirx.IntImm("int64", 0))

    def _condition(self, number: int) -> relax.Expr:
        if number not in self._conditions:
            there = relax.prim_value(self.tokens > number * self.rows)
            self._conditions[number] = self.builder.emit(there)
        return self._conditions[number]


def symbol(function: relax.Function) -> tirx.Var:
    """The number of tokens of a call."""
    return next(d for p in function.params for d in dims(p) if isinstance(d, tirx.Var) and d.name == TOKENS)


def has_tokens(value: relax.Expr) -> bool:
    """Whether the extent of an axis depends on the number of tokens."""
    found: list[Any] = list(dims(value))
    while found:
        dim = found.pop()
        if isinstance(dim, tirx.Var):
            if dim.name == TOKENS:
                return True
        else:
            found += [getattr(dim, name) for name in ("a", "b") if hasattr(dim, name)]
    return False


def _branch(bindings: Sequence[relax.Binding]) -> relax.SeqExpr:
    """A branch that runs `bindings` and has nothing for a value."""
    last = relax.Var("_", relax.TupleType([]))
    return relax.SeqExpr([relax.BindingBlock([*bindings, relax.VarBinding(last, relax.Tuple([]))])], last)
