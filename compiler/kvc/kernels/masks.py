"""What a layer's mask says about pages, blocks of keys and single scores.

The keys that a call reads are counted without the pages that no query of it sees: for a window behind sink
keys, `hole` pages are left out between the two, and a key's place in the count is less than its position.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm import tirx

from . import predicate
from .emit import Emitter, Expr, i64, splat

if TYPE_CHECKING:
    from .attention import AttentionShape


class Mask:
    """Emits the mask of a shape. Raises ValueError for one that is none."""

    def __init__(self, e: Emitter, shape: AttentionShape, lanes: int) -> None:
        if shape.sink_keys is not None and shape.window is None:
            raise ValueError("sink keys need a window beside them")
        if min(n for n in (shape.window, shape.chunk, 1) if n is not None) < 1:
            raise ValueError(
                f"a window or chunk of {shape.window or shape.chunk} keys hides a token from itself"
            )
        self.e, self.shape, self.lanes = e, shape, lanes
        self.hole: Expr | None = None
        """Pages left out, once `pages_of` was emitted for a window behind sink keys."""

    @property
    def _sink_pages(self) -> int:
        return -(-(self.shape.sink_keys or 0) // self.shape.page_size)

    def pages_of(self, first: Expr, last: Expr) -> tuple[Expr, Expr]:
        """First and last page that tokens at positions first .. last see, without the hole."""
        shape, size = self.shape, i64(self.shape.page_size)
        begin, end = i64(0), tirx.floordiv(last, size)
        if shape.window is not None:
            oldest = tirx.Max(first - (shape.window - 1), i64(0))
            begin = tirx.floordiv(oldest, size)
        if shape.chunk is not None:
            begin = tirx.floordiv(tirx.floordiv(first, i64(shape.chunk)) * shape.chunk, size)
        if shape.sink_keys is not None:
            self.hole = self.e.bind("hole", tirx.Max(begin - self._sink_pages, i64(0)))
            begin, end = i64(0), end - self.hole
        return self.e.bind("page", begin), self.e.bind("last_page", end)

    def column(self, page: Expr) -> Expr:
        """The block table's column of a counted page."""
        if self.hole is None:
            return page
        return page + tirx.Select(page >= self._sink_pages, self.hole, i64(0))

    def position(self, key: Expr) -> Expr:
        """The position of a counted key."""
        if self.hole is None:
            return key
        size = self.shape.page_size
        return key + tirx.Select(key >= self._sink_pages * size, self.hole * size, i64(0))

    def count(self, position: Expr) -> Expr:
        """Where the key of a call's last position is in the count."""
        return position if self.hole is None else position - self.hole * self.shape.page_size

    def hides(self, start: Expr, count: Expr, first: Expr, last: Expr) -> Expr:
        """Whether a query at first .. last may not see a key of `count` pages from `start`, as counted."""
        shape, size = self.shape, self.shape.page_size
        if shape.predicate is not None:
            return tirx.const(True, "bool")
        # At its equal, too: behind the last page of an odd number the kernel computes it once more.
        hidden = start * size + count * size > self.count(first)
        if shape.window is not None:
            hidden = tirx.Or(hidden, start * size <= last - shape.window)
        if shape.chunk is not None:
            edge = tirx.floordiv(last, i64(shape.chunk)) * shape.chunk
            hidden = tirx.Or(hidden, start * size < edge)
        return hidden

    def seen(self, keys: Expr, position: Expr, head: Expr | None) -> list[Expr]:
        """Conditions, all of which hold where a query at `position` sees a key; int32 vectors."""
        shape = self.shape
        conditions = [keys <= position]
        if shape.window is not None:
            inside = keys > position - self._constant(shape.window)
            if shape.sink_keys is not None:
                inside = tirx.Or(keys < self._constant(shape.sink_keys), inside)
            conditions.append(inside)
        if shape.chunk is not None:
            conditions.append(keys >= position - tirx.floormod(position, self._constant(shape.chunk)))
        if shape.predicate is not None:
            values = {"q": position, "k": keys} | ({} if head is None else {"h": head})
            conditions.append(predicate.condition(shape.predicate, values))
        return conditions

    def _constant(self, value: int) -> Expr:
        return splat(tirx.const(value, "int32"), self.lanes)
