"""Families of masks: candidates that a predicate is compared with, and how each is written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tvm import tirx

from .indices import int64
from .sites import MaskFact

_MOST = 12
"""Constants of a predicate that are tried as a size; masks have one or two."""


@dataclass(frozen=True)
class Family:
    """A predicate m(q, k), as an expression and as a fact."""

    condition: Any
    kind: Any
    text: str
    window: int | None = None
    chunk: int | None = None
    sinks: int | None = None

    def fact(self, proof: str) -> MaskFact:
        return MaskFact(self.kind, self.window, proof, self.chunk, self.sinks, self.text)


def decoder_families(predicate: Any, q: Any, k: Any) -> Iterator[Family]:
    """What a decoder's mask may be, the usual first; sizes come from the predicate's own constants."""
    causal = k <= q
    yield Family(causal, "causal", "k <= q")
    tried = sizes(predicate)
    for window in tried:
        inside = tirx.And(causal, k > q - window)
        yield Family(inside, "window", f"k <= q and k > q - {window}", window=window)
    for chunk in tried:
        same = tirx.EQ(tirx.floordiv(q, int64(chunk)), tirx.floordiv(k, int64(chunk)))
        text = f"k <= q and k // {chunk} == q // {chunk}"
        yield Family(tirx.And(causal, same), "chunk", text, chunk=chunk)
    for sinks in tried:
        for window in tried:
            seen = tirx.And(causal, tirx.Or(k < sinks, k > q - window))
            text = f"k <= q and (k < {sinks} or k > q - {window})"
            yield Family(seen, "sinks", text, window=window, sinks=sinks)


def other_families(predicate: Any, q: Any, k: Any) -> Iterator[tuple[Any, str]]:
    """What is no decoder's mask but has a name: for the refusal."""
    for prefix in sizes(predicate):
        seen = tirx.Or(k <= q, k < prefix)
        yield seen, f"is a prefix mask: all tokens see the first {prefix}, also those that come later"


def sizes(predicate: Any) -> list[int]:
    """Sizes that the constants of a predicate suggest."""
    found: set[int] = set()
    stack = [predicate]
    while stack:
        node = stack.pop()
        if isinstance(node, tirx.IntImm):
            found.update(abs(int(node.value)) + d for d in (-1, 0, 1))
        stack.extend(getattr(node, name) for name in ("a", "b") if hasattr(node, name))
    return sorted(size for size in found if size > 0)[:_MOST]
