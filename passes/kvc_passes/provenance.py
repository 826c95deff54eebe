"""What keys and values are made of: which product of which value, or the same numbers for every head.

An operand [1, heads, n, elements] of an attention is followed back, symbolically, through every change of
layout to the values behind it. Its elements fall into pieces that come from one value each.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from tvm import relax, tirx
from tvm.ir import GenericConst
from tvm.sym import Analyzer

from .conditions import Unprovable
from .element import Elements, Index
from .graph import Graph, dims, op_name, static
from .indices import bind_extent, bind_index, int64, replaced

_LAYOUT = (
    "reshape",
    "permute_dims",
    "expand_dims",
    "squeeze",
    "broadcast_to",
    "strided_slice",
    "split",
    "concat",
    "full",
    "zeros",
)


@dataclass(frozen=True)
class Projection:
    """x @ weight, and a bias that is added to it."""

    x: relax.Var
    """[1, n, depth]; or with further axes of 1, or without the first."""
    weight: relax.Expr
    """[depth, columns]."""
    bias: relax.Expr | None
    """[columns]."""
    product: relax.Var
    """x @ weight, without the bias."""

    @property
    def depth(self) -> int:
        """Elements of x that a token has."""
        return static(dims(self.weight)[0]) or 0


@dataclass(frozen=True)
class Piece:
    """Elements low .. high - 1 of every head; that at d of head h is source[t, first + h * stride + d - low].

    Without a stride they come from the source in another way.
    """

    low: int
    high: int
    source: relax.Var
    first: int = 0
    stride: int | None = None
    projection: Projection | None = None
    """What the source is, if it is one."""

    @property
    def shared(self) -> bool:
        """Whether all heads have the same elements, which are no projection."""
        return self.projection is None and self.stride == 0

    @property
    def width(self) -> int:
        return self.high - self.low


class Provenance:
    """Follows operands of attentions in a flattened graph: values are [1, ..., n, ...]."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        (self.tokens,) = dims(graph.function.params[0])

    def pieces(self, operand: relax.Expr, source: relax.Var | None = None) -> tuple[Piece, ...]:
        """The pieces of an operand [1, heads, n, elements], in order. Raises Unprovable.

        source: a value at which the walk ends, in which all that a token has is its row.
        """
        extent = static(dims(operand)[3]) or 0
        joined: list[Piece] = []
        for piece in self._split(operand, 0, extent, source):
            last = joined[-1] if joined else None
            if last is not None and _continues(last, piece):
                joined[-1] = replace(last, high=piece.high)
            else:
                joined.append(piece)
        return tuple(joined)

    def _split(self, operand: relax.Expr, low: int, high: int, end: relax.Var | None) -> Iterator[Piece]:
        """Halves, until the elements of each come from one value."""
        try:
            yield self._piece(operand, low, high, end)
        except Unprovable:
            if high - low < 2:
                raise
            middle = (low + high) // 2
            yield from self._split(operand, low, middle, end)
            yield from self._split(operand, middle, high, end)

    def _piece(self, operand: relax.Expr, low: int, high: int, end: relax.Var | None) -> Piece:
        analyzer = Analyzer()
        extents = dims(operand)
        bind_extent(analyzer, extents[2], 1)
        h, t = bind_index(analyzer, "h", extents[1]), bind_index(analyzer, "t", extents[2])
        d = bind_index(analyzer, "d", high - low)
        seen: list[tuple[relax.Var, Index, Any]] = []

        def leaf(var: relax.Var) -> Any:
            def record(index: Index) -> Any:
                seen.append((var, index, tirx.Var(f"element_{len(seen)}", "float32")))
                return seen[-1][2]

            return record

        ends = [*self.ends, *([] if end is None else [end])]
        elements = Elements(self.graph, {v: leaf(v) for v in ends}, analyzer)
        value = elements.at(operand, [0, h, t, elements.simplify(d + low)])
        found = next((s for s in seen if isinstance(value, tirx.Var) and s[2].same_as(value)), None)
        if found is None:
            raise Unprovable("its elements come from several values")
        source, index, _ = found
        if source == end:
            index = self.row(source, index)
        at = self.column(elements, index, h, t, d)
        return (
            Piece(low, high, source) if at is None else Piece(low, high, source, *at, self.projection(source))
        )

    @cached_property
    def moving(self) -> set[relax.Var]:
        """The values that depend on the ids of tokens."""
        return self.graph.reachable_from([self.graph.function.params[0]])

    @cached_property
    def turning(self) -> set[relax.Var]:
        """The values that depend on the positions of tokens."""
        return self.graph.reachable_from([self.graph.function.params[1]])

    @cached_property
    def ends(self) -> list[relax.Var]:
        """The values that operands are followed back to."""
        return [v for v in self.graph.order if not self.moves(v)]

    def moves(self, var: relax.Var) -> bool:
        """Whether a value only has the elements of others in other places."""
        value = self.graph.definitions[var]
        if isinstance(value, (relax.Var, relax.TupleGetItem)) or op_name(value) in _LAYOUT:
            return True
        if op_name(value) == "astype":
            return all("float" in str(v.ty.dtype.dtype) for v in (value.args[0], var))
        return op_name(value) == "take" and isinstance(self.graph.resolve(value.args[1]), GenericConst)

    def projection(self, var: relax.Var) -> Projection | None:
        """The product that a value is, with the bias that is added to it."""
        call = self.graph.resolve(var)
        if op_name(call) == "add":
            for value, bias in (call.args, list(call.args)[::-1]):
                product = self._unreshaped(value)
                if op_name(self.graph.resolve(product)) == "matmul" and len(dims(bias)) == 1:
                    found = self.projection(product) if isinstance(product, relax.Var) else None
                    return None if found is None else replace(found, bias=bias)
            return None
        if op_name(call) != "matmul" or len(dims(call.args[1])) != 2:
            return None
        x = call.args[0]
        if not isinstance(x, relax.Var) or static(dims(call.args[1])[0]) is None:
            return None
        return Projection(self.origin(x), call.args[1], None, self.graph.alias(var))

    def origin(self, x: relax.Var) -> relax.Var:
        """The value behind reshapes that only add and remove axes of 1."""
        current = self.graph.alias(x)
        while op_name(call := self.graph.resolve(current)) in ("reshape", "expand_dims", "squeeze"):
            if _wide(call.args[0]) != _wide(current) or not isinstance(call.args[0], relax.Var):
                break
            current = self.graph.alias(call.args[0])
        return current

    def _unreshaped(self, value: relax.Expr) -> relax.Expr:
        """The value behind reshapes, and a rounding of it."""
        current = self.origin(value) if isinstance(value, relax.Var) else value
        call = self.graph.resolve(current)
        rounds = op_name(call) == "astype" and "float" in str(call.args[0].ty.dtype.dtype)
        return self._unreshaped(call.args[0]) if rounds else current

    def row(self, value: relax.Var, index: Index) -> Index:
        """The index [t, column] of an element at [.., heads, t, d], [.., t, heads, d] or the like: all that a
        token has is taken as one axis."""
        extents = dims(value)
        axis = next((i for i, extent in enumerate(extents) if extent.same_as(self.tokens)), None)
        if axis is None:
            raise Unprovable("has elements of a value without tokens")
        column: Any = int64(0)
        for extent, i in (*zip(extents[:axis], index), *zip(extents[axis + 1 :], index[axis + 1 :])):
            column = column * extent + int64(i)
        return [index[axis], column]

    def column(self, elements: Elements, index: Index, h: Any, t: Any, d: Any) -> tuple[int, int] | None:
        """First column and columns a head, where the index is [.., t, first + h * stride + d]."""
        *before, row, column = [int64(i) for i in index]
        if any(elements.simplify(b) != 0 for b in before):
            return None
        zero = replaced(replaced(column, h, 0), d, 0)
        first = elements.simplify(zero)
        stride = elements.simplify(replaced(replaced(column, h, 1), d, 0) - zero)
        if not isinstance(first, int) or not isinstance(stride, int):
            return None
        proved = elements.prove(tirx.EQ(row, t)) and elements.prove(tirx.EQ(column, h * stride + d + first))
        return (first, stride) if proved else None


def _continues(last: Piece, piece: Piece) -> bool:
    """Whether a piece goes on where the one before ends."""
    begins = last.first if last.stride is None else last.first + last.width
    return last.source.same_as(piece.source) and (piece.first, piece.stride) == (begins, last.stride)


def _wide(value: relax.Expr) -> list[str]:
    """The extents that are not 1."""
    return [str(d) for d in dims(value) if static(d) != 1]
