"""Proving which keys a query sees: a mask's element as a predicate, shown equal to a known family.

Biases of the position that are added to the scores (ALiBi) come out of the same elements.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from tvm import relax, tirx

from .affine import Affine, slope
from .conditions import Choice, Unprovable, as_condition, both, either, lift, negate
from .element import Elements
from .indices import int64, replaced
from .mask_families import decoder_families, other_families, sizes
from .predicates import CAUSAL, counter_example, to_text
from .sites import MaskFact

HIDDEN = -1e4
"""Scores at or below this have no weight: products of activations do not come near it, and exp(-1e4) is 0."""


@dataclass(frozen=True)
class Mask:
    """One mask of an attention.

    use: "add" to the scores, "keep" (true shows), "drop" (true hides).
    index: where it is read for the score [batch, head, query, key].
    """

    value: relax.Expr
    use: Literal["add", "keep", "drop"]
    index: tuple[Any, ...]


@dataclass(frozen=True)
class Place:
    """The symbols of a score: batch, head, query index, key index; past; the query's position."""

    heads: int
    head: Any
    query: Any
    key: Any
    past: Any

    @property
    def position(self) -> Any:
        return self.query + self.past


def predicate_of(elements: Elements, masks: Sequence[Mask]) -> Any:
    """Whether the masks together show the key. Raises Unprovable."""
    shown: Any = True
    for mask in masks:
        value = elements.at(mask.value, list(mask.index))
        if mask.use == "add":
            part = as_condition(lift(lambda v: _shown(elements, v), value))
        else:
            part = as_condition(value)
            part = negate(part) if mask.use == "drop" else part
        shown = both(shown, part)
    return shown


def _shown(elements: Elements, value: Any) -> bool:
    """Whether a mask's number shows the key: what is added to shown scores is their bias."""
    number = value.constant if isinstance(value, Affine) else value
    if isinstance(number, bool) or not isinstance(number, (int, float)) or number > HIDDEN:
        return True
    if isinstance(value, Affine) and number + _most(elements, value.terms) > HIDDEN:
        raise Unprovable(f"hides keys by a number that depends on the position ({_describe(value)})")
    return False


def _most(elements: Elements, terms: Sequence[tuple[Any, float]]) -> float:
    """An upper bound of a sum of index expressions times numbers."""
    total = 0.0
    for expression, factor in terms:
        bound = elements.analyzer.const_int_bound(int64(expression))
        total += max(factor * bound.min_value, factor * bound.max_value)
    return total


def adds_nothing(elements: Elements, masks: Sequence[Mask]) -> None:
    """Raises Unprovable unless the masks add 0 to all shown scores: beside learned scores that matters."""
    for mask in (m for m in masks if m.use == "add"):
        number = added_by(elements, mask)
        if isinstance(number, (Affine, tirx.Expr)) or number != 0:
            raise Unprovable(
                f"adds {_describe(number)} to the scores, but not to the learned score beside them"
            )


def added_by(elements: Elements, mask: Mask) -> Any:
    """What a mask adds to shown scores. Raises Unprovable where that is not one expression."""
    return _only(_visible(elements, elements.at(mask.value, list(mask.index))))


def bias_of(elements: Elements, masks: Sequence[Mask], key: Any) -> float:
    """The number by which the sum of the masks grows from one shown key to the next. Raises Unprovable."""
    total = 0.0
    for mask in (m for m in masks if m.use == "add"):
        here = added_by(elements, mask)
        after = [replaced(i, key, key + 1) for i in mask.index]
        there = _only(_visible(elements, elements.at(mask.value, after)))
        step = slope(here, there, elements.simplify)
        if step is None:
            raise Unprovable(f"adds an expression of the position ({_describe(here)}) to the scores")
        total += step
    return total


def _visible(elements: Elements, value: Any) -> Iterator[Any]:
    if isinstance(value, Choice):
        yield from _visible(elements, value.then)
        yield from _visible(elements, value.other)
    elif _shown(elements, value):
        yield value


def _only(values: Iterator[Any]) -> Any:
    """The one value that shown keys have."""
    found = list(values) or [0.0]
    first = found[0]
    if any(isinstance(v, (Affine, tirx.Expr)) or v != first for v in found[1:]):
        raise Unprovable(
            f"adds {_describe(found[-1])} to some scores and {_describe(first)} to others: it neither shows "
            "nor hides a key"
        )
    if isinstance(first, (int, float)) and first < HIDDEN / 2:
        raise Unprovable(f"adds {_describe(first)} to shown scores, which is no more than what hides others")
    return first


