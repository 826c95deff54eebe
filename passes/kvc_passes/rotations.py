"""Rotary embeddings, read element by element: what is turned, and by which cosines and sines.

An element of a rotated key is a sum of products, each of an element of the key and of a value that depends on
the token's position alone. The form read here is that of RoPE (RoFormer, arXiv 2104.09864) with halves:

    y[d] = x[d] c[d] - x[d + half] s[d],  y[d + half] = x[d + half] c[d] + x[d] s[d],  d < half
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from tvm import relax, tirx
from tvm.ir import GenericConst
from tvm.sym import Analyzer

from .conditions import Unprovable
from .element import Elements, Index
from .graph import Graph, dims, op_name, scalar, static
from .indices import bind_extent, bind_index, int64, replaced
from .provenance import Piece, Projection, Provenance


@dataclass(frozen=True)
class Rotation:
    """A key [1, heads, n, elements] that is a projection of which the first 2 * half elements are turned."""

    key: Piece
    """All elements before they are turned."""
    half: int
    cosine: tuple[relax.Var, int]
    """A value [.., n, elements], and where in it the element for d = 0 stands."""
    sine: tuple[relax.Var, int]

    @property
    def projection(self) -> Projection:
        assert self.key.projection is not None
        return self.key.projection


@dataclass(frozen=True)
class _Term:
    """A product with a sign: an element of a projection, and elements that depend on positions alone."""

    negative: bool
    key: tuple[relax.Var, Index] | None
    others: tuple[tuple[relax.Var, Index], ...]


class Rotations:
    """Reads the rotations of a flattened graph."""

    def __init__(self, graph: Graph, provenance: Provenance) -> None:
        self.graph, self.provenance = graph, provenance
        self._moving = graph.reachable_from([graph.function.params[0]])

    def read(self, operand: relax.Expr, pieces: tuple[Piece, ...]) -> Rotation:
        """The rotation of an operand whose `pieces` are known. Raises Unprovable with the reason."""
        extent = static(dims(operand)[3]) or 0
        turned = next((p.high for p in reversed(pieces) if p.projection is None), 0)
        if turned % 2 or not turned or any(p.projection is not None for p in pieces if p.low < turned):
            raise Unprovable("is not turned in its first elements alone")
        half = turned // 2
        low, high = (_Half(self, operand, begin, half) for begin in (0, half))
        (first, second), (third, fourth) = low.terms, high.terms
        key = low.place(first)
        if (low.place(second), high.place(third), high.place(fourth)) != (
            replace(key, first=key.first + half), replace(key, first=key.first + half), key
        ):  # fmt: skip
            raise Unprovable("is not turned by halves")
        signs = (first.negative, second.negative, third.negative, fourth.negative)
        if signs != (False, True, False, False):
            raise Unprovable("is turned with other signs")
        if low.text(first) != high.text(third) or low.text(second) != high.text(fourth):
            raise Unprovable("is turned by other cosines or sines in its second half")
        whole = replace(key, high=extent)
        for piece in pieces:
            if piece.low >= turned and not _follows(whole, piece):
                raise Unprovable("has elements behind the turned ones that come from elsewhere")
        return Rotation(whole, half, low.column(first), low.column(second))


class _Half:
    """The elements begin .. begin + half - 1 of a rotated operand, symbolically."""

    def __init__(self, rotations: Rotations, operand: relax.Expr, begin: int, half: int) -> None:
        self.rotations, self.graph, self.half = rotations, rotations.graph, half
        analyzer = Analyzer()
        tokens = rotations.provenance.tokens
        bind_extent(analyzer, tokens, 1)
        self.h, self.t = bind_index(analyzer, "h", dims(operand)[1]), bind_index(analyzer, "t", tokens)
        self.d = bind_index(analyzer, "d", half)
        self.seen: list[tuple[relax.Var, Index, tirx.Var]] = []
        ends = {v: self._end(v) for v in rotations.provenance.ends}
        ends |= {p: self._end(p) for p in self.graph.function.params}  # frequencies may be one
        self.elements = Elements(self.graph, ends, analyzer)
        self.terms = self._terms(operand, [0, self.h, self.t, self.elements.simplify(self.d + begin)])
        if len(self.terms) != 2 or any(t.key is None or len(t.others) != 1 for t in self.terms):
            raise Unprovable("is no sum of two products with what depends on positions")
        # The term of the element itself comes first: its cosine.
        if begin == 0 and self.terms[0].negative:
            self.terms.reverse()
        if begin and self._first(self.terms[0]) < self._first(self.terms[1]):
            self.terms.reverse()

    def _end(self, var: relax.Var) -> Any:
        def record(index: Index) -> Any:
            self.seen.append((var, index, tirx.Var(f"element_{len(self.seen)}", "float32")))
            return self.seen[-1][2]

        return record

    def _leaf(self, value: relax.Expr, index: Index) -> tuple[relax.Var, Index]:
        """The value that an element comes from, behind changes of layout."""
        found = self.elements.at(value, index)
        for var, at, name in self.seen:
            if isinstance(found, tirx.Var) and name.same_as(found):
                return var, at
        raise Unprovable("has elements of several values")

    def _terms(self, value: relax.Expr, index: Index) -> list[_Term]:
        var, at = self._leaf(value, index)
        if self.rotations.provenance.projection(var) is not None:
            return [_Term(False, (var, at), ())]
        if var not in self.rotations._moving:
            return [_Term(False, None, ((var, at),))]
        call = self.graph.definitions[var]
        name = op_name(call)
        if name not in ("add", "subtract", "negative", "multiply"):
            raise Unprovable(f"goes through {name}")
        parts = [self._terms(operand, _aligned(operand, at)) for operand in call.args]
        if name == "negative":
            return [_negated(term) for term in parts[0]]
        if name == "multiply":
            return [_product(a, b) for a in parts[0] for b in parts[1]]
        return [*parts[0], *(map(_negated, parts[1]) if name == "subtract" else parts[1])]

    def place(self, term: _Term) -> Piece:
        """Where the key's elements of a term stand in their projection."""
        assert term.key is not None
        var, index = term.key
        column = self.rotations.provenance.column(self.elements, index, self.h, self.t, self.d)
        if column is None:
            raise Unprovable("takes its elements in another order")
        return Piece(0, self.half, var, *column, self.rotations.provenance.projection(var))

    def _first(self, term: _Term) -> int:
        return self.place(term).first

    def column(self, term: _Term) -> tuple[relax.Var, int]:
        """The cosines or sines of a term, which all heads share."""
        ((var, index),) = term.others
        at = self.rotations.provenance.column(self.elements, index, self.h, self.t, self.d)
        if at is None or at[1]:
            raise Unprovable("is turned by what is not the same for all heads")
        return var, at[0]

    def text(self, term: _Term) -> str:
        """The cosine or sine of a term, such that equal texts mean equal numbers."""
        ((var, index),) = term.others
        return self._text(var, index)

    def _text(self, value: relax.Expr, index: Index) -> str:
        if isinstance(value, GenericConst):
            known = scalar(value)
            return repr(value.value.numpy().tolist()) if known is None else repr(known)
        var, at = self._leaf(value, index)
        call = self.graph.resolve(var)
        if op_name(call) in ("cos", "sin", "multiply"):
            return f"{op_name(call)}({', '.join(self._text(a, _aligned(a, at)) for a in call.args)})"
        places = [str(self.elements.simplify(replaced(replaced(int64(i), self.t, 0), self.d, 0))) for i in at]
        return f"{var.name}[{', '.join(places)}]"


def _aligned(operand: relax.Expr, index: Index) -> list[Any]:
    """The index into an operand that was broadcast to the rank of `index`."""
    shape = dims(operand)
    rest = list(index)[len(index) - len(shape) :]
    return [0 if static(d) == 1 else i for d, i in zip(shape, rest)]


def _negated(term: _Term) -> _Term:
    return replace(term, negative=not term.negative)


def _product(a: _Term, b: _Term) -> _Term:
    if a.key is not None and b.key is not None:
        raise Unprovable("is multiplied with itself")
    key = b.key if a.key is None else a.key
    return _Term(a.negative != b.negative, key, (*a.others, *b.others))


def _follows(whole: Piece, piece: Piece) -> bool:
    """Whether a piece is the whole's own elements at its place."""
    same = piece.source == whole.source and piece.stride == whole.stride
    return same and piece.first == whole.first + piece.low
