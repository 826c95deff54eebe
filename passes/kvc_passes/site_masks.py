"""The masks of one attention read for all heads, proved, and remembered for the layers that share them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from tvm import relax, tirx

from .conditions import Unprovable, both
from .distance_bias import LearnedBias
from .element import Elements, Index
from .facts import Roles
from .graph import Graph, aligned, dims
from .indices import bind_index, int64, replaced
from .masks import (
    Mask,
    Place,
    added_by,
    adds_nothing,
    bias_of,
    equivalent,
    predicate_of,
    prove_mask,
    prove_padding,
    with_padding,
)
from .scores import Scores, Symbols
from .sites import MaskFact
from .tables import read_table

Bias = tuple[tuple[float, ...], ...]
"""For every head what is added by distance; see AttentionSite.bias."""
Proved = tuple[MaskFact, tuple[float, ...] | None, Bias | None]
"""The mask, the slope of every head of a bias of the position, and a learned bias of the distance."""


class MaskProver:
    """Proves the masks of one function's attentions."""

    def __init__(
        self, graph: Graph, roles: Roles, past: Any, sequence: Any, tables: Mapping[str, np.ndarray]
    ) -> None:
        self.graph, self.roles, self.past, self.sequence = graph, roles, past, sequence
        self.params = {p.name: p for p in graph.function.params}
        self.tables = {self.params[name]: table for name, table in tables.items() if name in self.params}
        self._proved: dict[Any, Proved] = {}

    def prove(self, scores: Scores) -> Proved:
        """Raises Unprovable with what the mask is or does instead."""
        if scores.condition is True and not scores.masks:
            raise Unprovable("shows every key: the attention is bidirectional")
        if scores.condition is not True or scores.lengths is not None:
            return self._prove(scores)
        used = ((self.graph.alias(m.value), m.use, _pattern(m, scores.symbols)) for m in scores.masks)
        key = (scores.symbols.place.heads, *used)
        if key not in self._proved:
            self._proved[key] = self._prove(scores)
        return self._proved[key]

    def memory(self, scores: Scores) -> Proved:
        """Of cross-attention: every row is seen. Raises Unprovable."""
        elements = self._elements(scores.symbols, lambda index: 1)
        predicate, slopes = self._read(elements, scores)
        if scores.lengths is not None or (predicate is not True and not elements.prove(predicate)):
            raise Unprovable(f"hides rows: it shows those for which {predicate}")
        if any(slopes):
            raise Unprovable("adds a bias of the row")
        return MaskFact("memory", None, "all rows of the encoder's output", predicate="True"), None, None

    def _prove(self, scores: Scores) -> Proved:
        added = [m.value for m in scores.masks if m.use == "add"]
        learned = LearnedBias.find(self.graph, added, self.tables)
        if learned is None:
            return self._prove_with(scores, None)
        try:
            return self._prove_with(scores, learned)
        except Unprovable as error:
            reason = error
        try:  # a table may also be a mask
            return self._prove_with(scores, None)
        except Unprovable:
            raise reason from None

    def _prove_with(self, scores: Scores, learned: LearnedBias | None) -> Proved:
        elements = self._elements(scores.symbols, lambda index: 1, learned)
        self._check_lengths(elements, scores)
        bias = None if learned is None else self._learned(elements, learned, scores)
        predicate, slopes = self._read(elements, scores)
        fact = prove_mask(elements, predicate, scores.symbols.place)
        if self.roles.attention_mask:
            fact = with_padding(fact, self._padding(scores, fact, slopes, learned))
        return fact, slopes if any(slopes) else None, bias

    def _learned(self, elements: Elements, learned: LearnedBias, scores: Scores) -> Bias:
        """What is added to the scores by distance. Raises Unprovable."""
        masks, place = [m for m in scores.masks if m.use == "add"], scores.symbols.place
        factors = [learned.factor(added_by(elements, mask)) for mask in masks]
        if sum(factors) != 1.0 or any(factors.count(f) and f not in (0.0, 1.0) for f in factors):
            raise Unprovable("adds a learned bias, but not once")
        plain = self._elements(scores.symbols, lambda index: 1)
        return learned.by_distance(plain, place.position, place.key, place.head)

    def _read(self, elements: Elements, scores: Scores) -> tuple[Any, tuple[float, ...]]:
        """The predicate of all masks, and the bias of every head: for any head at once, else one by one."""
        place = scores.symbols.place
        try:
            predicate = both(scores.condition, predicate_of(elements, scores.masks))
            return predicate, (bias_of(elements, scores.masks, place.key),) * place.heads
        except Unprovable as error:
            if not any(_uses(i, place.head) for m in scores.masks for i in m.index):
                raise
            reason = error
        predicates, slopes = [], []
        for head in range(place.heads):
            masks = [_at_head(m, place, head) for m in scores.masks]
            try:
                predicates.append(both(scores.condition, predicate_of(elements, masks)))
                slopes.append(bias_of(elements, masks, place.key))
            except Unprovable as error:
                raise (error if head else reason) from None
        return self._same(elements, predicates), tuple(slopes)

    def _same(self, elements: Elements, predicates: Sequence[Any]) -> Any:
        first = predicates[0]
        if not all(p is first or equivalent(elements, p, first) for p in predicates[1:]):
            raise Unprovable("is another one for some heads, in a way that has no expression")
        return first

    def _elements(self, symbols: Symbols, padding: Any, learned: LearnedBias | None = None) -> Elements:
        """Elements where the walk ends at the attention mask (`padding`), positions and a learned bias."""
        leaves: dict[relax.Var, Any] = {p: partial(read_table, t) for p, t in self.tables.items()}
        if self.roles.attention_mask:  # the runtime has no padding: every token in the mask is real
            leaves[self.params[self.roles.attention_mask]] = padding
        if self.roles.memory_mask:
            leaves[self.params[self.roles.memory_mask]] = lambda index: 1
        if self.roles.positions:
            leaves[self.params[self.roles.positions]] = lambda index: index[-1] + self.past
        if learned is not None:
            leaves[learned.var] = learned.leaf(symbols.analyzer)
        return Elements(self.graph, leaves, symbols.analyzer)

    def _check_lengths(self, elements: Elements, scores: Scores) -> None:
        """The operator's own count of keys is the number of all keys."""
        if scores.lengths is None:
            return
        index = [scores.symbols.b, 0][: len(dims(scores.lengths))]
        count = elements.at(scores.lengths, index)
        if not elements.prove(tirx.EQ(int64(count), self.past + self.sequence - 1)):
            raise Unprovable(f"counts {count} keys before the last one, not past + sequence - 1")

    def _padding(
        self, scores: Scores, fact: MaskFact, slopes: tuple[float, ...], learned: LearnedBias | None
    ) -> bool:
        """Whether the attention mask is proved to do nothing but hide padding."""
        if scores.lengths is not None or any(slopes):
            return False
        symbols, made = scores.symbols, dict[str, Any]()

        def real(index: Index) -> Any:
            name = str([str(i) for i in index])
            if name not in made:
                made[name] = bind_index(symbols.analyzer, "real", int64(2))
            return made[name]

        key = real([symbols.b, symbols.place.key])
        return prove_padding(self._elements(symbols, real, learned), scores.masks, key, fact, symbols.place)

    def sinks(self, scores: Scores) -> tuple[float, ...] | None:
        """The learned score of every head. Raises Unprovable."""
        if scores.sinks is None:
            return None
        value, index = scores.sinks
        elements, place = self._elements(scores.symbols, lambda index: 1), scores.symbols.place
        adds_nothing(elements, scores.masks)
        found = []
        for head in range(place.heads):
            at = _at_head(Mask(value, "add", tuple(aligned(value, index))), place, head)
            score = elements.at(value, list(at.index))
            if not isinstance(score, float):
                raise Unprovable("has something beside the scores that is not one number a head")
            found.append(score)
        return tuple(found)


def _pattern(mask: Mask, symbols: Symbols) -> str:
    """Where a mask is read, written the same for the same place of any attention."""
    place = symbols.place
    index = list(mask.index)
    for number, var in enumerate((symbols.b, place.head, place.query, place.key)):
        index = [replaced(i, var, tirx.Var(f"i{number}", "int64")) for i in index]
    return str([str(i) for i in index])


def _at_head(mask: Mask, place: Place, head: int) -> Mask:
    """A mask read for one head."""
    number = int64(head)
    return Mask(mask.value, mask.use, tuple(_head(i, place, number) for i in mask.index))


def _head(index: Any, place: Place, number: Any) -> Any:
    if isinstance(index, tirx.Var) and index.same_as(place.head):
        return int(number.value)
    return replaced(index, place.head, number)


def _uses(index: Any, var: tirx.Var) -> bool:
    if isinstance(index, int):
        return False
    return not replaced(index, var, 0).same_as(index)
