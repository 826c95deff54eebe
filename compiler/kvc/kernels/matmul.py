"""float32 matrix products with a constant matrix that is packed into panels.

A panel holds `panel(traits)` output columns, two vectors: w[b, k, j] is the weight of input k and column
b * NR + j. Every row count up to a register tile has its own code, so a tail wastes nothing, and a decode
batch reads each panel once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from tvm import tirx

from .emit import Emitter, Expr, argument, f32, i64, size_var, splat, vec
from .traits import CpuTraits

Array = npt.NDArray[np.float32]

_SERIAL = 16384
"""Weights up to this many elements are read faster than other workers wake up."""
_ROW_BYTES = 448 * 1024
"""Bytes of x that stay in the second-level cache while the panels pass."""
_DEPTH = 1024
"""Most k steps between two visits of an output tile."""


def panel(traits: CpuTraits) -> int:
    """Columns of a panel."""
    return 2 * traits.lanes


def packed_shape(n: int, k: int, traits: CpuTraits) -> tuple[int, int, int]:
    """Shape of the packed form of a [n, k] weight."""
    return (-(-n // panel(traits)), k, panel(traits))


def pack(w: Array, lanes: int, out: Array | None = None) -> Array:
    """Pack a [N, K] weight into panels [ceil(N / NR), K, NR], NR = 2 * lanes, padded with zeros.

    `w` may be any strided view (such as the transpose of a [K, N] array). It is copied once, a few panels
    at a time, into `out` when given (float32 of the packed shape), else into a new array.
    """
    n, k = w.shape
    nr = 2 * lanes
    result = np.empty((-(-n // nr), k, nr), np.float32) if out is None else out
    step = max(1, 2**20 // (nr * k))
    full = n // nr
    for start in range(0, full, step):
        stop = min(start + step, full)
        block = w[start * nr : stop * nr].reshape(stop - start, nr, k)
        result[start:stop] = block.transpose(0, 2, 1)
    if full < len(result):
        result[full, :, : n - full * nr] = w[full * nr :].T
        result[full, :, n - full * nr :] = 0
    return result


@dataclass(frozen=True)
class _Product:
    """The buffers and constants of one matrix product."""

    e: Emitter
    n: int
    k: int
    lanes: int
    x: Any
    w: Any
    bias: Any
    y: Any
    flat: bool
    depth: int
    """k steps of a block; k when the product is not blocked along k."""

    @property
    def panels(self) -> int:
        return int(self.w.shape[0])

    def out(self, row: Expr, column: Expr) -> list[Expr]:
        return [row, column] if self.flat else [i64(0), row, column]

    def tile(self, rows: int, block: Expr, row: Expr, start: Expr, depth: Expr, splits: int = 1) -> None:
        """y[row .. row + rows, panel `block`] = x w, over k = start .. start + depth - 1.

        splits: independent accumulators of an element, for tiles too small to hide the latency of an FMA.
        """
        e, lanes = self.e, self.lanes
        acc = e.local("acc", splits * rows * 2 * lanes)

        def at(i: Expr, v: int, s: int = 0) -> Expr:
            return vec(((s * rows + i) * 2 + v) * lanes, lanes)

        def step(k: Expr, s: int) -> None:
            weights = [e.bind("wv", self.w[block, k, vec(i64(v * lanes), lanes)]) for v in range(2)]
            with e.unrolled("i", rows) as i:
                xv = e.bind("xv", splat(self.x[i64(0), row + i, k], lanes))
                for v in range(2):
                    e.store(acc, acc[at(i, v, s)] + weights[v] * xv, at(i, v, s))

        self._begin(rows, block, row, start, splits, acc, at)
        if splits == 1:
            with e.loop("k", depth) as k:
                step(start + k, 0)
        else:
            with e.loop("k", self.k // splits) as k:
                for s in range(splits):
                    step(k * splits + s, s)
            for s in range(self.k % splits):
                step(i64(self.k - self.k % splits + s), s)
        for s in range(1, splits):
            with e.unrolled("i", rows) as i:
                for v in range(2):
                    e.store(acc, acc[at(i, v)] + acc[at(i, v, s)], at(i, v))
        self._finish(rows, block, row, acc, at)

    def _begin(self, rows: int, block: Expr, row: Expr, start: Expr, splits: int, acc: Any, at: Any) -> None:
        e, lanes = self.e, self.lanes
        with e.unrolled("i", rows * splits) as i:
            for v in range(2):
                e.store(acc, splat(f32(0), lanes), at(i, v))
        if self.depth < self.k:
            with e.when(start > 0), e.unrolled("i", rows) as i:
                for v in range(2):
                    column = vec(block * (2 * lanes) + v * lanes, lanes)
                    e.store(acc, self.y[tuple(self.out(row + i, column))], at(i, v))

    def _finish(self, rows: int, block: Expr, row: Expr, acc: Any, at: Any) -> None:
        """Store a tile; columns past n, in the last panel, are left out."""
        e, lanes, nr = self.e, self.lanes, 2 * self.lanes
        tail = self.n % nr
        with e.when(block < self.n // nr), e.unrolled("i", rows) as i:
            for v in range(2):
                e.store(self.y, acc[at(i, v)], *self.out(row + i, vec(block * nr + v * lanes, lanes)))
        if tail == 0:
            return
        edge = e.local("edge", nr)
        with e.when(block == self.n // nr), e.unrolled("i", rows) as i:
            for v in range(2):
                e.store(edge, acc[at(i, v)], vec(i64(v * lanes), lanes))
            with e.loop("j", tail) as j:
                e.store(self.y, edge[j], *self.out(row + i, block * nr + j))

    def add_bias(self, low: Expr, high: Expr, row: Expr, rows: Expr) -> None:
        """Add the bias to the columns of panels low .. high - 1 of some rows."""
        e, lanes, nr = self.e, self.lanes, 2 * self.lanes
        first = low * nr
        count = e.bind("columns", tirx.Min(high * nr, i64(self.n)) - first)

        def add(i: Expr, at: Expr) -> None:
            to = self.out(row + i, at)
            e.store(self.y, self.y[tuple(to)] + self.bias[at], *to)

        with e.loop("i", rows) as i:
            with e.loop("j", tirx.floordiv(count, i64(lanes))) as j:
                add(i, vec(first + j * lanes, lanes))
            with e.loop("j", tirx.floormod(count, i64(lanes))) as j:
                add(i, first + count - tirx.floormod(count, i64(lanes)) + j)


def _share(part: Expr, parts: Expr, total: Expr) -> tuple[Expr, Expr]:
    """First and end of the `part`-th of `parts` nearly equal shares of `total`."""
    return tirx.floordiv(part * total, parts), tirx.floordiv((part + 1) * total, parts)


def _column_groups(panels: int, threads: int) -> int:
    """Into how many groups of panels a large product is split: the most that stay balanced."""
    groups = [g for g in range(1, threads + 1) if threads % g == 0]
    balanced = [g for g in groups if math.ceil(panels / g) * g <= 1.1 * panels]
    return max(balanced)


def packed_matmul(
    n: int,
    k: int,
    traits: CpuTraits,
    *,
    bias: bool = False,
    max_rows: int | None = None,
    flat: bool = False,
) -> tirx.PrimFunc:
    """y = x w^T (+ bias) for any number of rows m >= 1 and any n and k.

    Arguments of the function: x f32[1, m, k], w f32[packed_shape(n, k)], bias f32[n] when `bias`,
    y f32[1, m, n], or f32[m, n] when `flat`. m <= max_rows where that is given: small ones save code.
    """
    e = Emitter()
    m = size_var("m")
    x = argument("x", (1, m, k))
    w = argument("w", packed_shape(n, k, traits))
    b = argument("bias", (n,)) if bias else None
    y = argument("y", (m, n) if flat else (1, m, n))
    blocks = 1 if n % panel(traits) else -(-k // _DEPTH)
    product = _Product(e, n, k, traits.lanes, x, w, b, y, flat, -(-k // blocks))
    limit = traits.tile_rows
    threads = 1 if n * k <= _SERIAL else traits.threads
    with e.loop("c", threads, parallel=threads > 1) as c:
        with e.when(m <= limit):
            _few_rows(product, m, c, threads, min(limit, max_rows or limit))
        if max_rows is None or max_rows > limit:
            with e.when(m > limit):
                _many_rows(product, m, c, threads, limit)
    inputs = [x, w, b] if bias else [x, w]
    return e.function([*inputs, y], inputs, [y])


def _few_rows(product: _Product, m: Expr, c: Expr, threads: int, limit: int) -> None:
    """One register tile of m <= limit rows: each panel is read once, whole."""
    e = product.e
    low, high = _share(c, i64(threads), i64(product.panels))
    low = e.bind("low", low)
    with e.loop("b", high - low) as index:
        block = e.bind("block", low + index)

        def tile(rows: int) -> None:
            splits = max(1, 8 // (2 * rows)) if product.k >= 8 else 1
            product.tile(rows, block, i64(0), i64(0), i64(product.k), 1 << (splits.bit_length() - 1))

        e.switch(m, range(1, limit + 1), tile)
    if product.bias is not None:
        product.add_bias(low, high, i64(0), m)


def _many_rows(product: _Product, m: Expr, c: Expr, threads: int, limit: int) -> None:
    """Row tiles of nearly equal height, in blocks whose x stays in cache while the panels pass."""
    e = product.e
    groups = _column_groups(product.panels, threads)
    low, high = _share(tirx.floormod(c, i64(groups)), i64(groups), i64(product.panels))
    low, high = e.bind("low", low), e.bind("high", high)
    tiles = e.bind("tiles", tirx.floordiv(m + (limit - 1), i64(limit)))
    height = e.bind("height", tirx.floordiv(m, tiles))
    extra = e.bind("extra", m - tiles * height)
    first, last = _share(tirx.floordiv(c, i64(groups)), i64(threads // groups), tiles)
    first, last = e.bind("first", first), e.bind("last", last)
    step = max(1, _ROW_BYTES // (4 * product.depth * limit))
    with e.loop("r", tirx.floordiv(last - first + (step - 1), i64(step))) as r:
        begin = e.bind("begin", first + r * step)
        count = e.bind("count", tirx.Min(last - begin, i64(step)))
        with e.loop("kb", -(-product.k // product.depth)) as kb:
            start = e.bind("start", kb * product.depth)
            depth = e.bind("depth", tirx.Min(i64(product.depth), i64(product.k) - start))
            with e.loop("b", high - low) as index, e.loop("t", count) as t:
                block = low + index
                tile = e.bind("tile", begin + t)
                row = e.bind("row", tile * height + tirx.Min(tile, extra))
                rows = e.bind("rows", height + tirx.Select(tile < extra, i64(1), i64(0)))
                cases = range(limit, limit // 2 - 1, -1)
                e.switch(rows, cases, lambda n: product.tile(n, block, row, start, depth))
        if product.bias is not None:
            top = e.bind("top", begin * height + tirx.Min(begin, extra))
            end = (begin + count) * height + tirx.Min(begin + count, extra)
            product.add_bias(low, high, top, end - top)


def packed_embedding(vocab: int, k: int, traits: CpuTraits) -> tirx.PrimFunc:
    """Rows of a packed [vocab, k] matrix, so that a tied embedding and output share one copy.

    Arguments of the function: w f32[packed_shape(vocab, k)], ids i64[1, n] (in range), y f32[1, n, k].
    """
    e = Emitter()
    n = size_var("n")
    nr = panel(traits)
    w = argument("w", packed_shape(vocab, k, traits))
    ids = argument("ids", (1, n), "int64")
    y = argument("y", (1, n, k))

    def row(i: Expr) -> None:
        token = e.bind("token", ids[i64(0), i])
        block = e.bind("block", tirx.floordiv(token, i64(nr)))
        lane = e.bind("lane", token - block * nr)
        with e.loop("j", k) as j:
            e.store(y, w[block, j, lane], i64(0), i, j)

    few = e.bind("few", tirx.Cast("int64", n < 4))
    with e.loop("i", n * few) as i:
        row(i)
    with e.loop("c", (1 - few) * traits.threads, parallel=True) as c:
        low, high = _share(c, i64(traits.threads), n)
        with e.loop("i", high - low) as i:
            row(low + i)
    return e.function([w, ids, y], [w, ids], [y])
