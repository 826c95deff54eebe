"""Scores of kept keys that are turned when they are read; sites.Sliced says how they stand."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tvm import tirx

from kvc_passes.sites import Sliced

from .emit import Emitter, Expr, chunks, f32, fold, fold_four, i64, splat, vec

if TYPE_CHECKING:
    from .attention_block import BlockKernel

_KEYS = 4
"""Keys that share what is loaded of a query."""


class SlicedKeys:
    """Turns a block of keys, all heads of them, and takes the products of every query with its own."""

    def __init__(self, block: BlockKernel, sliced: Sliced) -> None:
        self.block, self.sliced, self.e, self.lanes = block, sliced, block.e, block.lanes
        self.row = sliced.count * sliced.dim
        self.turned = self.e.local("turned", block.keys * self.row)
        self.cosine, self.sine = (self.e.local(name, sliced.half) for name in ("cosine", "sine"))

    def turn(self, start: Expr, count: Expr) -> None:
        """turned[key, :] = the keys of `count` pages from `start`, as their positions turn them."""
        e, block, sliced, size = self.e, self.block, self.sliced, self.block.shape.page_size
        pool, form, half = block.pools["x"], block.form, sliced.half
        with e.loop("p", count) as p:
            page = block.page(start + p)
            with e.loop("k", size) as k:

                def element(at: Expr, width: int, page: Expr = page, k: Expr = k) -> Expr:
                    return e.bind("x", form.element(pool[page, i64(0), k, vec(at, width)], 0))

                load_angles(e, element, sliced.value_dim, sliced.fine, self.lanes, (self.cosine, self.sine))
                key = e.bind("key", (p * size + k) * self.row)
                with e.loop("g", sliced.count) as g:
                    first = e.bind("first", g * sliced.dim)
                    for offset, width in chunks(half, self.lanes):
                        low, high = element(first + offset, width), element(first + half + offset, width)
                        cosine, sine = (a[vec(i64(offset), width)] for a in (self.cosine, self.sine))
                        e.store(self.turned, low * cosine - high * sine, vec(key + first + offset, width))
                        e.store(
                            self.turned, high * cosine + low * sine, vec(key + first + half + offset, width)
                        )
                    for offset, width in chunks(sliced.dim - 2 * half, self.lanes):
                        at = 2 * half + offset
                        e.store(self.turned, element(first + at, width), vec(key + first + at, width))

    def score(self, row: Expr, slot: Expr, count: Expr) -> None:
        """scores[slot + i, j] = query row (row + i) . its own part of turned key j of `count` pages."""
        e, block, lanes, dim = self.e, self.block, self.lanes, self.sliced.dim
        heads, whole, rest = block.shape.heads, dim // lanes, chunks(dim % lanes, lanes)
        with e.loop("i", block.height) as i:
            head = tirx.floormod(row + i, i64(heads))
            own = e.bind("own", tirx.floordiv(head, i64(heads // self.sliced.count)) * dim)
            query = e.bind("query_at", (row + i) * dim)
            with e.loop("k", count * (block.shape.page_size // _KEYS)) as group:
                key = e.bind("key", group * (_KEYS * self.row) + own)
                to = e.bind("to", (slot + i) * block.keys + group * _KEYS)
                acc = e.local("acc", _KEYS * lanes)

                def at(v: int, acc: Any = acc) -> Expr:
                    return vec(i64(v * lanes), lanes)

                for v in range(_KEYS):
                    e.store(acc, splat(f32(0), lanes), at(v))
                with e.loop("d", whole) as d:
                    qv = e.bind("qv", block.query[vec(query + d * lanes, lanes)])
                    for v in range(_KEYS):
                        kv = self.turned[vec(key + v * self.row + d * lanes, lanes)]
                        e.store(acc, acc[at(v)] + kv * qv, at(v))
                e.store(block.scores, fold_four(e, [acc[at(v)] for v in range(_KEYS)]), vec(to, _KEYS))
                for v in range(_KEYS if rest else 0):
                    total = block.scores[to + v]
                    for offset, width in rest:
                        kv = self.turned[vec(key + v * self.row + whole * lanes + offset, width)]
                        qv = block.query[vec(query + whole * lanes + offset, width)]
                        total = total + fold(kv * qv, lambda a, b: a + b)
                    e.store(block.scores, total, to + v)


def load_angles(
    e: Emitter,
    element: Callable[[Expr, int], Expr],
    first: int,
    fine: bool,
    lanes: int,
    to: tuple[Any, Any],
) -> None:
    """Fill buffers with the cosines and sines of a row, from `first` on; element(at, width) reads it."""
    half = int(to[0].shape[0])
    for part, buffer in enumerate(to):
        for offset, width in chunks(half, lanes):
            at = first + part * half + offset
            angle = element(i64(at), width)
            if fine:
                angle = angle + element(i64(at + 2 * half), width) * splat(f32(1 / 256), width)
            e.store(buffer, angle, vec(i64(offset), width))
