"""Keys that are made of the same numbers as values: the proof, and what makes the ones of the others.

Element d of a value is followed back, through changes of layout alone, to an element of the value U that the
operand is. Element d of a key is followed back through products with factors of its own (a norm's weight, a
constant) and a rotation, and has to end at the same element of U, or at that of the element it is turned
with. What U is does not matter: a norm of a projection, or the projection itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tvm import relax, tirx
from tvm.sym import Analyzer

from .conditions import Unprovable
from .element import Elements, Index
from .graph import dims, static
from .indices import LARGEST, bind_extent, bind_index, int64, replaced
from .provenance import Provenance
from .rotations import Angles, Place, of_value
from .tables import read_table
from .terms import Term, Terms


@dataclass(frozen=True)
class Factor:
    """Numbers that keys are multiplied with: element d of head h by source[first + h * stride + d * step].

    source: no token changes it; it is read in row-major order.
    """

    source: relax.Expr
    first: int
    stride: int
    step: int


@dataclass(frozen=True)
class Rekeying:
    """Keys [1, heads, n, elements]: values times `number` and `factors`, then turned."""

    factors: tuple[Factor, ...]
    number: float
    half: int = 0
    """Elements d and d + half are turned together."""
    angles: Angles | None = None
    """None where nothing is turned."""

    @property
    def pairs(self) -> int:
        return 0 if self.angles is None else self.angles.pairs

    @property
    def scaled(self) -> bool:
        return bool(self.factors) or self.number != 1.0


def rekeying(
    provenance: Provenance, key: relax.Expr, value: relax.Expr, tables: Mapping[str, np.ndarray]
) -> Rekeying:
    """How the operand `key` is made of the operand `value`, both [1, heads, n, elements].

    tables: numbers of parameters, among which frequencies are looked for that are 0. Raises Unprovable with
    what `key` does otherwise.
    """
    sources = {piece.source for piece in provenance.pieces(value)}
    if len(sources) != 1 or not sources <= provenance.graph.ancestors([key]):
        raise Unprovable("is not made of what V is")
    made = (provenance, key, value, sources.pop())
    extent = static(dims(key)[3]) or 0
    parts = list(_split(made, 0, extent))
    turned = next((p.begin + p.width for p in reversed(parts) if len(p.terms) == 2), 0)
    plain = [part.plain() for part in _split(made, turned, extent - turned)]
    if not turned:
        return Rekeying(*_agreed(plain))
    if turned % 2:
        raise Unprovable("is not turned by halves")
    half = turned // 2
    low, high = (_Part(*made, begin, half) for begin in (0, half))
    (cosine, sine), again = low.turned(half, negative=True), high.turned(-half, negative=False)
    if [low.text(cosine), low.text(sine)] != [high.text(angle) for angle in again]:
        raise Unprovable("is turned by other cosines or sines in its second half")
    scales = _agreed([*low.scales, *high.scales, *plain])
    angles = _turning(provenance, Angles(low.angle(cosine), low.angle(sine), half), tables)
    return Rekeying(*scales, half, angles) if angles.pairs else Rekeying(*scales)


_Operands = tuple[Provenance, relax.Expr, relax.Expr, relax.Var]


def _split(made: _Operands, begin: int, width: int) -> Iterator[_Part]:
    """Halves, until the elements of each are computed alike."""
    if not width:
        return
    try:
        yield _Part(*made, begin, width)
    except Unprovable:
        if width < 2:
            raise
        yield from _split(made, begin, width // 2)
        yield from _split(made, begin + width // 2, width - width // 2)


_Scale = tuple[tuple[Factor, ...], float]


def _agreed(scales: Sequence[_Scale]) -> _Scale:
    """The factors of all elements."""
    if any(scale != scales[0] for scale in scales):
        raise Unprovable("has elements that are scaled in several ways")
    return scales[0]


class _Part(Terms):
    """The elements begin .. begin + width - 1 of keys, made of elements of `source` as values are."""

    def __init__(
        self,
        provenance: Provenance,
        key: relax.Expr,
        value: relax.Expr,
        source: relax.Var,
        begin: int,
        width: int,
    ) -> None:
        super().__init__(provenance, key, begin, width, lambda var: var == source)
        self.value, self.begin = value, begin
        self.scales: list[_Scale] = []
        """Of the terms of elements that are turned, once they were read."""

    def plain(self) -> _Scale:
        """The factors of elements that are not turned."""
        if len(self.terms) != 1 or self.terms[0].negative or self._angles(self.terms[0]):
            raise Unprovable("is not V times factors of its elements, where it is not turned")
        self._check(self.terms[0], 0)
        return self._scale(self.terms[0], 0)

    def turned(self, shift: int, *, negative: bool) -> tuple[Place, Place]:
        """Where cosine and sine stand of elements that are turned with those `shift` further on."""
        if len(self.terms) != 2:
            raise Unprovable("is no sum of two products with what depends on positions")
        own, other = self.terms if self._is(self.terms[0], 0) else self.terms[::-1]
        self._check(own, 0)
        self._check(other, shift)
        if own.negative or other.negative != negative:
            raise Unprovable("is turned with other signs")
        cosines, sines = self._angles(own), self._angles(other)
        if len(cosines) != 1 or len(sines) != 1:
            raise Unprovable("is no sum of two products with what depends on positions")
        self.scales = [self._scale(own, 0), self._scale(other, shift)]
        return cosines[0], sines[0]

    def _check(self, term: Term, shift: int) -> None:
        if not self._is(term, shift):
            raise Unprovable("has elements that are no elements of V, or others than it is turned with")

    def _is(self, term: Term, shift: int) -> bool:
        """Whether a term is of the elements begin + shift + d of values."""
        if term.key is None:
            return False
        _, wanted = self.leaf(self.value, self.index(self.begin + shift))
        equal = zip(term.key[1], wanted, strict=True)
        return all(self.elements.prove(tirx.EQ(int64(a), int64(b))) for a, b in equal)

    def _angles(self, term: Term) -> list[Place]:
        turning = self.provenance.turning
        return [of_value(place) for place in term.others if place[0] in turning]

    def _scale(self, term: Term, shift: int) -> _Scale:
        """The factors of a term of the elements begin + shift + d."""
        constant = [place for place in term.others if place[0] not in self.provenance.turning]
        return tuple(self._factor(*place, self.begin + shift) for place in constant), term.number

    def _factor(self, source: relax.Expr, index: Index, begin: int) -> Factor:
        position: Any = int64(0)
        for extent, i in zip(dims(source), index, strict=True):
            position = position * extent + int64(i)

        def at(h: int, d: int) -> Any:
            return self.elements.simplify(replaced(replaced(position, self.h, h), self.d, d))

        first, stride, step = at(0, 0), at(1, 0), at(0, 1)
        if not all(isinstance(number, int) for number in (first, stride, step)):
            raise Unprovable("is multiplied with what is no factor of its elements")
        stride, step = stride - first, step - first
        line = self.h * stride + self.d * step + first
        if not self.elements.prove(tirx.EQ(position, line)):
            raise Unprovable("is multiplied with what is no factor of its elements")
        return Factor(source, first - begin * step, stride, step)


def _turning(provenance: Provenance, angles: Angles, tables: Mapping[str, np.ndarray]) -> Angles:
    """The angles without the last ones that are 0 at every position, as frequencies of 0 make them."""
    analyzer, params = Analyzer(), provenance.graph.function.params
    bind_extent(analyzer, provenance.tokens, 1)
    token = bind_index(analyzer, "t", provenance.tokens)
    position = bind_index(analyzer, "position", LARGEST)

    def numbers(name: str) -> Any:
        return lambda index: read_table(tables[name], index)

    leaves = {p: numbers(p.name) for p in params if p.name in tables}
    elements = Elements(provenance.graph, {**leaves, params[1]: lambda index: position}, analyzer)

    def rests(angle: tuple[relax.Var, int], d: int, number: float) -> bool:
        var, first = angle
        try:
            return bool(elements.at(var, [*[0] * (len(dims(var)) - 2), token, first + d]) == number)
        except Unprovable:
            return False

    pairs = angles.pairs
    while pairs and rests(angles.cosine, pairs - 1, 1.0) and rests(angles.sine, pairs - 1, 0.0):
        pairs -= 1
    return replace(angles, pairs=pairs)
