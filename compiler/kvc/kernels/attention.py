"""Attention over paged keys and values: prefill and decode kernels (append.py fills the pages).

A page holds K transposed, [head_dim, page_size], so that scores of a vector of tokens need no shuffles, and
V as [page_size, value_dim]. Softmax runs online over blocks of pages in base 2. The pages read are exactly
those of a tile's window, so the table's other entries may be anything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx

from kvc_passes.sites import Sliced

from . import vector_math
from .attention_block import BlockKernel, normalized
from .emit import Emitter, Expr, argument, chunks, f32, i64, size_var, splat, vec
from .knobs import DECODE, DecodeKnobs
from .stored import Stored
from .traits import CpuTraits


@dataclass(frozen=True)
class AttentionShape:
    """One attention layer: softmax(softcap(scale * q k^T) masked) v, heads grouped over kv_heads."""

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    scale: float
    softcap: float | None = None
    window: int | None = None
    """A query at q sees keys k > q - window (and none after q, as always)."""
    chunk: int | None = None
    """A query at q sees keys of its own chunk, k // chunk == q // chunk."""
    sink_keys: int | None = None
    """With a window: keys that every later query sees too."""
    predicate: str | None = None
    """Any other mask, as predicate.condition takes it; what it allows has k <= q."""
    slopes: bool = False
    """Whether slopes[h] * (k - q) is added to the scores, after the softcap (ALiBi)."""
    distances: int = 0
    """Of bias[h, min(q - k, distances - 1)], which is added to the scores, after the softcap; 0 for none."""
    sink_scores: bool = False
    """Whether every head has a score of its own in the softmax, which has no value."""
    guarded: bool = False
    """Whether a row that has NaN in its softmax comes out as 0, and not as NaN."""
    kv_dtype: str = "float32"
    """What the pages hold: float32, float16 or bfloat16."""
    stored: str | None = None
    """Codes that they hold instead, as AttentionSite.stored."""
    shared: bool = False
    """Whether a token's value is the first value_dim elements of its key, which is kept once."""
    sliced: Sliced | None = None
    """Of a shared shape: how a query meets its own part of a key, which is turned first."""
    whole: bool = False
    """Whether a query sees the keys up to its position, and those of a sequence have the same: the last."""
    page_size: int = 16

    @property
    def query_dim(self) -> int:
        """Elements of a query, D of q."""
        return self.head_dim if self.sliced is None else self.sliced.dim

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.heads // self.kv_heads

    @property
    def form(self) -> Stored:
        """How elements stand in pages."""
        return Stored(self.stored, self.kv_dtype)


