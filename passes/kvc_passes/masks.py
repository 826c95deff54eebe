"""Proving which keys a query sees: a mask's element as a predicate, shown equal to a known family."""

from __future__ import annotations

from typing import Any

from tvm import relax, tirx

from .conditions import Unprovable, as_condition, both, either, lift, negate
from .element import Elements
from .facts import MaskFact

HIDDEN = -1e9
"""Scores at or below this have no weight: products of activations do not come near it."""


def _visible(value: Any) -> bool:
    """Whether an additive mask's constant shows a key (0) or hides it (a large negative number)."""
    if isinstance(value, bool):
        return value
    if value == 0:
        return True
    if value <= HIDDEN:
        return False
    raise Unprovable(f"adds {value} to some scores, which neither shows nor hides a key")


def _shown(value: Any) -> Any:
    if isinstance(value, (bool, int, float)):
        return _visible(value)
    raise Unprovable(f"adds an expression of the position ({value}) to the scores")


def prove_mask(
    elements: Elements,
    masks: list[tuple[relax.Expr, str]],
    query: Any,
    key: Any,
    index: list[Any],
    position: Any,
) -> MaskFact:
    """Prove that the masks together are causal or causal with a window.

    Args:
        elements: element expressions; its analyzer has bounds for `query` and `key`.
        masks: each mask and how it is used: "add" to the scores, "keep" (true shows), "drop" (true hides).
        query: index of the query in the sequence axis; key: index of the key.
        index: the index into the scores, [batch, head, query, key].
        position: the query's position, query + past.

    Raises:
        Unprovable: with the reason.
    """
    predicate: Any = True
    for mask, use in masks:
        rank = len(mask.ty.shape.values)
        aligned = [0 if _is_one(d) else i for d, i in zip(mask.ty.shape.values, index[len(index) - rank :])]
        value = elements.at(mask, aligned)
        if use == "add":
            shown = as_condition(lift(_shown, value))
        else:
            shown = as_condition(value)
            shown = negate(shown) if use == "drop" else shown
        predicate = both(predicate, shown)
    if isinstance(predicate, bool):
        raise Unprovable(
            "shows every key: the attention is bidirectional" if predicate else "hides every key"
        )
    causal = key <= position
    if _equivalent(elements, predicate, causal):
        return MaskFact("causal", None, "SMT: for all query, key, past: mask == (key <= query + past)")
    for window in _windows(predicate):
        if _equivalent(elements, predicate, tirx.And(causal, key > position - window)):
            proof = f"SMT: for all query, key, past: mask == (query + past - {window} < key <= query + past)"
            return MaskFact("window", window, proof)
    raise Unprovable(
        f"is neither causal nor a causal window; its predicate is {elements.simplify(predicate)}"
    )


def _is_one(dim: Any) -> bool:
    return isinstance(dim, tirx.IntImm) and dim.value == 1


def _equivalent(elements: Elements, a: Any, b: Any) -> bool:
    return elements.prove(either(negate(a), b)) and elements.prove(either(a, negate(b)))


def _windows(predicate: Any) -> list[int]:
    """Window sizes that the constants of a predicate suggest."""
    found: set[int] = set()
    stack = [predicate]
    while stack:
        node = stack.pop()
        if isinstance(node, tirx.IntImm):
            found.update(abs(int(node.value)) + d for d in (-1, 0, 1))
        stack.extend(getattr(node, name) for name in ("a", "b") if hasattr(node, name))
    return sorted(w for w in found if w > 0)
