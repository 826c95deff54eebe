"""Elements of an attention's operand as sums of products: elements of a value, factors, cosines and sines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tvm import relax, tirx
from tvm.ir import GenericConst
from tvm.sym import Analyzer

from .conditions import Unprovable
from .element import Elements, Index
from .graph import aligned, dims, op_name, scalar
from .indices import bind_extent, bind_index, int64, replaced
from .provenance import Provenance


@dataclass(frozen=True)
class Term:
    """A product with a sign: an element of what is followed, and elements that no token's id changes."""

    negative: bool
    key: tuple[relax.Var, Index] | None
    others: tuple[tuple[relax.Expr, Index], ...] = ()
    number: float = 1.0
    """Constants that are multiplied with."""


class Terms:
    """The elements begin .. begin + width - 1 of an operand [1, heads, n, elements], symbolically.

    operand[h, t, begin + d] is the sum of `terms` for all h, t and d < width. `ends`: whether an element of a
    value is what is followed; `source`: such a value that only has the elements of others. Raises Unprovable.
    """

    def __init__(
        self,
        provenance: Provenance,
        operand: relax.Expr,
        begin: int,
        width: int,
        ends: Callable[[relax.Var], bool],
        source: relax.Var | None = None,
    ) -> None:
        self.provenance, self.graph, self._ends = provenance, provenance.graph, ends
        analyzer, tokens = Analyzer(), provenance.tokens
        bind_extent(analyzer, tokens, 1)
        self.width = width
        self.h, self.t = bind_index(analyzer, "h", dims(operand)[1]), bind_index(analyzer, "t", tokens)
        self.d = bind_index(analyzer, "d", width)
        self._seen: list[tuple[relax.Var, Index, tirx.Var]] = []
        # Frequencies and factors may be parameters.
        leaves = [*provenance.ends, *self.graph.function.params, *([] if source is None else [source])]
        self.elements = Elements(self.graph, {v: self._leaf_of(v) for v in leaves}, analyzer)
        self.terms = self._terms(operand, self.index(begin))

    def index(self, begin: int) -> list[Any]:
        """Of element begin + d of an operand."""
        return [0, self.h, self.t, self.elements.simplify(self.d + begin)]

    def leaf(self, value: relax.Expr, index: Index) -> tuple[relax.Var, Index]:
        """The value that an element comes from, behind changes of layout."""
        found = self.elements.at(value, index)
        for var, at, name in self._seen:
            if isinstance(found, tirx.Var) and name.same_as(found):
                return var, at
        raise Unprovable("has elements of several values")

    def column(self, place: tuple[relax.Var, Index]) -> tuple[int, int] | None:
        """First column and columns a head, where an element is [.., t, first + h * stride + d]."""
        return self.provenance.column(self.elements, place[1], self.h, self.t, self.d)

    def angle(self, place: tuple[relax.Var, Index]) -> tuple[relax.Var, int]:
        """The cosines or sines at a place, which all heads share: the value, and where d = 0 stands."""
        at = self.column(place)
        if at is None or at[1]:
            raise Unprovable("is turned by what is not the same for all heads")
        return place[0], at[0]

    def text(self, place: tuple[relax.Var, Index]) -> str:
        """The element at a place, such that equal texts mean equal numbers."""
        return self._text(*place)

    def _leaf_of(self, var: relax.Var) -> Any:
        def record(index: Index) -> Any:
            self._seen.append((var, index, tirx.Var(f"element_{len(self._seen)}", "float32")))
            return self._seen[-1][2]

        return record

    def _terms(self, value: relax.Expr, index: Index) -> list[Term]:
        if isinstance(value, GenericConst):
            known = scalar(value)
            return [Term(False, None, ((value, index),)) if known is None else Term(False, None, (), known)]
        var, at = self.leaf(value, index)
        if self._ends(var):
            return [Term(False, (var, at))]
        if var not in self.provenance.moving:
            return [Term(False, None, ((var, at),))]
        call = self.graph.definitions[var]
        name = op_name(call)
        if name not in ("add", "subtract", "negative", "multiply"):
            raise Unprovable(f"goes through {name}")
        parts = [self._terms(operand, aligned(operand, at)) for operand in call.args]
        if name == "negative":
            return [_negated(term) for term in parts[0]]
        if name == "multiply":
            return [_product(a, b) for a in parts[0] for b in parts[1]]
        return [*parts[0], *(map(_negated, parts[1]) if name == "subtract" else parts[1])]

    def _text(self, value: relax.Expr, index: Index) -> str:
        if isinstance(value, GenericConst):
            known = scalar(value)
            return self._table_text(value.value.numpy(), index) if known is None else repr(known)
        var, at = self.leaf(value, index)
        call = self.graph.resolve(var)
        if op_name(call) in ("cos", "sin", "multiply"):
            return f"{op_name(call)}({', '.join(self._text(a, aligned(a, at)) for a in call.args)})"
        places = [str(self._named(i)) for i in at]
        return f"{var.name}[{', '.join(places)}]"

    def _table_text(self, table: np.ndarray, index: Index) -> str:
        """Of the part of a constant that d = 0, 1, .. reads, where d stands in one place alone."""
        places = [self._named(i) for i in index]
        for axis, place in enumerate(places):
            first = self.elements.simplify(replaced(place, _ELEMENT, 0))
            if isinstance(first, int) and self.elements.prove(tirx.EQ(place, _ELEMENT + first)):
                table = table.take(range(first, first + self.width), axis)
                places[axis] = _ELEMENT
        return f"{table.tolist()}[{', '.join(map(str, places))}]"

    def _named(self, index: Any) -> Any:
        """An index with names for the symbols that are the same for all operands."""
        index = int64(self.elements.simplify(index))
        for symbol, name in ((self.h, _HEAD), (self.t, _TOKEN), (self.d, _ELEMENT)):
            index = replaced(index, symbol, name)
        return index


_HEAD, _TOKEN, _ELEMENT = (tirx.Var(name, "int64") for name in "htd")


def _negated(term: Term) -> Term:
    return replace(term, negative=not term.negative)


def _product(a: Term, b: Term) -> Term:
    if a.key is not None and b.key is not None:
        raise Unprovable("is multiplied with itself")
    key = b.key if a.key is None else a.key
    return Term(a.negative != b.negative, key, (*a.others, *b.others), a.number * b.number)