def choose_tile(group: int, traits: CpuTraits, dim: int = 128) -> int:
    """Query tokens of a prefill tile: about 84 rows, nearly a whole number of register tiles.

    dim: elements of a query; the queries and outputs of a tile stay in the second-level cache.
    """
    rows = traits.tile_rows
    wanted = min(84, max(_TILE_BYTES // (8 * dim), 1))

    def cost(tokens: int) -> tuple[float, float]:
        used = tokens * group
        waste = -(-used // rows) * rows / used - 1
        return (round(waste, 2) + abs(used - wanted) / 1000, used)

    return min(range(1, 129), key=cost)


def call_tile(tile: int, tokens: int, shared: Sequence[tuple[int, int]], traits: CpuTraits) -> int:
    """Query tokens, at most `tile`, of the tasks of calls of so many tokens of one sequence.

    Threads take tasks in turn. Where a call has few, smaller ones keep all threads busy for more of the time.

    shared: query heads of a KV head, and KV heads, of each attention; with none, `tile` it is.
    """

    def cost(size: int) -> float:
        """Register tiles of the thread that has the most, and a little for keys that are read more often."""
        sizes = [min(size, tokens - i) for i in range(0, tokens, size)]
        most = 0
        for group, heads in shared:
            tasks = [-(-s * group // traits.tile_rows) for s in sizes for _ in range(heads)]
            most += max(sum(tasks[i :: traits.threads]) for i in range(traits.threads))
        return most * (1 + _REREAD * (tile / size - 1))

    return min(range(tile, tile // 4, -1), key=cost)


_REREAD = 0.05
_TILE_BYTES = 768 * 1024


def decode_splits(kv_heads: int, traits: CpuTraits) -> int:
    """Shares that a sequence's keys are split into, so that one sequence can occupy every thread."""
    return min(traits.threads, 16)


def pools(shape: AttentionShape, pages: Expr) -> dict[str, Any]:
    """The page pools as arguments: k [P, Hkv, D, PG] and v [P, Hkv, PG, Dv]; or x [P, Hkv, PG, D] if shared.

    Of codes also k_scale and v_scale [P, Hkv, PG]; where codes share a byte, D and Dv count bytes.
    """
    size, form, heads = shape.page_size, shape.form, shape.kv_heads
    if shape.shared:
        return {"x": argument("xpool", (pages, heads, size, shape.head_dim), form.dtype)}
    kept = {
        "k": argument("kpool", (pages, heads, shape.head_dim // form.parts, size), form.dtype),
        "v": argument("vpool", (pages, heads, size, shape.value_dim // form.parts), form.dtype),
    }
    if shape.stored:
        for name in ("k_scale", "v_scale"):
            kept[name] = argument(name, (pages, heads, size), "bfloat16")
    return kept


def extras(shape: AttentionShape) -> dict[str, Any]:
    """Further arguments that a shape has, by name: slopes f32[H], sinks f32[H], bias f32[H * D]."""
    wanted = [("slopes", shape.slopes), ("sinks", shape.sink_scores), ("bias", shape.distances)]
    sizes = {"bias": shape.heads * shape.distances}
    return {name: argument(name, (sizes.get(name, shape.heads),)) for name, has in wanted if has}


def prefill_attention(shape: AttentionShape, tile: int, traits: CpuTraits, keys: int = 256) -> tirx.PrimFunc:
    """Attention of many tokens a sequence, in tasks of `tile` tokens and blocks of `keys` keys.

    Arguments of the function: q f32[1, H, n, D], *pools(shape), positions i64[n], tiles i32[t, 3]
    (table row, first token, tokens <= tile), block_table i32[b, m], *extras(shape), out f32[1, n, H, Dv].
    A task is a tile and a KV head: its rows are the tile's tokens times the heads of the group, so K and V
    are read once a group. The tokens' own keys must be in the pages.
    """
    e = Emitter()
    n, pages, t, b, m = (size_var(s) for s in ("n", "pages", "t", "b", "m"))
    group = shape.group
    q = argument("q", (1, shape.heads, n, shape.query_dim))
    state = pools(shape, pages)
    positions = argument("positions", (n,), "int64")
    tiles = argument("tiles", (t, 3), "int32")
    table = argument("block_table", (b, m), "int32")
    more = extras(shape)
    out = argument("out", (1, n, shape.heads, shape.value_dim))

    def kernel(row: Expr, head: Expr) -> BlockKernel:
        return BlockKernel(e, shape, traits, tile * group, False, keys, state, table, row, more)

    attend_tiles(e, shape, traits, q, positions, tiles, out, kernel)
    inputs = [q, *state.values(), positions, tiles, table, *more.values()]
    return e.function([*inputs, out], inputs, [out])


def attend_tiles(
    e: Emitter,
    shape: AttentionShape,
    traits: CpuTraits,
    q: Any,
    positions: Any,
    tiles: Any,
    out: Any,
    kernel: Callable[[Expr, Expr], BlockKernel],
) -> None:
    """Attention of many tokens a sequence; a task is a tile and a KV head.

    kernel: makes what attends with the tile's rows, for a table row and a KV head.
    """
    t, heads, group = tiles.shape[0], shape.kv_heads, shape.group
    with e.loop("c", traits.threads, parallel=True) as c:
        # Tiles of later tokens cost more: neighbours go to different threads.
        count = tirx.floordiv(t * heads - c + (traits.threads - 1), i64(traits.threads))
        with e.loop("i", count) as i:
            task = c + i * traits.threads
            j = e.bind("j", tirx.floordiv(task, i64(heads)))
            head = e.bind("head", tirx.floormod(task, i64(heads)))
            row, first, tokens = (
                e.bind(name, tirx.Cast("int64", tiles[j, i64(at)]))
                for at, name in enumerate(("row", "first", "tokens"))
            )
            own = kernel(row, head)
            position = e.bind("position", positions[first])
            end = position if shape.whole else position + tokens - 1
            with e.loop("g", group) as g, e.loop("k", tokens) as k:
                of = position if shape.whole else position + k
                own.load_query(q, [i64(0), head * group + g, first + k], k * group + g, of)
            own.pad(tokens * group, end)
            page, last = own.mask.pages_of(position, end)
            own.run_head(head, tokens * group, page, last - page + 1, position, end)
            with e.loop("k", tokens) as k, e.loop("g", group) as g:
                own.store_output(k * group + g, out, [i64(0), first + k, head * group + g])


def attend_step(
    e: Emitter,
    shape: AttentionShape,
    traits: CpuTraits,
    q: Any,
    positions: Any,
    part: Any,
    out: Any,
    kernel: Callable[[Expr, Expr, Expr], BlockKernel],
) -> None:
    """Attention of one token a sequence; a task is a share of a sequence's keys and a KV head.

    Threads that are busy with the shares of one head read the same weights.
    kernel: makes what attends with the head's rows, for a table row, a KV head and a share.
    """
    b, splits, heads, group = part.shape[0], int(part.shape[1]), shape.kv_heads, shape.group
    threads = traits.threads
    with e.loop("c", threads, parallel=threads > 1) as c:
        count = tirx.floordiv(b * (heads * splits) - c + (threads - 1), i64(threads))
        with e.loop("i", count) as i:
            task = c + i * threads
            share = e.bind("share", tirx.floormod(task, i64(splits)))
            pair = e.bind("pair", tirx.floordiv(task, i64(splits)))
            head = e.bind("head", tirx.floormod(pair, i64(heads)))
            row = e.bind("row", tirx.floordiv(pair, i64(heads)))
            own = kernel(row, head, share)
            position = e.bind("position", positions[row])
            with e.loop("g", group) as g:
                own.load_query(q, [i64(0), head * group + g, row], g, position)
            own.pad(i64(group), position)
            page, last = own.mask.pages_of(position, position)
            # Only the last share may end within a register tile, whose other scores are those of later keys.
            unit = splits * own.together
            each = e.bind("each", tirx.floordiv(last - page + unit, i64(unit)) * own.together)
            begin = e.bind("begin", page + share * each)
            own.run_head(i64(0), i64(group), begin, tirx.Min(last - begin + 1, each), position, position)
            with e.loop("g", group) as g:
                own.store_part(g, part, [row, share, head * group + g])
    merge(e, shape, part, out, traits.lanes)


def decode_attention(shape: AttentionShape, traits: CpuTraits, knobs: DecodeKnobs = DECODE) -> tirx.PrimFunc:
    """Attention of one token a sequence.

    Arguments of the function: q f32[1, H, b, D], *pools(shape), positions i64[b], block_table i32[b, m],
    *extras(shape), part f32[b, S, H, Dv + 2] (workspace: unnormalised values, maximum and sum of each share),
    out f32[1, b, H, Dv]. S is the knobs' splits, else decode_splits.
    """
    e = Emitter()
    pages, b, m = (size_var(s) for s in ("pages", "b", "m"))
    group, heads, dim = shape.group, shape.kv_heads, shape.value_dim
    shares = knobs.splits or decode_splits(heads, traits)
    q = argument("q", (1, shape.heads, b, shape.query_dim))
    state = pools(shape, pages)
    positions = argument("positions", (b,), "int64")
    table = argument("block_table", (b, m), "int32")
    more = extras(shape)
    part = argument("part", (b, shares, shape.heads, dim + 2))
    out = argument("out", (1, b, shape.heads, dim))
    with e.loop("c", traits.threads, parallel=traits.threads > 1) as c:
        count = tirx.floordiv(b * shares - c + (traits.threads - 1), i64(traits.threads))
        with e.loop("i", count) as i:
            task = c + i * traits.threads
            row = e.bind("row", tirx.floordiv(task, i64(shares)))
            share = e.bind("share", tirx.floormod(task, i64(shares)))
            streaming = heads > 1 or not shape.shared  # one shared key for many heads is bound by arithmetic
            kernel = BlockKernel(
                e, shape, traits, group, streaming, knobs.keys, state, table, row, more, share, knobs.ahead
            )
            position = e.bind("position", positions[row])
            with e.loop("h", heads) as head:
                with e.loop("g", group) as g:
                    kernel.load_query(q, [i64(0), head * group + g, row], head * kernel.padded + g, position)
                kernel.pad(head * kernel.padded + group, position)
            page, last = kernel.mask.pages_of(position, position)
            each = e.bind("each", tirx.floordiv(last - page + shares, i64(shares)))
            begin = e.bind("begin", page + share * each)
            count = tirx.Min(last - begin + 1, each)
            if streaming:
                kernel.run_heads(begin, count, position)
            else:
                kernel.run_head(i64(0), i64(group), begin, count, position, position)
            with e.loop("h", heads) as head, e.loop("g", group) as g:
                kernel.store_part(head * kernel.padded + g, part, [row, share, head * group + g])
    merge(e, shape, part, out, traits.lanes)
    inputs = [q, *state.values(), positions, table, *more.values()]
    return e.function([*inputs, part, out], inputs, [part, out])


def merge(e: Emitter, shape: AttentionShape, part: Any, out: Any, lanes: int) -> None:
    """out = the shares of every row and head put together."""
    b = part.shape[0]
    with e.when(b < 8), e.loop("row", b) as row, e.loop("h", shape.heads) as h:
        _merge_row(e, shape, part, row, h, out, lanes)
    with e.when(b >= 8), e.loop("row", b, parallel=True) as row, e.loop("h", shape.heads) as h:
        _merge_row(e, shape, part, row, h, out, lanes)


def _merge_row(
    e: Emitter, shape: AttentionShape, part: Any, row: Expr, head: Expr, out: Any, lanes: int
) -> None:
    """out[0, row, head] = the shares put together."""
    shares, dim = int(part.shape[1]), shape.value_dim
    top = part[row, i64(0), head, i64(dim)]
    for s in range(1, shares):
        top = tirx.Max(top, part[row, i64(s), head, i64(dim)])
    top = e.bind("top", top)
    weights = [
        e.bind("w", vector_math.exp2_nonpositive(e.bind, part[row, i64(s), head, i64(dim)] - top))
        for s in range(shares)
    ]
    total = sum((w * part[row, i64(s), head, i64(dim + 1)] for s, w in enumerate(weights)), start=f32(0))
    total = e.bind("sum", total)
    for start, width in chunks(dim, lanes):
        index = vec(i64(start), width)
        value = splat(f32(0), width)
        for s, w in enumerate(weights):
            value = value + part[row, i64(s), head, index] * splat(w, width)
        e.store(out, normalized(shape.guarded, value, total, width), i64(0), row, head, index)
