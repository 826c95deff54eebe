"""Attention over kept values in both phases: keys are made of them, a block of pages after the other.

A task makes the keys of one KV head: each is the head's value, times factors, turned by its position. Keys
and values are float32 then, and stay in the second-level cache while the task's queries meet them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from tvm import tirx

from kvc_passes.sites import Rekeyed

from .attention import AttentionShape, attend_step, attend_tiles, extras, pools
from .attention_block import BlockKernel
from .emit import Emitter, Expr, argument, chunks, i64, size_var, vec
from .shared_keys import SharedKeys
from .sliced import load_angles
from .traits import CpuTraits

_BLOCK_BYTES = 256 * 1024
"""Keys and values of a block."""
_MOST_KEYS = 128


def row_of(shape: AttentionShape, kept: Rekeyed) -> AttentionShape:
    """The shape of what pages hold of an attention `shape`: one key of all heads."""
    return replace(shape, kv_heads=1, head_dim=kept.width, value_dim=kept.values, shared=True)


class _Call:
    """The arguments of a kernel that both phases have."""

    def __init__(self, e: Emitter, shape: AttentionShape, kept: Rekeyed, traits: CpuTraits) -> None:
        self.e, self.shape, self.kept, self.traits = e, shape, kept, traits
        self.state = pools(row_of(shape, kept), size_var("pages"))
        self.more = extras(shape)
        self.factors = argument("factors", (kept.values,)) if kept.scaled else None

    @property
    def last(self) -> list[Any]:
        """What stands behind the block table."""
        return [*self.more.values(), *([] if self.factors is None else [self.factors])]

    def kernel(self, rows: int, table: Any, row: Expr, head: Expr, share: Expr | None = None) -> _Rekeyer:
        return _Rekeyer(
            self.e, self.shape, self.kept, self.traits, rows, self.state, self.factors, table, row, self.more,
            head, share,
        )  # fmt: skip


def prefill_rekeyed(shape: AttentionShape, kept: Rekeyed, tile: int, traits: CpuTraits) -> tirx.PrimFunc:
    """Attention of many tokens a sequence.

    Arguments of the function: q f32[1, H, n, D], x pool [P, 1, PG, width], positions i64[n], tiles i32[t, 3]
    (of `tile` tokens at most), block_table i32[b, m], *extras(shape), factors f32[Hkv * D] where keys are
    scaled, out f32[1, n, H, D].
    """
    e = Emitter()
    n, t, b, m = (size_var(s) for s in ("n", "t", "b", "m"))
    call = _Call(e, shape, kept, traits)
    q = argument("q", (1, shape.heads, n, shape.head_dim))
    positions, tiles = argument("positions", (n,), "int64"), argument("tiles", (t, 3), "int32")
    table = argument("block_table", (b, m), "int32")
    out = argument("out", (1, n, shape.heads, shape.value_dim))

    def kernel(row: Expr, head: Expr) -> _Rekeyer:
        return call.kernel(tile * shape.group, table, row, head)

    attend_tiles(e, shape, traits, q, positions, tiles, out, kernel)
    inputs = [q, *call.state.values(), positions, tiles, table, *call.last]
    return e.function([*inputs, out], inputs, [out])


def decode_rekeyed(shape: AttentionShape, kept: Rekeyed, traits: CpuTraits, splits: int) -> tirx.PrimFunc:
    """Attention of one token a sequence.

    Arguments of the function: q f32[1, H, b, D], x pool, positions i64[b], block_table i32[b, m],
    *extras(shape), factors as prefill_rekeyed, part f32[b, splits, H, D + 2] as attention.decode_attention,
    out f32[1, b, H, D].
    """
    e = Emitter()
    b, m = (size_var(s) for s in ("b", "m"))
    call = _Call(e, shape, kept, traits)
    q = argument("q", (1, shape.heads, b, shape.head_dim))
    positions, table = argument("positions", (b,), "int64"), argument("block_table", (b, m), "int32")
    part = argument("part", (b, splits, shape.heads, shape.value_dim + 2))
    out = argument("out", (1, b, shape.heads, shape.value_dim))

    def kernel(row: Expr, head: Expr, share: Expr) -> _Rekeyer:
        return call.kernel(shape.group, table, row, head, share)

    attend_step(e, shape, traits, q, positions, part, out, kernel)
    inputs = [q, *call.state.values(), positions, table, *call.last]
    return e.function([*inputs, part, out], inputs, [part, out])


class _Rekeyer(BlockKernel):
    """Attention of one KV head, whose keys are made of its values block by block."""

    def __init__(
        self,
        e: Emitter,
        shape: AttentionShape,
        kept: Rekeyed,
        traits: CpuTraits,
        rows: int,
        state: Mapping[str, Any],
        factors: Any,
        table: Any,
        row: Expr,
        more: Mapping[str, Any],
        head: Expr,
        share: Expr | None,
    ) -> None:
        size = shape.page_size
        plain = replace(shape, kv_heads=1, kv_dtype="float32", shared=False)
        keys = max(min(_MOST_KEYS, _BLOCK_BYTES // (8 * kept.dim)), 2 * size)
        super().__init__(e, plain, traits, rows, False, keys, {}, table, row, more, share)
        self.together = 1  # scores are taken of one page after the other
        self.kept, self.kept_form, self.state, self.factors = kept, shape.form, state["x"], factors
        self.head, self.start = head, i64(0)
        whole = (self.keys // size, 1, size, kept.dim)
        self.pools = {"x": e.local("keys", whole), "v": e.local("values", whole)}
        if kept.pairs:
            self.angles = (e.local("cosine", kept.pairs), e.local("sine", kept.pairs))

    def run_head(self, head: Expr, rows: Expr, page: Expr, pages: Expr, first: Expr, last: Expr) -> None:
        super().run_head(i64(0), rows, page, pages, first, last)

    def page(self, page: Expr) -> Expr:
        return page - self.start

    def prepare(self, start: Expr, count: Expr) -> None:
        """The values and keys of `count` pages from `start`."""
        e, self.start = self.e, start
        with e.loop("p", count) as p:
            page = e.bind("at", BlockKernel.page(self, start + p))
            with e.loop("k", self.shape.page_size) as k:
                self._make([p, i64(0), k], page, k)

    def _make(self, to: list[Expr], page: Expr, key: Expr) -> None:
        """The value at `to` of what a page holds of a token, and the key."""
        e, kept = self.e, self.kept
        first = e.bind("first", self.head * kept.dim)

        def element(at: Expr, width: int) -> Expr:
            return e.bind("x", self.kept_form.element(self.state[page, i64(0), key, vec(at, width)], 0))

        def scaled(at: Expr, width: int) -> Expr:
            value = element(first + at, width)
            e.store(self.pools["v"], value, *to, vec(at, width))
            if self.factors is None:
                return value
            return e.bind("scaled", value * self.factors[vec(first + at, width)])

        def made(at: Expr, width: int, value: Expr) -> None:
            e.store(self.pools["x"], value, *to, vec(at, width))

        def turned(at: Expr, width: int) -> None:
            low, high = scaled(at, width), scaled(at + kept.half, width)
            cosine, sine = (angle[vec(at, width)] for angle in self.angles)
            made(at, width, low * cosine - high * sine)
            made(at + kept.half, width, high * cosine + low * sine)

        def plain(at: Expr, width: int) -> None:
            made(at, width, scaled(at, width))

        if kept.pairs:
            load_angles(e, element, kept.values, kept.fine, self.lanes, self.angles)
        self._along(0, kept.pairs, turned)
        self._along(kept.pairs, kept.half, plain)
        self._along(kept.half + kept.pairs, kept.dim, plain)

    def _along(self, begin: int, end: int, emit: Callable[[Expr, int], None]) -> None:
        """emit(at, width) for vectors that cover the elements begin .. end - 1."""
        whole, rest = divmod(end - begin, self.lanes)
        if whole:
            with self.e.loop("v", whole) as v:
                emit(v * self.lanes + begin, self.lanes)
        for offset, width in chunks(rest, self.lanes):
            emit(i64(begin + whole * self.lanes + offset), width)

    def _score(self, head: Expr, row: Expr, slot: Expr, start: Expr, count: Expr, base: Expr) -> None:
        SharedKeys(self).score(head, row, slot, start, count, base)
