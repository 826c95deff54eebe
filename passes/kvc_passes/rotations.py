"""Rotary embeddings, read element by element: what is turned, and by which cosines and sines.

An element of a rotated key is a sum of products, each of an element of the key and of a value that depends on
the token's position alone. The form read here is that of RoPE (RoFormer, arXiv 2104.09864) with halves:

    y[d] = x[d] c[d] - x[d + half] s[d],  y[d + half] = x[d + half] c[d] + x[d] s[d],  d < half
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tvm import relax

from .conditions import Unprovable
from .element import Index
from .graph import Graph, dims, static
from .provenance import Piece, Projection, Provenance
from .terms import Term, Terms

Place = tuple[relax.Var, Index]


@dataclass(frozen=True)
class Angles:
    """Cosines and sines of a token's position: of each a value [.., n, elements], and where it begins."""

    cosine: tuple[relax.Var, int]
    sine: tuple[relax.Var, int]
    pairs: int
    """How many of each."""


@dataclass(frozen=True)
class Rotation:
    """A key [1, heads, n, elements] of which the first 2 * half elements are turned; or a query."""

    key: Piece
    """All elements before they are turned."""
    angles: Angles

    @property
    def half(self) -> int:
        return self.angles.pairs

    @property
    def projection(self) -> Projection:
        assert self.key.projection is not None
        return self.key.projection


class Rotations:
    """Reads the rotations of a flattened graph.

    source: the value whose elements are turned, of which a row is all that a token has; None for any
        projection.
    """

    def __init__(self, graph: Graph, provenance: Provenance, source: relax.Var | None = None) -> None:
        self.graph, self.provenance, self.source = graph, provenance, source

    def read(self, operand: relax.Expr, pieces: tuple[Piece, ...]) -> Rotation:
        """The rotation of an operand whose `pieces` are known. Raises Unprovable with the reason."""
        extent = static(dims(operand)[3]) or 0
        plain = [self._ends(piece.source) for piece in pieces]
        turned = next((p.high for p, own in zip(reversed(pieces), reversed(plain)) if not own), 0)
        if turned % 2 or not turned or any(own for p, own in zip(pieces, plain) if p.low < turned):
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
        (cosine, sine), others = low.angles(), high.angles()
        if (low.text(cosine), low.text(sine)) != tuple(map(high.text, others)):
            raise Unprovable("is turned by other cosines or sines in its second half")
        whole = replace(key, high=extent)
        for piece in pieces:
            if piece.low >= turned and not _follows(whole, piece):
                raise Unprovable("has elements behind the turned ones that come from elsewhere")
        return Rotation(whole, Angles(low.angle(cosine), low.angle(sine), half))

    def _ends(self, var: relax.Var) -> bool:
        """Whether elements of a value are what is turned."""
        return self.provenance.projection(var) is not None if self.source is None else var == self.source


class _Half(Terms):
    """The elements begin .. begin + half - 1 of a rotated operand."""

    def __init__(self, rotations: Rotations, operand: relax.Expr, begin: int, half: int) -> None:
        super().__init__(rotations.provenance, operand, begin, half, rotations._ends, rotations.source)
        self.half, self.source = half, rotations.source
        plain = all(t.key is not None and len(t.others) == 1 and t.number == 1.0 for t in self.terms)
        if len(self.terms) != 2 or not plain:
            raise Unprovable("is no sum of two products with what depends on positions")
        # The term of the element itself comes first: its cosine.
        if begin == 0 and self.terms[0].negative:
            self.terms.reverse()
        if begin and self.place(self.terms[0]).first < self.place(self.terms[1]).first:
            self.terms.reverse()

    def column(self, place: Place) -> tuple[int, int] | None:
        return super().column(place if self.source is None else (place[0], self.provenance.row(*place)))

    def place(self, term: Term) -> Piece:
        """Where the key's elements of a term stand in their projection."""
        assert term.key is not None
        column = self.column(term.key)
        if column is None:
            raise Unprovable("takes its elements in another order")
        return Piece(0, self.half, term.key[0], *column, self.provenance.projection(term.key[0]))

    def angles(self) -> tuple[Place, Place]:
        """Where the cosines and sines of the two terms stand."""
        (first,), (second,) = (term.others for term in self.terms)
        return of_value(first), of_value(second)


def of_value(place: tuple[relax.Expr, Index]) -> Place:
    """A place in a value; constants depend on no position."""
    if not isinstance(place[0], relax.Var):
        raise Unprovable("is multiplied with a constant")
    return place[0], place[1]


def _follows(whole: Piece, piece: Piece) -> bool:
    """Whether a piece is the whole's own elements at its place."""
    same = piece.source == whole.source and piece.stride == whole.stride
    return same and piece.first == whole.first + piece.low
