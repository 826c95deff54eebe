"""The flash-attention core that prefill and decode share: rows of queries against blocks of pages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tvm import tirx

from . import vector_math
from .emit import Emitter, Expr, f32, i64, splat, vec
from .traits import CpuTraits

if TYPE_CHECKING:
    from .attention import AttentionShape

_NEVER = -1e30
"""Score of a masked key, and the maximum before the first key: finite, so that differences are too."""


def chunks(size: int, lanes: int) -> list[tuple[int, int]]:
    """(offset, width) of the vectors that cover `size` elements; the last ones may be narrower."""
    result, at = [], 0
    while at < size:
        while lanes > size - at:
            lanes //= 2
        result.append((at, lanes))
        at += lanes
    return result


def copy_rows(
    e: Emitter, source: Any, at: Sequence[Expr], target: Any, to: Sequence[Expr], size: int, lanes: int
) -> None:
    """Copy a row of `size` elements by vectors."""
    for start, width in chunks(size, lanes):
        index = vec(i64(start), width)
        e.store(target, source[(*at, index)], *to, index)


def _reduce(value: Expr, combine: Any) -> Expr:
    """A vector folded into one element."""
    name, _, count = str(value.ty.dtype).partition("x")
    width = int(count or 1)
    while width > 2:
        width //= 2
        half = f"{name}x{width}"
        value = combine(tirx.vectorlow(half, value), tirx.vectorhigh(half, value))
    if width == 2:
        value = combine(*(tirx.Shuffle([value], [tirx.const(i, "int32")]) for i in range(2)))
    return value


class BlockKernel:
    """Emits the steps of one task: load queries, run over a range of pages, store the result.

    rows: query rows of the task at most; they are padded to whole register tiles.
    keys: keys of a block, whose scores are kept between the two products.
    """

    def __init__(
        self,
        e: Emitter,
        shape: AttentionShape,
        traits: CpuTraits,
        rows: int,
        keys: int,
        kpool: Any,
        vpool: Any,
        table: Any,
        row: Expr,
        head: Expr,
    ) -> None:
        self.e, self.shape, self.lanes = e, shape, traits.lanes
        self.kpool, self.vpool, self.table, self.row, self.head = kpool, vpool, table, row, head
        tiles = -(-rows // traits.tile_rows)
        self.height = min(traits.tile_rows, -(-rows // tiles)) if tiles < 3 else traits.tile_rows
        self.rows = -(-rows // self.height) * self.height
        self.per_page = shape.page_size // self.lanes
        if shape.page_size % self.lanes or (self.per_page > 1 and self.per_page % 2):
            raise ValueError(f"page size {shape.page_size} is not one or an even number of {self.lanes}-lane vectors")
        self.keys = -(-keys // (2 * shape.page_size)) * 2 * shape.page_size
        self.query = e.local("query", self.rows * shape.head_dim)
        self.output = e.local("output", self.rows * shape.value_dim)
        self.scores = e.local("scores", self.height * self.keys)
        self.positions = e.local("row_position", self.rows, "int32")
        self.maximum = e.local("maximum", self.rows)
        self.total = e.local("total", self.rows)
        self.factor = e.local("factor", self.height)

    def load_query(self, q: Any, at: Sequence[Expr], row: Expr, position: Expr) -> None:
        """Row `row` is q[at], scaled; without a softcap the scale includes the change to base 2."""
        factor = self.shape.scale * (1.0 if self.shape.softcap else vector_math.LOG2E)
        for start, width in chunks(self.shape.head_dim, self.lanes):
            value = q[(*at, vec(i64(start), width))] * splat(f32(factor), width)
            self.e.store(self.query, value, vec(row * self.shape.head_dim + start, width))
        self._begin_row(row, position)

    def _begin_row(self, row: Expr, position: Expr) -> None:
        self.e.store(self.positions, tirx.Cast("int32", position), row)
        self.e.store(self.maximum, f32(_NEVER), row)
        self.e.store(self.total, f32(0), row)
        for start, width in chunks(self.shape.value_dim, self.lanes):
            self.e.store(self.output, splat(f32(0), width), vec(row * self.shape.value_dim + start, width))

    def pad(self, used: Expr, position: Expr) -> None:
        """Zero the rows of the last register tile that hold no query."""
        whole = tirx.floordiv(used + (self.height - 1), i64(self.height)) * self.height
        with self.e.loop("r", whole - used, start=i64(0)) as r:
            row = used + r
            for start, width in chunks(self.shape.head_dim, self.lanes):
                self.e.store(self.query, splat(f32(0), width), vec(row * self.shape.head_dim + start, width))
            self._begin_row(row, position)

    def pages_of(self, first: Expr, last: Expr) -> tuple[Expr, Expr]:
        """First and last page that tokens at positions first .. last see, as columns of the block table."""
        begin = i64(0)
        if self.shape.window is not None:
            begin = tirx.floordiv(tirx.Max(first - (self.shape.window - 1), i64(0)), i64(self.shape.page_size))
        end = tirx.floordiv(last, i64(self.shape.page_size))
        return self.e.bind("page", begin), self.e.bind("last_page", end)

    def run(self, rows: Expr, page: Expr, pages: Expr, first: Expr, last: Expr) -> None:
        """Attend over `pages` pages (none when negative) from `page`; positions are first .. last."""
        e, size = self.e, self.shape.page_size
        step = self.keys // size
        tiles = e.bind("tiles", tirx.floordiv(rows + (self.height - 1), i64(self.height)))
        pages = e.bind("pages", tirx.Max(pages, i64(0)))
        with e.loop("kb", tirx.floordiv(pages + (step - 1), i64(step))) as kb:
            start = e.bind("start", page + kb * step)
            count = e.bind("count", tirx.Min(pages - kb * step, i64(step)))
            keys = e.bind("keys", tirx.Min(count * size, last + 1 - start * size))
            with e.loop("rt", tiles) as rt:
                row = e.bind("top", rt * self.height)
                pairs = self._score(row, start, count)
                vectors = e.bind("vectors", pairs * 2)
                if self.shape.softcap:
                    self._softcap(vectors)
                masked = start * size + count * size - 1 > first
                if self.shape.window is not None:
                    masked = tirx.Or(masked, start * size <= last - self.shape.window)
                with e.when(masked):
                    self._mask(row, start * size, vectors)
                self._softmax(row, vectors)
                self._values(row, start, count, keys)

    def _page(self, column: Expr) -> Expr:
        return self.e.bind("at", tirx.Cast("int64", self.table[self.row, column]))

    def _score(self, row: Expr, start: Expr, count: Expr) -> Expr:
        """scores[i, j] of a row tile and the block's keys, two vectors of keys at a time."""
        e, lanes, dim, height = self.e, self.lanes, self.shape.head_dim, self.height
        together = 2 if self.per_page == 1 else 1
        steps = max(1, self.per_page // 2)
        splits = 4 if height == 1 else 2 if height <= 3 else 1
        groups = e.bind("groups", tirx.floordiv(count + (together - 1), i64(together)))
        with e.loop("kg", groups) as kg:
            pages = [self._page(start + tirx.Min(kg * together + j, count - 1)) for j in range(together)]
            for sub in range(steps):
                acc = e.local("acc", splits * height * 2 * lanes)

                def at(i: Expr, v: int, s: int = 0) -> Expr:
                    return vec(((s * height + i) * 2 + v) * lanes, lanes)

                with e.unrolled("i", splits * height) as i:
                    for v in range(2):
                        e.store(acc, splat(f32(0), lanes), at(i, v))
                with e.loop("d", dim // splits) as d:
                    for s in range(splits):
                        inner = d * splits + s
                        keys = [
                            e.bind("kv", self.kpool[pages[v % together], self.head, inner, vec(i64(offset), lanes)])
                            for v, offset in enumerate((0, 0) if together == 2 else (sub * 2 * lanes, (sub * 2 + 1) * lanes))
                        ]
                        with e.unrolled("i", height) as i:
                            qv = e.bind("qv", splat(self.query[(row + i) * dim + inner], lanes))
                            for v in range(2):
                                e.store(acc, acc[at(i, v, s)] + keys[v] * qv, at(i, v, s))
                with e.unrolled("i", height) as i:
                    for v in range(2):
                        value = acc[at(i, v)]
                        for s in range(1, splits):
                            value = value + acc[at(i, v, s)]
                        e.store(self.scores, value, vec(i * self.keys + ((kg * steps + sub) * 2 + v) * lanes, lanes))
        return groups * steps

    def _softcap(self, vectors: Expr) -> None:
        e, cap = self.e, float(self.shape.softcap or 1.0)
        with e.loop("i", self.height) as i, e.loop("v", vectors) as v:
            at = vec(i * self.keys + v * self.lanes, self.lanes)
            value = self.scores[at] * splat(f32(1 / cap), self.lanes)
            value = vector_math.tanh(e.bind, value) * splat(f32(cap * vector_math.LOG2E), self.lanes)
            e.store(self.scores, value, at)

    def _mask(self, row: Expr, key: Expr, vectors: Expr) -> None:
        e, lanes = self.e, self.lanes
        never = splat(f32(_NEVER), lanes)
        with e.loop("i", self.height) as i:
            position = e.bind("row_at", splat(self.positions[row + i], lanes))
            with e.loop("v", vectors) as v:
                at = vec(i * self.keys + v * lanes, lanes)
                keys = e.bind("key", vec(tirx.Cast("int32", key + v * lanes), lanes))
                value = tirx.Select(keys <= position, self.scores[at], never)
                if self.shape.window is not None:
                    edge = position - splat(tirx.const(self.shape.window, "int32"), lanes)
                    value = tirx.Select(keys > edge, value, never)
                e.store(self.scores, value, at)

    def _softmax(self, row: Expr, vectors: Expr) -> None:
        """Turn scores into weights of the running softmax; `factor` rescales what was summed before."""
        e, lanes = self.e, self.lanes
        with e.loop("i", self.height) as i:
            top = e.local("vmax", lanes)
            every = vec(i64(0), lanes)
            e.store(top, splat(f32(_NEVER), lanes), every)
            with e.loop("v", vectors) as v:
                e.store(top, tirx.Max(top[every], self.scores[vec(i * self.keys + v * lanes, lanes)]), every)
            before = e.bind("before", self.maximum[row + i])
            highest = e.bind("highest", tirx.Max(before, _reduce(top[every], tirx.Max)))
            e.store(self.maximum, highest, row + i)
            factor = e.bind("rescale", vector_math.exp2_nonpositive(e.bind, before - highest))
            e.store(self.factor, factor, i)
            shift = e.bind("shift", splat(highest, lanes))
            e.store(top, splat(f32(0), lanes), every)
            with e.loop("v", vectors) as v:
                at = vec(i * self.keys + v * lanes, lanes)
                weight = e.bind("weight", vector_math.exp2_nonpositive(e.bind, self.scores[at] - shift))
                e.store(self.scores, weight, at)
                e.store(top, top[every] + weight, every)
            total = self.total[row + i] * factor + _reduce(top[every], lambda a, b: a + b)
            e.store(self.total, total, row + i)

    def _values(self, row: Expr, start: Expr, count: Expr, keys: Expr) -> None:
        """output = output * factor + scores v, over the block's existing keys only."""
        e, dim, size, height = self.e, self.shape.value_dim, self.shape.page_size, self.height
        columns = chunks(dim, self.lanes)
        each = 2 if height > 3 else min(len(columns), 4)
        for group in (columns[i : i + each] for i in range(0, len(columns), each)):
            acc = [e.local("acc", height * width) for _, width in group]
            with e.unrolled("i", height) as i:
                for a, (offset, width) in zip(acc, group):
                    old = self.output[vec((row + i) * dim + offset, width)] * splat(self.factor[i], width)
                    e.store(a, old, vec(i * width, width))
            with e.loop("p", count) as p:
                page = self._page(start + p)
                with e.loop("k", tirx.Min(keys - p * size, i64(size))) as k:
                    values = [
                        e.bind("vv", self.vpool[page, self.head, k, vec(i64(offset), width)])
                        for offset, width in group
                    ]
                    with e.unrolled("i", height) as i:
                        weight = e.bind("pv", self.scores[i * self.keys + p * size + k])
                        for a, value, (_, width) in zip(acc, values, group):
                            at = vec(i * width, width)
                            e.store(a, a[at] + value * splat(weight, width), at)
            with e.unrolled("i", height) as i:
                for a, (offset, width) in zip(acc, group):
                    e.store(self.output, a[vec(i * width, width)], vec((row + i) * dim + offset, width))

    def store_output(self, row: Expr, out: Any, at: Sequence[Expr]) -> None:
        """out[at] = the finished row."""
        scale = self.e.bind("scale", f32(1) / self.total[row])
        for start, width in chunks(self.shape.value_dim, self.lanes):
            value = self.output[vec(row * self.shape.value_dim + start, width)] * splat(scale, width)
            self.e.store(out, value, *at, vec(i64(start), width))

    def store_part(self, row: Expr, part: Any, at: Sequence[Expr]) -> None:
        """part[at] = (unnormalised values, maximum, sum) of the row over this share of the keys."""
        dim = self.shape.value_dim
        for start, width in chunks(dim, self.lanes):
            self.e.store(part, self.output[vec(row * dim + start, width)], *at, vec(i64(start), width))
        self.e.store(part, self.maximum[row], *at, i64(dim))
        self.e.store(part, self.total[row], *at, i64(dim + 1))

    def merge(self, part: Any, shares: int, row: Expr, head: Expr, out: Any) -> None:
        """out[0, row, head] = the shares put together."""
        e, dim = self.e, self.shape.value_dim
        top = part[row, i64(0), head, i64(dim)]
        for s in range(1, shares):
            top = tirx.Max(top, part[row, i64(s), head, i64(dim)])
        top = e.bind("top", top)
        weights = [
            e.bind("w", vector_math.exp2_nonpositive(e.bind, part[row, i64(s), head, i64(dim)] - top))
            for s in range(shares)
        ]
        total = sum(
            (w * part[row, i64(s), head, i64(dim + 1)] for s, w in enumerate(weights)), start=f32(0)
        )
        scale = e.bind("scale", f32(1) / total)
        for start, width in chunks(dim, self.lanes):
            index = vec(i64(start), width)
            value = splat(f32(0), width)
            for s, w in enumerate(weights):
                value = value + part[row, i64(s), head, index] * splat(w, width)
            e.store(out, value * splat(scale, width), i64(0), row, head, index)
