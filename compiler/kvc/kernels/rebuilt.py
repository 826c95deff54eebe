"""Prefill over kept x: keys and values are made again of it, a block at a time, for many queries at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from tvm import tirx

from kvc_passes.weight_format import WeightFormat

from .attention import AttentionShape, extras, pools
from .attention_block import BlockKernel
from .emit import Emitter, Expr, argument, chunks, f32, fold_four, i64, size_var, splat, vec
from .head_product import packed_tensor
from .product import Product
from .traits import CpuTraits
from .weights import Weights

_KEYS = 4
ROWS = 512
"""Query rows of a task: what a block of keys and values costs to make is shared by so many."""
_BLOCK_BYTES = 512 * 1024
"""Rows of x that a block is made of, as float32."""


@dataclass(frozen=True)
class Made:
    """Keys [x W_K, rest of x] and values x W_V of `heads` KV heads, x being its first `depth` elements."""

    heads: int
    key: int
    value: int
    depth: int
    rest: int
    key_format: WeightFormat
    value_format: WeightFormat


def prefill_rebuilt(latent: AttentionShape, made: Made, traits: CpuTraits) -> tirx.PrimFunc:
    """Attention of many tokens a sequence over the pages of a shared shape.

    Arguments of the function: q f32[1, H, n, key + rest], *pools(latent), positions i64[n], tiles i32[t, 3],
    block_table i32[b, m], *extras(latent), W_K and W_V as head_product.packed_tensor has them (absorbed, and
    not), out f32[1, n, H, value]. A task is a sequence and a KV head: its tiles' rows, ROWS at a time.
    """
    e = Emitter()
    n, pages, t, b, m = (size_var(s) for s in ("n", "pages", "t", "b", "m"))
    heads, group = made.heads, latent.heads // made.heads
    q = argument("q", (1, latent.heads, n, made.key + made.rest))
    state = pools(latent, pages)
    positions, tiles = argument("positions", (n,), "int64"), argument("tiles", (t, 3), "int32")
    table, more = argument("block_table", (b, m), "int32"), extras(latent)
    packed = []
    for name, size, inner, format in (
        ("w_key", made.depth, made.key, made.key_format),
        ("w_value", made.value, made.depth, made.value_format),
    ):
        tensor = packed_tensor(heads, size, inner, format, traits)
        packed.append(argument(name, tensor.shape, tensor.dtype))
    out = argument("out", (1, n, latent.heads, made.value))

    def kernel(rows: int, row: Expr, head: Expr) -> Rebuilder:
        return Rebuilder(e, latent, made, traits, rows, state, table, row, more, packed, head)

    attend(e, traits, heads, group, q, positions, tiles, out, kernel)
    inputs = [q, *state.values(), positions, tiles, table, *more.values(), *packed]
    return e.function([*inputs, out], inputs, [out])


def attend(
    e: Emitter,
    traits: CpuTraits,
    heads: int,
    group: int,
    q: Any,
    positions: Any,
    tiles: Any,
    out: Any,
    kernel: Callable[[int, Expr, Expr], BlockKernel],
) -> None:
    """Attention of many tokens a sequence; a task is a sequence and a KV head: its tiles' rows, ROWS at once.

    kernel: makes what attends, of so many rows, for a table row and a KV head.
    """
    t, tokens = tiles.shape[0], max(ROWS // group, 1)
    with e.loop("c", traits.threads, parallel=True) as c:
        count = tirx.floordiv(t * heads - c + (traits.threads - 1), i64(traits.threads))
        with e.loop("i", count) as i:
            task = c + i * traits.threads
            tile = e.bind("tile", tirx.floordiv(task, i64(heads)))
            head = e.bind("head", tirx.floormod(task, i64(heads)))
            row, first, length = segment(e, tiles, t, tile)
            with e.loop("part", tirx.floordiv(length + (tokens - 1), i64(tokens))) as part:
                begin = e.bind("begin", first + part * tokens)
                here = e.bind("here", tirx.Min(length - part * tokens, i64(tokens)))
                own = kernel(tokens * group, row, head)
                position = e.bind("position", positions[begin])
                last = e.bind("last", position + here - 1)
                with e.loop("g", group) as g, e.loop("k", here) as k:
                    own.load_query(q, [i64(0), head * group + g, begin + k], k * group + g, position + k)
                own.pad(here * group, last)
                page, end = own.mask.pages_of(position, last)
                own.run_head(i64(0), here * group, page, end - page + 1, position, last)
                with e.loop("k", here) as k, e.loop("g", group) as g:
                    own.store_output(k * group + g, out, [i64(0), begin + k, head * group + g])


def segment(e: Emitter, tiles: Any, t: Expr, tile: Expr) -> tuple[Expr, Expr, Expr]:
    """Table row, first token and tokens of the sequence that `tile` is the first tile of, else no tokens."""
    found = e.local("segment", 2, "int64")
    row = e.bind("row", tirx.Cast("int64", tiles[tile, i64(0)]))
    e.store(found, tirx.Cast("int64", tiles[tile, i64(1)]), i64(0))
    e.store(found, i64(0), i64(1))
    with e.loop("other", t) as other, e.when(tirx.Cast("int64", tiles[other, i64(0)]) == row):
        e.store(found, tirx.Min(found[i64(0)], tirx.Cast("int64", tiles[other, i64(1)])), i64(0))
        e.store(found, found[i64(1)] + tirx.Cast("int64", tiles[other, i64(2)]), i64(1))
    with e.loop("before", tile) as before, e.when(tirx.Cast("int64", tiles[before, i64(0)]) == row):
        e.store(found, i64(0), i64(1))
    return row, e.bind("first", found[i64(0)]), e.bind("length", found[i64(1)])


class Rebuilder(BlockKernel):
    """Attention of one KV head over keys and values that are made block by block."""

    def __init__(
        self,
        e: Emitter,
        latent: AttentionShape,
        made: Made,
        traits: CpuTraits,
        rows: int,
        state: Mapping[str, Any],
        table: Any,
        row: Expr,
        more: Mapping[str, Any],
        packed: list[Any],
        head: Expr,
        share: Expr | None = None,
    ) -> None:
        size, wide = latent.page_size, made.key + made.rest
        plain = replace(
            latent,
            kv_heads=1,
            heads=latent.heads,
            head_dim=wide,
            value_dim=made.value,
            kv_dtype="float32",
            shared=False,
        )
        keys = max(min(128, _BLOCK_BYTES // (4 * made.depth)), 2 * size)
        keys = keys // (2 * size) * 2 * size
        super().__init__(e, plain, traits, rows, False, keys, {}, table, row, more, share)
        self.made, self.latent, self.packed, self.head = made, latent, packed, head
        self.state, self.traits, self.start = state["x"], traits, i64(0)
        self.stride = -(-made.depth // (2 * self.lanes)) * 2 * self.lanes
        self.x = e.local("x_rows", self.keys * self.stride)
        self.pools = {
            "k": e.local("keys", (self.keys // size, 1, wide, size)),
            "v": e.local("values", (self.keys // size, 1, size, made.value)),
        }

    def page(self, page: Expr) -> Expr:
        return page - self.start

    def prepare(self, start: Expr, count: Expr) -> None:
        made, self.start = self.made, start
        self._load(start, count)
        self.make_keys(count)
        self.product(count, made.value, made.value_format, self.packed[1], self.pools["v"])

    def _load(self, start: Expr, count: Expr) -> None:
        """Rows of x as float32, and what keys have beside their products."""
        e, made, size = self.e, self.made, self.shape.page_size
        with e.loop("p", count) as p:
            page = e.bind("at", BlockKernel.page(self, start + p))
            with e.loop("k", size) as k:
                to = e.bind("to", (p * size + k) * self.stride)
                for offset, width in chunks(made.depth, self.lanes):
                    raw = self.latent.form.element(self.state[page, i64(0), k, vec(i64(offset), width)], 0)
                    e.store(self.x, raw, vec(to + offset, width))
                for offset, width in chunks(self.stride - made.depth, self.lanes):
                    e.store(self.x, splat(f32(0), width), vec(to + made.depth + offset, width))
                with e.loop("j", made.rest) as j:
                    raw = self.latent.form.element(self.state[page, i64(0), k, j + made.depth], 0)
                    e.store(self.pools["k"], raw, p, i64(0), j + made.key, k)

    def make_keys(self, count: Expr) -> None:
        """keys[page, 0, d, key] = x . column d of W_K: vectors along x, summed up at the end."""
        e, made, size = self.e, self.made, self.shape.page_size
        tall = max(1, min(self.registers * 3 // 4 // _KEYS, made.key))
        whole, rest = made.key // tall, made.key % tall
        with e.loop("p", count) as p, e.loop("kg", size // _KEYS) as group:
            key = e.bind("key", (p * size + group * _KEYS) * self.stride)
            with e.loop("dt", whole) as dt:
                self._key_tile(e.bind("d", dt * tall), tall, p, key, group * _KEYS)
            if rest:
                self._key_tile(i64(whole * tall), rest, p, key, group * _KEYS)

    def _key_tile(self, d: Expr, rows: int, page: Expr, key: Expr, first: Expr) -> None:
        e, lanes, w = self.e, self.lanes, self.packed[0]
        panels = self.stride // (2 * lanes)
        reader = Weights(e, self.made.depth, self.made.key, self.made.key_format, lanes)
        reader.buffers = [w]
        acc = e.local("acc", rows * _KEYS * lanes)

        def at(i: Expr, v: int) -> Expr:
            return vec((i * _KEYS + v) * lanes, lanes)

        with e.unrolled("i", rows) as i:
            for v in range(_KEYS):
                e.store(acc, splat(f32(0), lanes), at(i, v))
        with e.loop("panel", panels) as panel:
            for half in range(2):
                column = panel * (2 * lanes) + half * lanes
                xs = [e.bind("xv", self.x[vec(key + v * self.stride + column, lanes)]) for v in range(_KEYS)]
                with e.unrolled("i", rows) as i:
                    wv = e.bind("wv", reader.vector(self.head * panels + panel, d + i, half))
                    for v in range(_KEYS):
                        e.store(acc, acc[at(i, v)] + xs[v] * wv, at(i, v))
        with e.unrolled("i", rows) as i:
            totals = fold_four(e, [acc[at(i, v)] for v in range(_KEYS)])
            e.store(self.pools["k"], totals, page, i64(0), d + i, vec(first, _KEYS))

    def product(self, count: Expr, width: int, format: WeightFormat, packed: Any, to: Any) -> None:
        """to[page, 0, key, :] = x times the head's `packed` weight of `width` columns, in register tiles."""
        e, made, lanes = self.e, self.made, self.lanes
        w = Weights(e, width, made.depth, format, lanes)
        w.buffers = [packed]
        panels = -(-width // (2 * lanes))
        product = _Rows(
            e, width, made.depth, self.traits, self.x, w, None, to, False, made.depth,
            self.stride, self.shape.page_size, self.head * panels,
        )  # fmt: skip
        rows = count * self.shape.page_size
        tall = self.shape.page_size // 2 if self.shape.page_size // 2 <= self.traits.tile_rows else 4
        with e.loop("b", panels) as block, e.loop("rt", tirx.floordiv(rows, i64(tall))) as rt:
            product.tile(tall, block, e.bind("row", rt * tall), i64(0), i64(made.depth))


@dataclass(frozen=True)
class _Rows(Product):
    """Keys or values of a block, as Product computes them."""

    stride: int = 0
    page: int = 16
    first: Expr = 0

    def out(self, row: Expr, column: Expr) -> list[Expr]:
        return [tirx.floordiv(row, i64(self.page)), i64(0), tirx.floormod(row, i64(self.page)), column]

    def source(self, row: Expr, k: Expr) -> Expr:
        return self.x[row * self.stride + k]

    def weight(self, block: Expr, k: Expr, v: int) -> Expr:
        return self.w.vector(self.first + block, k, v)