def _describe(value: Any) -> str:
    if isinstance(value, Affine):
        return " + ".join([f"{c:g} * ({e})" for e, c in value.terms] + [f"{value.constant:g}"])
    return f"{value:g}" if isinstance(value, float) else str(value)


def prove_mask(elements: Elements, predicate: Any, place: Place) -> MaskFact:
    """Prove that a predicate is one of a decoder's.

    Raises:
        Unprovable: a token would see later ones, with a counter-example; or the predicate has no spelling.
    """
    if isinstance(predicate, bool):
        raise Unprovable(
            "shows every key: the attention is bidirectional" if predicate else "hides every key"
        )
    position, key = place.position, place.key
    for family in decoder_families(predicate, position, key):
        if equivalent(elements, predicate, family.condition):
            text = family.text.replace("q", "(query + past)").replace("k ", "key ")
            return family.fact(f"SMT: for all query, key, past: mask == ({text})")
    if not elements.prove(either(negate(predicate), key <= position)):
        raise Unprovable(_not_causal(elements, predicate, place))
    if not elements.prove(either(negate(tirx.EQ(key, position)), predicate)):
        raise Unprovable(
            f"is not proved to show a token itself; its predicate is {elements.simplify(predicate)}"
        )
    text = _text(elements, predicate, place)
    window = _window(elements, predicate, place)
    within = "" if window is None else f" and key > query + past - {window}"
    return MaskFact(
        "predicate",
        window,
        f"SMT: for all query, key, past: mask implies key <= query + past{within}",
        predicate=f"{CAUSAL} and {text}",
    )


def _window(elements: Elements, predicate: Any, place: Place) -> int | None:
    """The smallest window of those that a predicate's constants suggest which it is proved to stay within."""
    for size in sizes(predicate):
        if elements.prove(either(negate(predicate), place.key > place.position - size)):
            return size
    return None


def _not_causal(elements: Elements, predicate: Any, place: Place) -> str:
    """Why a predicate is no decoder's mask."""
    for condition, what in other_families(predicate, place.position, place.key):
        if equivalent(elements, predicate, condition):
            return f"{what}; a decoder's tokens see only earlier ones"
    shown = elements.simplify(predicate)
    try:
        text = _text(elements, predicate, place)
    except Unprovable:
        return f"is not proved to hide later keys; its predicate is {shown}"
    wrong = counter_example(f"({text}) and k > q", "False", place.heads)
    if wrong is None:
        return f"is not proved to hide later keys; its predicate is {text}"
    return f"lets the token at position {wrong[0]} see the later key {wrong[1]}; its predicate is {text}"


def _text(elements: Elements, predicate: Any, place: Place) -> str:
    """The predicate over positions: query = q - past, where past must cancel."""
    q = tirx.Var("q", "int64")
    shifted = replaced(predicate, place.query, q - place.past)
    shifted = elements.analyzer.simplify(shifted)
    return to_text(shifted, {q: "q", place.key: "k", place.head: "h"})


def equivalent(elements: Elements, a: Any, b: Any) -> bool:
    """Whether two conditions are proved to be the same for all values of their symbols."""
    return elements.prove(either(negate(a), b)) and elements.prove(either(a, negate(b)))


def prove_padding(elements: Elements, masks: Sequence[Mask], real: Any, fact: MaskFact, place: Place) -> bool:
    """Whether the attention mask does nothing but hide padding: with it, the predicate is the proved one for
    real keys and false for others. `real` is the attention mask's element of the key."""
    try:
        predicate = predicate_of(elements, masks)
    except Unprovable:
        return False
    if isinstance(predicate, bool):
        return False
    family = next(
        (f for f in decoder_families(predicate, place.position, place.key) if f.text == fact.predicate), None
    )
    if family is None:
        return False
    seen = tirx.And(family.condition, tirx.EQ(real, tirx.IntImm("int64", 1)))
    return equivalent(elements, predicate, seen)


def with_padding(fact: MaskFact, proved: bool) -> MaskFact:
    """The fact, with what is known of the attention mask."""
    what = "the attention mask hides padding and nothing else" if proved else "for batches without padding"
    return replace(fact, proof=f"{fact.proof}; {what}")
