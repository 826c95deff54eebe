"""Scores of keys whose elements stand together: vectors along a key, summed up at the end."""

from __future__ import annotations

from itertools import pairwise, product
from typing import TYPE_CHECKING

from tvm import tirx

from .emit import Expr, chunks, f32, fold, fold_four, i64, splat, vec

if TYPE_CHECKING:
    from .attention_block import BlockKernel

_KEYS = 4
"""Keys of a register tile."""
_VECTORS = 6
"""Vectors of each key, at most, between two times of fetching."""


class SharedKeys:
    """Emits the products of rows of queries with whole keys of a shared shape."""

    def __init__(self, block: BlockKernel) -> None:
        self.block, self.e = block, block.e

    def score(self, head: Expr, row: Expr, slot: Expr, start: Expr, count: Expr, base: Expr) -> None:
        """scores[slot + i, base + j] = query row (row + i) . key j of `count` pages from `start`.

        Several keys share what is loaded of the queries, which are more than the first-level cache holds.
        """
        e, height, size = self.e, self.block.height, self.block.shape.page_size
        tall = max(1, self.block.registers * 3 // 4 // _KEYS)
        parts = -(-height // tall)
        ends = [height * i // parts for i in range(parts + 1)]
        with e.loop("p", count) as p:
            page = self.block.page(start + p)
            following = self.block.page(tirx.Min(start + p + 1, start + count - 1))
            with e.loop("k", size // _KEYS) as group:
                first = e.bind("first", group * _KEYS)
                last = first == size - _KEYS
                ahead = (
                    e.bind("ahead", tirx.Select(last, following, page)),
                    tirx.Select(last, i64(0), first + _KEYS),
                )
                for i, (low, high) in enumerate(pairwise(ends)):
                    rows = (row + low, slot + low, high - low)
                    self._tile(head, *rows, page, first, base + p * size, ahead if i == 0 else None)

    def _tile(
        self,
        head: Expr,
        row: Expr,
        slot: Expr,
        rows: int,
        page: Expr,
        first: Expr,
        base: Expr,
        ahead: tuple[Expr, Expr] | None,
    ) -> None:
        """scores[slot + i, base + first + j] = query row (row + i) . key first + j of a page, j < _KEYS.

        ahead: page and first key of the keys that are needed next.
        """
        e, block, lanes = self.e, self.block, self.block.lanes
        dim, pool = block.shape.head_dim, block.pools["x"]
        whole, rest = dim // lanes, chunks(dim % lanes, lanes)
        acc = e.local("acc", rows * _KEYS * lanes)

        def at(i: Expr, v: int) -> Expr:
            return vec((i * _KEYS + v) * lanes, lanes)

        def element(v: int, offset: Expr, width: int) -> Expr:
            return e.bind("kv", block.form.element(pool[page, head, first + v, vec(offset, width)], 0))

        with e.unrolled("i", rows) as i:
            for v in range(_KEYS):
                e.store(acc, splat(f32(0), lanes), at(i, v))

        def products(d: Expr) -> None:
            keys = [element(v, d * lanes, lanes) for v in range(_KEYS)]
            with e.unrolled("i", rows) as i:
                qv = e.bind("qv", block.query[vec((row + i) * dim + d * lanes, lanes)])
                for v in range(_KEYS):
                    e.store(acc, acc[at(i, v)] + keys[v] * qv, at(i, v))

        stride = whole if ahead is None else _stride(whole)
        with e.loop("part", whole // max(stride, 1)) as part:
            if ahead is not None:
                for n, v in product(range(stride), range(_KEYS)):
                    e.prefetch(pool, ahead[0], head, ahead[1] + v, (part * stride + n) * lanes)
            with e.loop("d", stride) as d:
                products(part * stride + d)
        with e.unrolled("i", rows) as i:
            for v in range(0, _KEYS, 4):
                totals = fold_four(e, [acc[at(i, v + j)] for j in range(4)])
                e.store(block.scores, totals, vec((slot + i) * block.keys + base + first + v, 4))
        for v in range(_KEYS if rest else 0):
            tail = [element(v, i64(whole * lanes + offset), width) for offset, width in rest]
            with e.unrolled("i", rows) as i:
                to = (slot + i) * block.keys + base + first + v
                total = block.scores[to]
                for key, (offset, width) in zip(tail, rest):
                    query = block.query[vec((row + i) * dim + whole * lanes + offset, width)]
                    total = total + fold(key * query, lambda a, b: a + b)
                e.store(block.scores, total, to)


def _stride(vectors: int) -> int:
    """The largest divisor of a number of vectors that is at most _VECTORS."""
    return next((n for n in range(_VECTORS, 1, -1) if vectors % n == 0), 1)
