"""Attention over kept x in both phases: keys, turned by their positions, and values are made of it again.

A task makes the keys and values of one KV head, a block of pages after the other, by products with the
head's part of W_K and W_V; a step of decoding does so for all keys that its sequences see.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from tvm import tirx

from kvc_passes.sites import Remade
from kvc_passes.weight_format import WeightFormat

from .attention import AttentionShape, attend_step, extras, pools
from .attention_block import BlockKernel
from .emit import Emitter, Expr, argument, chunks, i64, size_var, vec
from .head_product import packed_tensor
from .rebuilt import Made, Rebuilder, attend
from .sliced import load_angles
from .traits import CpuTraits


@dataclass(frozen=True)
class Remake:
    """What keys and values are made from."""

    kept: Remade
    key_format: WeightFormat
    value_format: WeightFormat
    biases: tuple[bool, bool] = (False, False)
    """Whether keys and values have one."""

    def row_of(self, shape: AttentionShape) -> AttentionShape:
        """The shape of what pages hold of an attention `shape`: one key of all heads."""
        width, depth = self.kept.width, self.kept.depth
        return replace(shape, kv_heads=1, head_dim=width, value_dim=depth, shared=True)

    def made(self, shape: AttentionShape) -> Made:
        sizes = (shape.kv_heads, shape.head_dim, shape.value_dim, self.kept.depth)
        return Made(*sizes, rest=0, key_format=self.key_format, value_format=self.value_format)


class _Call:
    """The arguments of a kernel that both phases have."""

    def __init__(self, e: Emitter, shape: AttentionShape, remaking: Remake, traits: CpuTraits) -> None:
        self.e, self.shape, self.remaking, self.traits = e, shape, remaking, traits
        self.state = pools(remaking.row_of(shape), size_var("pages"))
        self.more, heads, depth = extras(shape), shape.kv_heads, remaking.kept.depth
        self.packed, self.biases = [], []
        parts = (
            ("key", shape.head_dim, remaking.key_format, remaking.biases[0]),
            ("value", shape.value_dim, remaking.value_format, remaking.biases[1]),
        )
        for name, width, format, has_bias in parts:
            tensor = packed_tensor(heads, width, depth, format, traits)
            self.packed.append(argument(f"w_{name}", tensor.shape, tensor.dtype))
            self.biases.append(argument(f"b_{name}", (heads * width,)) if has_bias else None)

    @property
    def weights(self) -> list[Any]:
        return [*self.packed, *(bias for bias in self.biases if bias is not None)]

    def kernel(self, rows: int, table: Any, row: Expr, head: Expr, share: Expr | None = None) -> _Remaker:
        return _Remaker(
            self.e, self.shape, self.remaking, self.traits, rows, self.state, table, row, self.more,
            self.packed, self.biases, head, share,
        )  # fmt: skip


def prefill_remade(shape: AttentionShape, remaking: Remake, traits: CpuTraits) -> tirx.PrimFunc:
    """Attention of many tokens a sequence.

    Arguments of the function: q f32[1, H, n, D], x pool [P, 1, PG, width], positions i64[n], tiles i32[t, 3],
    block_table i32[b, m], *extras(shape), W_K and W_V as head_product.packed_tensor has them (not absorbed),
    b_K f32[Hkv * D] and b_V f32[Hkv * Dv] where there are some, out f32[1, n, H, Dv].
    A task is a sequence and a KV head: its tiles' rows, ROWS at a time.
    """
    e = Emitter()
    n, t, b, m = (size_var(s) for s in ("n", "t", "b", "m"))
    heads, group = shape.kv_heads, shape.group
    call = _Call(e, shape, remaking, traits)
    q = argument("q", (1, shape.heads, n, shape.head_dim))
    positions, tiles = argument("positions", (n,), "int64"), argument("tiles", (t, 3), "int32")
    table = argument("block_table", (b, m), "int32")
    out = argument("out", (1, n, shape.heads, shape.value_dim))

    def kernel(rows: int, row: Expr, head: Expr) -> _Remaker:
        return call.kernel(rows, table, row, head)

    attend(e, traits, heads, group, q, positions, tiles, out, kernel)
    inputs = [q, *call.state.values(), positions, tiles, table, *call.more.values(), *call.weights]
    return e.function([*inputs, out], inputs, [out])


def decode_remade(shape: AttentionShape, remaking: Remake, traits: CpuTraits, splits: int) -> tirx.PrimFunc:
    """Attention of one token a sequence.

    Arguments of the function: q f32[1, H, b, D], x pool, positions i64[b], block_table i32[b, m],
    *extras(shape), weights as prefill_remade, part f32[b, splits, H, Dv + 2] as attention.decode_attention,
    out f32[1, b, H, Dv]. A task is a share of a sequence's keys and a KV head: threads that are busy with
    the shares of one head read the same weights.
    """
    e = Emitter()
    b, m = (size_var(s) for s in ("b", "m"))
    call = _Call(e, shape, remaking, traits)
    q = argument("q", (1, shape.heads, b, shape.head_dim))
    positions, table = argument("positions", (b,), "int64"), argument("block_table", (b, m), "int32")
    part = argument("part", (b, splits, shape.heads, shape.value_dim + 2))
    out = argument("out", (1, b, shape.heads, shape.value_dim))

    def kernel(row: Expr, head: Expr, share: Expr) -> _Remaker:
        return call.kernel(shape.group, table, row, head, share)

    attend_step(e, shape, traits, q, positions, part, out, kernel)
    inputs = [q, *call.state.values(), positions, table, *call.more.values(), *call.weights]
    return e.function([*inputs, part, out], inputs, [part, out])


class _Remaker(Rebuilder):
    """Attention of one KV head over keys and values that are made block by block, and keys turned."""

    def __init__(
        self,
        e: Emitter,
        shape: AttentionShape,
        remaking: Remake,
        traits: CpuTraits,
        rows: int,
        state: Mapping[str, Any],
        table: Any,
        row: Expr,
        more: Mapping[str, Any],
        packed: list[Any],
        biases: list[Any],
        head: Expr,
        share: Expr | None,
    ) -> None:
        row_shape, made = remaking.row_of(shape), remaking.made(shape)
        super().__init__(e, row_shape, made, traits, rows, state, table, row, more, packed, head, share)
        self.kept, self.biases, size = remaking.kept, biases, shape.page_size
        self.rows = e.local("key_rows", (self.keys // size, 1, size, made.key))
        if self.kept.half:
            self.angles = tuple(e.local(name, self.kept.half) for name in ("cosine", "sine"))

    def prepare(self, start: Expr, count: Expr) -> None:
        super().prepare(start, count)
        if self.biases[1] is not None:
            e, width = self.e, self.made.value
            with e.loop("p", count) as p, e.loop("k", self.shape.page_size) as k:
                for offset, lanes in chunks(width, self.lanes):
                    self._add(self.pools["v"], [p, i64(0), k], self.biases[1], width, offset, lanes)

    def _add(self, to: Any, at: list[Expr], bias: Any, width: int, offset: int, lanes: int) -> None:
        index = vec(i64(offset), lanes)
        added = bias[vec(self.head * width + offset, lanes)]
        self.e.store(to, to[(*at, index)] + added, *at, index)

    def make_keys(self, count: Expr) -> None:
        """Rows of keys by a product, turned where they stand, then as the scores read them."""
        e, made, size = self.e, self.made, self.shape.page_size
        self.product(count, made.key, made.key_format, self.packed[0], self.rows)
        with e.loop("p", count) as p:
            page = e.bind("at", BlockKernel.page(self, self.start + p)) if self.kept.half else i64(0)
            with e.loop("k", size) as k:
                at = [p, i64(0), k]
                if self.biases[0] is not None:
                    for offset, width in chunks(made.key, self.lanes):
                        self._add(self.rows, at, self.biases[0], made.key, offset, width)
                if self.kept.half:
                    self._turn(at, page, k)
                with e.loop("d", made.key) as d:
                    e.store(self.pools["k"], self.rows[(*at, d)], p, i64(0), d, k)

    def _turn(self, at: list[Expr], page: Expr, key: Expr) -> None:
        """Turn a row of `rows` by the angles that stand behind the token's x."""
        e, half = self.e, self.kept.half

        def element(first: Expr, width: int) -> Expr:
            raw = self.state[page, i64(0), key, vec(first, width)]
            return e.bind("angle", self.latent.form.element(raw, 0))

        load_angles(e, element, self.kept.depth, self.kept.fine, self.lanes, self.angles)
        for offset, width in chunks(half, self.lanes):
            first, second = vec(i64(offset), width), vec(i64(half + offset), width)
            low, high = (e.bind("x", self.rows[(*at, index)]) for index in (first, second))
            cosine, sine = (a[vec(i64(offset), width)] for a in self.angles)
            e.store(self.rows, low * cosine - high * sine, *at, first)
            e.store(self.rows, high * cosine + low * sine, *at, second)
