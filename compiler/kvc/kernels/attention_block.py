"""The flash-attention core that prefill and decode share: rows of queries against blocks of pages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tvm import tirx

from . import vector_math
from .block_softmax import NEVER, BlockSoftmax
from .emit import Emitter, Expr, chunks, f32, i64, splat, vec
from .masks import Mask
from .predicate import names
from .shared_keys import SharedKeys
from .sliced import SlicedKeys
from .traits import CpuTraits

if TYPE_CHECKING:
    from .attention import AttentionShape

_BLOCK_BYTES = 512 * 1024
"""Keys that are values, too, stay in the second-level cache between the two."""


class BlockKernel:
    """Emits the steps of one task: load queries, run over a range of pages, store the result.

    rows: query rows of a KV head at most; they are padded to whole register tiles.
    streaming: a task has all KV heads (run_heads), and keeps all their scores; else one (run_head).
    keys: keys of a block, whose scores are kept between the two products.
    extras: the arguments attention.extras.
    share: which share of the keys the task has; scores that count once belong to the first.
    ahead: of a streaming task, pages that are fetched ahead of their use, 0 for none.
    """

    def __init__(
        self,
        e: Emitter,
        shape: AttentionShape,
        traits: CpuTraits,
        rows: int,
        streaming: bool,
        keys: int,
        pools: Mapping[str, Any],
        table: Any,
        row: Expr,
        extras: Mapping[str, Any],
        share: Expr | None = None,
        ahead: int = 0,
    ) -> None:
        self.e, self.shape, self.lanes, self.registers = e, shape, traits.lanes, traits.registers
        self.extras, self.share, self.mask = extras, share, Mask(e, shape, traits.lanes)
        self.pools, self.form = pools, shape.form
        self.table, self.row = table, row
        self.ahead, self._following = ahead, None
        tiles = -(-rows // traits.tile_rows)
        self.height = -(-rows // tiles) if tiles < 3 else traits.tile_rows
        self.padded = -(-rows // self.height) * self.height
        per_page = shape.page_size // self.lanes
        if shape.page_size % self.lanes or (per_page > 1 and per_page % 2):
            raise ValueError(
                f"page size {shape.page_size} is not one or an even number of {self.lanes}-lane vectors"
            )
        self.together = 2 if per_page == 1 and not streaming and not shape.shared else 1
        """Pages whose keys share a register tile: their vectors make it two wide."""
        self.width = self.together if per_page == 1 else 2
        if shape.shared:  # which are read once for the scores and once as values
            keys = min(keys, max(_BLOCK_BYTES // (4 * shape.head_dim), 1))
        self.keys = -(-keys // (2 * shape.page_size)) * 2 * shape.page_size
        total = shape.kv_heads * self.padded if streaming else self.padded
        self.query = e.local("query", total * shape.query_dim)
        self.output = e.local("output", total * shape.value_dim)
        self.sliced = None if shape.sliced is None else SlicedKeys(self, shape.sliced)
        self.scores = e.local("scores", (total if streaming else self.height) * self.keys)
        self.positions = e.local("row_position", total, "int32")
        self.maximum = e.local("maximum", total)
        self.total = e.local("total", total)
        self.heads: Any = None
        if shape.slopes or shape.distances or (shape.predicate is not None and "h" in names(shape.predicate)):
            self.heads = e.local("row_head", total, "int32")
        self.softmax = BlockSoftmax(self)

    def load_query(self, q: Any, at: Sequence[Expr], row: Expr, position: Expr) -> None:
        """Row `row` is q[at], scaled; without a softcap the scale includes the change to base 2."""
        factor = self.shape.scale * (1.0 if self.shape.softcap else vector_math.LOG2E)
        for start, width in chunks(self.shape.query_dim, self.lanes):
            value = q[(*at, vec(i64(start), width))] * splat(f32(factor), width)
            self.e.store(self.query, value, vec(row * self.shape.query_dim + start, width))
        self._begin_row(row, position, at[1])

    def _begin_row(self, row: Expr, position: Expr, head: Expr) -> None:
        self.e.store(self.positions, tirx.Cast("int32", position), row)
        if self.heads is not None:
            self.e.store(self.heads, tirx.Cast("int32", head), row)
        highest, total = f32(NEVER), f32(0)
        if "sinks" in self.extras:
            highest, total = self.extras["sinks"][head] * f32(vector_math.LOG2E), f32(1)
            if self.share is not None:
                total = tirx.Select(self.share == 0, f32(1), f32(0))
        self.e.store(self.maximum, highest, row)
        self.e.store(self.total, total, row)
        for start, width in chunks(self.shape.value_dim, self.lanes):
            self.e.store(self.output, splat(f32(0), width), vec(row * self.shape.value_dim + start, width))

    def pad(self, used: Expr, position: Expr) -> None:
        """Zero the rows after `used` in its register tile."""
        whole = tirx.floordiv(used + (self.height - 1), i64(self.height)) * self.height
        with self.e.loop("r", whole - used) as r:
            row = used + r
            for start, width in chunks(self.shape.query_dim, self.lanes):
                self.e.store(self.query, splat(f32(0), width), vec(row * self.shape.query_dim + start, width))
            self._begin_row(row, position, i64(0))

    def run_head(self, head: Expr, rows: Expr, page: Expr, pages: Expr, first: Expr, last: Expr) -> None:
        """Attend with the rows of one KV head over `pages` pages from `page`; positions are first .. last."""
        e, size = self.e, self.shape.page_size
        tiles = e.bind("tiles", tirx.floordiv(rows + (self.height - 1), i64(self.height)))
        with self._blocks(page, pages, first, last) as (start, count, keys, masked):
            self.prepare(start, count)
            with e.loop("rt", tiles) as rt:
                row = e.bind("top", rt * self.height)
                # Positions do not fall from row to row: the tile sees nothing behind its last one's.
                newest = tirx.Cast("int64", self.positions[row + self.height - 1])
                seen = e.bind("seen", tirx.Min(keys, self.mask.count(newest) + 1 - start * size))
                with e.when(seen > 0):
                    whole = e.bind("seen_pages", tirx.floordiv(seen + (size - 1), i64(size)))
                    self._score(head, row, i64(0), start, whole, i64(0))
                    self.softmax.weights(row, i64(0), start, self._vectors(whole), masked)
                    self._values(head, row, i64(0), start, whole, seen, i64(0))

    def prepare(self, start: Expr, count: Expr) -> None:
        """What has to be done before the products with a block of `count` pages from `start`."""
        if self.sliced is not None:
            self.sliced.turn(start, count)

    def run_heads(self, page: Expr, pages: Expr, position: Expr) -> None:
        """Attend with one token of every head. Whole pages pass in order of their addresses: memory-bound."""
        e, heads, size = self.e, self.shape.kv_heads, self.shape.page_size
        tiles = self.padded // self.height
        with self._blocks(page, pages, position, position) as (start, count, keys, masked):
            with e.loop("p", count) as p:
                self._look_ahead(start + p, page + pages - 1)
                with e.loop("h", heads) as head, e.loop("rt", tiles) as rt:
                    row = e.bind("top", head * self.padded + rt * self.height)
                    self._score(head, row, row, start + p, i64(1), p * size)
            with e.loop("rt", heads * tiles) as rt:
                row = e.bind("top", rt * self.height)
                self.softmax.weights(row, row, start, self._vectors(count), masked)
            with e.loop("p", count) as p:
                self._look_ahead(start + p, page + pages - 1)
                with e.loop("h", heads) as head, e.loop("rt", tiles) as rt:
                    row = e.bind("top", head * self.padded + rt * self.height)
                    self._values(head, row, row, start + p, i64(1), keys - p * size, p * size)

    def _look_ahead(self, page: Expr, last: Expr) -> None:
        """Pages lie anywhere, so that hardware cannot know which comes after `page`."""
        if self.ahead:
            self._following = self.page(tirx.Min(page + self.ahead, last))

    def _fetch(self, pool: str, head: Expr, rows: int, columns: Sequence[int]) -> None:
        """Fetch what will be read at the same places of a later page."""
        if self._following is not None:
            with self.e.loop("f", rows) as row:
                for column in columns:
                    self.e.prefetch(self.pools[pool], self._following, head, row, i64(column))

    @contextmanager
    def _blocks(self, page: Expr, pages: Expr, first: Expr, last: Expr) -> Iterator[tuple[Expr, ...]]:
        """The loop over blocks: first page, pages, existing keys, and whether a pair is masked."""
        e, size = self.e, self.shape.page_size
        step = self.keys // size
        pages = e.bind("pages", tirx.Max(pages, i64(0)))
        with e.loop("kb", tirx.floordiv(pages + (step - 1), i64(step))) as kb:
            start = e.bind("start", page + kb * step)
            count = e.bind("count", tirx.Min(pages - kb * step, i64(step)))
            keys = e.bind("keys", tirx.Min(count * size, self.mask.count(last) + 1 - start * size))
            yield start, count, keys, self.mask.hides(start, count, first, last)

    def _vectors(self, count: Expr) -> Expr:
        """Vectors of scores of `count` pages."""
        groups = tirx.floordiv(count + (self.together - 1), i64(self.together))
        return self.e.bind("vectors", groups * (self.together * self.shape.page_size // self.lanes))

    def page(self, page: Expr) -> Expr:
        """Where a page of the sequence is in the pools."""
        return self.e.bind("at", tirx.Cast("int64", self.table[self.row, self.mask.column(page)]))

    def _score(self, head: Expr, row: Expr, slot: Expr, start: Expr, count: Expr, base: Expr) -> None:
        """scores[slot + i, base + j] = query row (row + i) . key j of `count` pages from `start`."""
        if self.sliced is not None:
            self.sliced.score(row, slot, count)
            return
        if self.shape.shared:
            SharedKeys(self).score(head, row, slot, start, count, base)
            return
        e, lanes, dim, height, width = self.e, self.lanes, self.shape.head_dim, self.height, self.width
        parts, depth = self.form.parts, dim // self.form.parts
        splits = max(1, 8 // (width * height))
        splits = min(1 << (splits.bit_length() - 1), depth & -depth)  # powers of two; no element is left over
        groups = tirx.floordiv(count + (self.together - 1), i64(self.together))
        with e.loop("kg", groups) as kg:
            columns = [tirx.Min(kg * self.together + j, count - 1) for j in range(self.together)]
            pages = [self.page(start + at) for at in columns]
            vectors = [(page, at) for page in pages for at in range(0, self.shape.page_size, lanes)]
            for sub in range(0, len(vectors), width):
                acc = e.local("acc", splits * height * width * lanes)

                def at(i: Expr, v: int, s: int = 0) -> Expr:
                    return vec(((s * height + i) * width + v) * lanes, lanes)

                with e.unrolled("i", splits * height) as i:
                    for v in range(width):
                        e.store(acc, splat(f32(0), lanes), at(i, v))
                self._fetch("k", head, depth, [offset for _, offset in vectors[sub : sub + width]])
                with e.loop("d", depth // splits) as d:
                    for s in range(splits):
                        inner = d * splits + s
                        raw = [
                            self._loaded(self.pools["k"][page, head, inner, vec(i64(offset), lanes)])
                            for page, offset in vectors[sub : sub + width]
                        ]
                        for part in range(parts):
                            keys = [e.bind("kv", self.form.element(r, part)) for r in raw]
                            element = inner + part * depth
                            with e.unrolled("i", height) as i:
                                qv = e.bind("qv", splat(self.query[(row + i) * dim + element], lanes))
                                for v in range(width):
                                    e.store(acc, acc[at(i, v, s)] + keys[v] * qv, at(i, v, s))
                scales = self._key_scales(head, vectors[sub : sub + width])
                with e.unrolled("i", height) as i:
                    for v in range(width):
                        value = acc[at(i, v)]
                        for s in range(1, splits):
                            value = value + acc[at(i, v, s)]
                        to = (slot + i) * self.keys + base + (kg * len(vectors) + sub + v) * lanes
                        e.store(self.scores, value * scales[v] if scales else value, vec(to, lanes))

    def _key_scales(self, head: Expr, vectors: Sequence[tuple[Expr, int]]) -> list[Expr]:
        """The scales of vectors of keys that are codes, else none."""
        if self.form.name is None:
            return []
        pool = self.pools["k_scale"]
        loaded = (pool[page, head, vec(i64(offset), self.lanes)] for page, offset in vectors)
        return [self.e.bind("ks", self.form.scale(raw)) for raw in loaded]

    def _values(
        self, head: Expr, row: Expr, slot: Expr, start: Expr, count: Expr, keys: Expr, base: Expr
    ) -> None:
        """output += weights v over `count` pages from `start`, of which only `keys` keys exist."""
        e, dim, size, height = self.e, self.shape.value_dim, self.shape.page_size, self.height
        parts, half = self.form.parts, dim // self.form.parts
        columns = chunks(half, self.lanes)
        each = (2 if height > 3 else 4) // parts
        for group in (columns[i : i + each] for i in range(0, len(columns), each)):
            places = [(offset + part * half, width) for offset, width in group for part in range(parts)]
            acc = [e.local("acc", height * width) for _, width in places]
            with e.unrolled("i", height) as i:
                for a, (offset, width) in zip(acc, places):
                    e.store(a, self.output[vec((row + i) * dim + offset, width)], vec(i * width, width))
            with e.loop("p", count) as p:
                page = self.page(start + p)
                self._fetch("x" if self.shape.shared else "v", head, size, [at for at, _ in group])
                with e.loop("k", tirx.Min(keys - p * size, i64(size))) as k:
                    values = self._loaded_values(page, head, k, group)
                    scale = None
                    if self.form.name is not None:
                        scale = e.bind("vs", self.form.scale(self.pools["v_scale"][page, head, k]))
                    with e.unrolled("i", height) as i:
                        weight = self.scores[(slot + i) * self.keys + base + p * size + k]
                        weight = e.bind("pv", weight if scale is None else weight * scale)
                        for a, value, (_, width) in zip(acc, values, places):
                            at = vec(i * width, width)
                            e.store(a, a[at] + value * splat(weight, width), at)
            with e.unrolled("i", height) as i:
                for a, (offset, width) in zip(acc, places):
                    e.store(self.output, a[vec(i * width, width)], vec((row + i) * dim + offset, width))

    def _loaded(self, raw: Expr) -> Expr:
        """What was loaded, read once where it holds several elements. TVM cannot bind a bfloat16."""
        return self.e.bind("raw", raw) if self.form.parts > 1 else raw

    def _loaded_values(
        self, page: Expr, head: Expr, key: Expr, columns: Sequence[tuple[int, int]]
    ) -> list[Expr]:
        """A key's values at columns of a page, one vector for each element of what stands there."""
        e, pool = self.e, self.pools["x" if self.shape.shared else "v"]
        raw = [self._loaded(pool[page, head, key, vec(i64(offset), width)]) for offset, width in columns]
        return [e.bind("vv", self.form.element(r, part)) for r in raw for part in range(self.form.parts)]

    def store_output(self, row: Expr, out: Any, at: Sequence[Expr]) -> None:
        """out[at] = the finished row."""
        total = self.e.bind("sum", self.total[row])
        for start, width in chunks(self.shape.value_dim, self.lanes):
            value = self.output[vec(row * self.shape.value_dim + start, width)]
            value = normalized(self.shape.guarded, value, total, width)
            self.e.store(out, value, *at, vec(i64(start), width))

    def store_part(self, row: Expr, part: Any, at: Sequence[Expr]) -> None:
        """part[at] = (unnormalised values, maximum, sum) of the row over this share of the keys."""
        dim = self.shape.value_dim
        for start, width in chunks(dim, self.lanes):
            self.e.store(part, self.output[vec(row * dim + start, width)], *at, vec(i64(start), width))
        self.e.store(part, self.maximum[row], *at, i64(dim))
        self.e.store(part, self.total[row], *at, i64(dim + 1))


def normalized(guarded: bool, values: Expr, total: Expr, width: int) -> Expr:
    """`width` values over the sum of the weights, which is NaN where a weight is."""
    value = values * splat(f32(1) / total, width)
    # A sum of weights is above zero unless it is NaN, and comparisons with NaN are false.
    return (
        tirx.Select(splat(total, width) > splat(f32(0), width), value, splat(f32(0), width))
        if guarded
        else value
    )
