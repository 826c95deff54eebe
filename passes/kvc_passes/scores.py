"""Reading one attention out of the graph: what is multiplied, scaled, bounded, masked, and where it goes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tvm import relax, tirx
from tvm.sym import Analyzer

from .conditions import Unprovable
from .element import Elements
from .graph import Graph, aligned, dims, op_name, operands, same_shape, scalar, static
from .indices import bind_extent, bind_index, int64
from .markers import SDPA, Sdpa, attributes, tensors
from .masks import HIDDEN, Mask, Place

At = Callable[[Any, Any], list[Any]]
"""The index into an operand for a token and an element of the head."""


class Unread(Exception):
    """The graph around a softmax is no attention; the message says what was expected."""


@dataclass(frozen=True)
class Symbols:
    """A score's place as symbols: batch b, head h, query i, key j, with their bounds."""

    analyzer: Analyzer
    b: Any
    place: Place


@dataclass(frozen=True)
class Scores:
    """softmax(softcap(scale * q k^T) + masks) v, operands in the layouts that they have in the graph."""

    symbols: Symbols
    query: tuple[relax.Expr, At]
    key: tuple[relax.Expr, At]
    value: tuple[relax.Expr, At]
    scale: float
    softcap: float | None
    masks: list[Mask]
    condition: Any
    """What the operator itself shows, True for everything."""
    sinks: tuple[relax.Expr, tuple[Any, ...]] | None
    lengths: relax.Expr | None
    output: relax.Var
    guarded: bool = False
    """Whether a row of the softmax that is NaN counts as zeros."""


@dataclass
class _Peeled:
    """A value between the product and the softmax, and the index that a score has in it."""

    value: relax.Expr
    index: list[Any]
    scale: float = 1.0
    masks: list[Mask] = field(default_factory=list)
    sinks: tuple[relax.Expr, tuple[Any, ...]] | None = None


class ScoreReader:
    """Reads the attentions of one function."""

    def __init__(
        self, graph: Graph, batch: Any, past: Any, sequence: Any, data: set[relax.Var], rows: Any = None
    ) -> None:
        """rows: of an encoder's output, None where there is none."""
        self.graph, self.batch, self.past, self.sequence, self.data = graph, batch, past, sequence, data
        self.rows = rows

    def analyzer(self) -> Analyzer:
        """Knows the bounds of batch, sequence and past."""
        analyzer = Analyzer()
        for extent, least in ((self.batch, 1), (self.sequence, 1), (self.past, 0)):
            bind_extent(analyzer, extent, least)
        return analyzer

    def read(self, var: relax.Var) -> Scores:
        """The attention around a softmax, or the one that a marker is. Raises Unread."""
        call = self.graph.definitions[var]
        return self._marked(var, call) if op_name(call) == SDPA else self._spelled_out(var, call)

    def symbols(self, heads: int, keys: Any) -> Symbols:
        analyzer = self.analyzer()
        place = Place(
            heads,
            bind_index(analyzer, "h", int64(heads)),
            bind_index(analyzer, "query", self.sequence),
            bind_index(analyzer, "key", keys),
            self.past,
        )
        return Symbols(analyzer, bind_index(analyzer, "b", self.batch), place)

    def _marked(self, var: relax.Var, call: relax.Call) -> Scores:
        attrs, (q, k, v, *rest) = attributes(call, Sdpa), tensors(call)
        extras = dict(zip(attrs.extras, rest))
        heads = static(dims(q)[1])
        if heads is None:
            raise Unread("the number of heads is not a constant")
        s = self.symbols(heads, dims(k)[2])
        place = s.place

        def at(operand: relax.Expr) -> At:
            group = heads // (static(dims(operand)[1]) or heads)
            head = place.head if group == 1 else tirx.floordiv(place.head, int64(group))
            return lambda t, d: [s.b, head, t, d]

        offset = self.past if attrs.offset == "past" else int64(0)
        seen: Any = True
        if attrs.causal:
            seen = place.key <= place.query + offset
        if attrs.window is not None:
            inside = place.key > place.query + offset - attrs.window
            seen = inside if seen is True else tirx.And(seen, inside)
        masks = [self._marked_mask(extras["mask"], s)] if "mask" in extras else []
        sinks = (extras["sinks"], (place.head,)) if "sinks" in extras else None
        return Scores(
            s,
            (q, at(q)),
            (k, at(k)),
            (v, at(v)),
            attrs.scale,
            attrs.softcap,
            masks,
            seen,
            sinks,
            extras.get("lengths"),
            var,
        )

    def _marked_mask(self, mask: relax.Expr, s: Symbols) -> Mask:
        whole = [s.b, s.place.head, s.place.query, s.place.key]
        use: Any = "keep" if str(mask.ty.dtype.dtype) == "bool" else "add"
        return Mask(mask, use, tuple(aligned(mask, whole)))

    def _spelled_out(self, var: relax.Var, call: relax.Call) -> Scores:
        shape = dims(var)
        if int(call.attrs.axis) % len(shape) != len(shape) - 1 or len(shape) != 4:
            raise Unread("expected a softmax over the last axis of scores [batch, heads, query, key]")
        heads = static(shape[1])
        if heads is None:
            raise Unread("the number of heads is not a constant")
        memory = self.rows is not None and same_shape([shape[3]], [self.rows])
        s = self.symbols(heads, self.rows if memory else self.past + self.sequence)
        place = s.place
        peeled = self._masks(_Peeled(call.args[0], [s.b, place.head, place.query, place.key]))
        softcap = self._softcap(peeled)
        product = self.graph.resolve(peeled.value)
        if op_name(product) != "matmul":
            raise Unread(
                f"expected scores from a matrix product of q and k, found {op_name(product) or 'an input'}"
            )
        lead = peeled.index[:-2]
        output, weighted, guarded = self._weighted_sum(var, peeled.sinks is not None)
        merged = [s.b * heads + place.head] if len(dims(weighted)) == 3 else [s.b, place.head]
        return Scores(
            s,
            (product.args[0], lambda t, d: [*lead, t, d]),
            (product.args[1], lambda t, d: [*lead, d, t]),
            (weighted.args[1], lambda t, d: [*merged, t, d]),
            peeled.scale,
            softcap,
            peeled.masks,
            True,
            peeled.sinks,
            None,
            output,
            guarded,
        )

    def is_mask(self, value: relax.Expr) -> bool:
        return not (isinstance(value, relax.Var) and value in self.data)

    def _masks(self, at: _Peeled) -> _Peeled:
        """Peel off, from the softmax inwards: casts, reshapes, a learned score a head, and masks."""
        while True:
            call = self.graph.resolve(at.value)
            name = op_name(call)
            if name == "astype" and "float" in str(call.attrs.dtype):
                at.value = call.args[0]
            elif name == "reshape":
                self._through(at, call)
            elif name == "subtract" and not at.masks and at.sinks is None and self._is_shift(call):
                at.value = call.args[0]
            elif name == "concat" and not at.masks and at.sinks is None and self._is_sinks(call):
                at.value, sinks = operands(call)
                at.sinks = sinks, (*at.index[:-1], 0)
            elif (found := self._mask(call, name)) is not None:
                at.value, mask, use = found
                at.masks.append(Mask(mask, use, tuple(aligned(mask, at.index))))
            else:
                return at

    def _mask(self, call: Any, name: str) -> tuple[relax.Expr, relax.Expr, Any] | None:
        """(scores, mask, use) where a value is masked scores."""
        if name == "add":
            for mask, scores in ((call.args[1], call.args[0]), (call.args[0], call.args[1])):
                if scalar(mask, self.graph) is None and self.is_mask(mask) and not self.is_mask(scores):
                    return scores, mask, "add"
        if name == "where" and self.is_mask(call.args[0]):
            if self._hides(call.args[2]):
                return call.args[1], call.args[0], "keep"
            if self._hides(call.args[1]):
                return call.args[2], call.args[0], "drop"
        return None

    def _hides(self, value: relax.Expr) -> bool:
        """Whether a score is replaced by a constant that leaves it no weight."""
        constant = scalar(value, self.graph)
        return constant is not None and constant <= HIDDEN

    def _is_shift(self, call: relax.Call) -> bool:
        """x - max(x) over all keys, which changes no softmax; a number that is too large would."""
        top = self.graph.resolve(call.args[1])
        if op_name(top) == "where" and scalar(top.args[2], self.graph) == -math.inf:  # of rows without keys
            top = self.graph.resolve(top.args[1])
        if op_name(top) != "max" or top.attrs.axis is None or not top.attrs.keepdims:
            return False
        rank = len(dims(call))
        same = self.graph.alias(top.args[0]) == self.graph.alias(call.args[0])
        return same and [int(a) % rank for a in top.attrs.axis] == [rank - 1]

    def _is_sinks(self, call: relax.Call) -> bool:
        """concat(scores, one column)."""
        parts = operands(call)
        last = int(call.attrs.axis) % len(dims(parts[0])) == len(dims(parts[0])) - 1
        return len(parts) == 2 and last and static(dims(parts[1])[-1]) == 1

    def _through(self, at: _Peeled, call: relax.Call) -> None:
        """Step behind a reshape: the score's index before it."""
        source, seen = call.args[0], list[Any]()

        def record(index: Any) -> int:
            seen.append(list(index))
            return 0

        try:
            Elements(self.graph, {source: record}, self.analyzer()).at(at.value, at.index)
        except Unprovable as error:
            raise Unread(str(error)) from None
        at.value, at.index = source, seen[0]

    def scaled(self, value: relax.Expr) -> tuple[relax.Expr, float]:
        """Peel multiplications and divisions by constants, and casts between floats."""
        scale = 1.0
        while True:
            call = self.graph.resolve(value)
            name = op_name(call)
            right = scalar(call.args[1], self.graph) if name in ("multiply", "divide") else None
            left = scalar(call.args[0], self.graph) if name == "multiply" else None
            if right is not None:
                scale, value = scale * right if name == "multiply" else scale / right, call.args[0]
            elif left is not None:
                scale, value = scale * left, call.args[1]
            elif name == "astype" and "float" in str(call.attrs.dtype):
                value = call.args[0]
            else:
                return value, scale

    def _unscale(self, at: _Peeled) -> float:
        """Peel constants and reshapes; returns the product of the constants."""
        scale = 1.0
        while True:
            at.value, factor = self.scaled(at.value)
            scale *= factor
            call = self.graph.resolve(at.value)
            if op_name(call) != "reshape":
                return scale
            self._through(at, call)

    def _softcap(self, at: _Peeled) -> float | None:
        """Peel cap * tanh(scores * scale / cap), or scores * scale; returns the cap."""
        outer = self._unscale(at)
        call = self.graph.resolve(at.value)
        if op_name(call) != "tanh":
            at.scale = outer
            return None
        at.value = call.args[0]
        at.scale = self._unscale(at) * outer
        return outer

    def _weighted_sum(self, softmax: relax.Var, sinks: bool) -> tuple[relax.Var, relax.Call, bool]:
        """The product with v, and whether the guard where(isnan(p), 0, p) is before it.

        Follows casts, reshapes and p[..., :-1], too.
        """
        var, guarded = softmax, False
        for _ in range(8):
            users = [u for u in self.graph.users[var] if op_name(self.graph.definitions[u]) != "isnan"]
            if len(users) != 1:
                break
            call = self.graph.definitions[users[0]]
            name = op_name(call)
            if name == "matmul" and self.graph.alias(call.args[0]) == var:
                return users[0], call, guarded
            passes = name in ("astype", "") or self._is_merge(call) or (sinks and self._drops_sinks(call))
            if not passes:
                if not self._is_nan_guard(call, var):
                    break
                guarded = True
            var = users[0]
        raise Unread("expected one product of the softmax with the values")

    def _is_merge(self, call: relax.Expr) -> bool:
        """[batch, heads, query, key] -> [batch * heads, query, key]: the order of the elements stays."""
        if op_name(call) != "reshape" or len(dims(call.args[0])) != 4 or len(dims(call)) != 3:
            return False
        b, h, *rest = dims(call.args[0])
        same = tirx.EQ(dims(call)[0], b * h)
        return self.analyzer().can_prove(same) and same_shape(rest, dims(call)[1:])

    def _drops_sinks(self, call: relax.Expr) -> bool:
        """p[..., :-1], without the weight of the learned score."""
        if op_name(call) != "strided_slice" or len(call.args[1].fields) != 1:
            return False
        axis, begin = (int64(call.args[i].fields[0]) for i in (1, 2))
        last = static(axis) in (-1, len(dims(call)) - 1)
        whole = tirx.EQ(dims(call)[-1], self.past + self.sequence)
        return last and static(begin) == 0 and self.analyzer().can_prove(whole)

    def _is_nan_guard(self, call: relax.Expr, var: relax.Var) -> bool:
        """where(isnan(p), 0, p), meant for rows that see no key."""
        if op_name(call) != "where":
            return False
        condition, zero, kept = call.args
        test = self.graph.resolve(condition)
        guards = op_name(test) == "isnan" and self.graph.alias(test.args[0]) == var
        return guards and scalar(zero, self.graph) == 0 and self.graph.alias(kept) == var
