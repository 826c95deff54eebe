"""float32 products with a constant matrix of any format, which is packed into panels (packing.py).

A panel holds `panel(traits)` output columns, two vectors. Every row count up to a register tile has its own
code, so a tail wastes nothing, and a decode batch reads each panel once. Codes become float32 in registers
for few rows; for many, a block of a panel is expanded into a buffer that its row tiles share.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from tvm import tirx

from kvc_passes.facts import FLOAT32, WeightFormat

from .emit import Emitter, Expr, argument, f32, i64, size_var, splat, vec
from .packing import pack, packed_tensors
from .traits import CpuTraits
from .weights import Weights

__all__ = ["pack", "packed_embedding", "packed_matmul", "packed_shape", "panel"]

_SERIAL = 16384
"""Weights up to this many elements are read faster than other workers wake up."""
_ROW_BYTES = 448 * 1024
"""Bytes of x that stay in the second-level cache while the panels pass."""
_DEPTH = 1024
"""Most k steps between two visits of an output tile."""


def panel(traits: CpuTraits) -> int:
    """Columns of a panel."""
    return 2 * traits.lanes


def packed_shape(n: int, k: int, traits: CpuTraits) -> tuple[int, ...]:
    """Shape of the packed form of a float32 [n, k] weight."""
    return packed_tensors(n, k, FLOAT32, traits.lanes)[0].shape


@dataclass(frozen=True)
class _Product:
    """The buffers and constants of one matrix product."""

    e: Emitter
    n: int
    k: int
    traits: CpuTraits
    x: Any
    w: Weights
    bias: Any
    y: Any
    flat: bool
    depth: int
    """k steps of a block; k when the product is not blocked along k."""

    @property
    def lanes(self) -> int:
        return self.traits.lanes

    def out(self, row: Expr, column: Expr) -> list[Expr]:
        return [row, column] if self.flat else [i64(0), row, column]

    def tile(
        self, rows: int, block: Expr, row: Expr, start: Expr, depth: Expr, splits: int = 1, panel: Any = None
    ) -> None:
        """y[row .. row + rows, panel `block`] = x w, over k = start .. start + depth - 1.

        splits: independent accumulators of an element, for tiles too small to hide the latency of an FMA.
        panel: the weights k = start .. of the panel as float32, where they are not read from the format.
        """
        e, lanes = self.e, self.lanes
        acc = e.local("acc", splits * rows * 2 * lanes)

        def at(i: Expr, v: int, s: int = 0) -> Expr:
            return vec(((s * rows + i) * 2 + v) * lanes, lanes)

        def step(k: Expr, s: int) -> None:
            if panel is None:
                weights = [e.bind("wv", self.w.vector(block, k, v)) for v in range(2)]
            else:
                weights = [
                    e.bind("wv", panel[vec((k - start) * (2 * lanes) + v * lanes, lanes)]) for v in range(2)
                ]
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
        self._gather(rows, splits, acc, at)
        self._finish(rows, block, row, acc, at)

    def coded_tile(self, rows: int, block: Expr, splits: int) -> None:
        """y[0 .. rows - 1, panel `block`] = x w for a weight of codes.

        Where registers suffice, the products of a block of inputs are summed before they are scaled, else
        every weight is scaled. `splits` as in `tile`.
        """
        e, w, lanes = self.e, self.w, self.lanes
        late = 4 * rows <= self.traits.registers - 4
        if not late:
            splits = 1
        acc = e.local("acc", rows * 2 * lanes)
        part = e.local("part", splits * rows * 2 * lanes) if late else acc

        def at(i: Expr, v: int, s: int = 0) -> Expr:
            return vec(((s * rows + i) * 2 + v) * lanes, lanes)

        self._clear(rows, acc, at)
        with w.blocks(i64(0), i64(self.k)) as (first, count, scaling):
            scaling.load(block)
            if late:
                self._clear(rows * splits, part, at)

            def step(k: Expr, size: int) -> None:
                codes = [w.codes(block, k, v, size) for v in range(2)]
                for j in range(size):
                    weights = []
                    for v in range(2):
                        value = scaling.value(codes[v][j], v)
                        weights.append(e.bind("wv", value if late else value * scaling.scales[v]))
                    with e.unrolled("i", rows) as i:
                        xv = e.bind("xv", splat(self.x[i64(0), i, k + j], lanes))
                        for v in range(2):
                            to = at(i, v, j % splits)
                            e.store(part, part[to] + weights[v] * xv, to)

            w.steps(first, count, w.unit(splits), step)
            if late:
                self._gather(rows, splits, part, at)
                with e.unrolled("i", rows) as i:
                    for v in range(2):
                        e.store(acc, acc[at(i, v)] + part[at(i, v)] * scaling.scales[v], at(i, v))
        self._finish(rows, block, i64(0), acc, at)

    def _clear(self, rows: int, acc: Any, at: Any) -> None:
        with self.e.unrolled("i", rows) as i:
            for v in range(2):
                self.e.store(acc, splat(f32(0), self.lanes), at(i, v))

    def _gather(self, rows: int, splits: int, acc: Any, at: Any) -> None:
        """Add the accumulators of each element into the first."""
        for s in range(1, splits):
            with self.e.unrolled("i", rows) as i:
                for v in range(2):
                    self.e.store(acc, acc[at(i, v)] + acc[at(i, v, s)], at(i, v))

    def _begin(self, rows: int, block: Expr, row: Expr, start: Expr, splits: int, acc: Any, at: Any) -> None:
        e, lanes, nr = self.e, self.lanes, 2 * self.lanes
        self._clear(rows * splits, acc, at)
        if self.depth == self.k:
            return
        tail = self.n % nr
        whole = start > 0 if tail == 0 else tirx.And(start > 0, block < self.n // nr)
        with e.when(whole), e.unrolled("i", rows) as i:
            for v in range(2):
                column = vec(block * nr + v * lanes, lanes)
                e.store(acc, self.y[tuple(self.out(row + i, column))], at(i, v))
        if tail == 0:
            return
        edge = e.local("edge", nr)
        with e.when(tirx.And(start > 0, block == self.n // nr)), e.unrolled("i", rows) as i:
            with e.loop("j", tail) as j:
                e.store(edge, self.y[tuple(self.out(row + i, block * nr + j))], j)
            for v in range(2):
                e.store(acc, edge[vec(i64(v * lanes), lanes)], at(i, v))

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


def _depth(n: int, k: int, format: WeightFormat, traits: CpuTraits) -> int:
    """Inputs of a block along k. Codes are expanded block by block, so they have blocks for every n."""
    if format.coded:
        each = -(-k // -(-k // _DEPTH))
        unit = format.block if format.block <= _DEPTH // 8 and format.block % 2 == 0 else 2
        return min(k, -(-each // unit) * unit)
    return k if n % panel(traits) else -(-k // -(-k // _DEPTH))


def packed_matmul(
    n: int,
    k: int,
    traits: CpuTraits,
    *,
    bias: bool = False,
    max_rows: int | None = None,
    flat: bool = False,
    format: WeightFormat = FLOAT32,
) -> tirx.PrimFunc:
    """y = x w^T (+ bias) for any number of rows m >= 1 and any n and k.

    Arguments of the function: x f32[1, m, k], the tensors of `packed_tensors(n, k, format)`, bias f32[n] when
    `bias`, y f32[1, m, n], or f32[m, n] when `flat`. m <= max_rows where that is given: small ones save code.
    Raises ValueError for codes without a block.
    """
    e = Emitter()
    m = size_var("m")
    x = argument("x", (1, m, k))
    w = Weights(e, n, k, format, traits.lanes)
    b = argument("bias", (n,)) if bias else None
    y = argument("y", (m, n) if flat else (1, m, n))
    product = _Product(e, n, k, traits, x, w, b, y, flat, _depth(n, k, format, traits))
    limit = traits.tile_rows
    threads = 1 if n * k <= _SERIAL else traits.threads
    with e.loop("c", threads, parallel=threads > 1) as c:
        with e.when(m <= limit):
            _few_rows(product, m, c, threads, min(limit, max_rows or limit))
        if max_rows is None or max_rows > limit:
            with e.when(m > limit):
                _many_rows(product, m, c, threads, limit)
    inputs = [x, *w.buffers, b] if bias else [x, *w.buffers]
    return e.function([*inputs, y], inputs, [y])


def _few_rows(product: _Product, m: Expr, c: Expr, threads: int, limit: int) -> None:
    """One register tile of m <= limit rows: each panel is read once, whole."""
    e = product.e
    low, high = _share(c, i64(threads), i64(product.w.panels))
    low = e.bind("low", low)
    with e.loop("b", high - low) as index:
        block = e.bind("block", low + index)

        def tile(rows: int) -> None:
            splits = max(1, 8 // (2 * rows)) if product.k >= 8 else 1
            splits = 1 << (splits.bit_length() - 1)
            if product.w.coded:
                product.coded_tile(rows, block, splits)
            else:
                product.tile(rows, block, i64(0), i64(0), i64(product.k), splits)

        e.switch(m, range(1, limit + 1), tile)
    if product.bias is not None:
        product.add_bias(low, high, i64(0), m)


def _many_rows(product: _Product, m: Expr, c: Expr, threads: int, limit: int) -> None:
    """Row tiles of nearly equal height, in blocks whose x stays in cache while the panels pass."""
    e = product.e
    groups = _column_groups(product.w.panels, threads)
    low, high = _share(tirx.floormod(c, i64(groups)), i64(groups), i64(product.w.panels))
    low, high = e.bind("low", low), e.bind("high", high)
    tiles = e.bind("tiles", tirx.floordiv(m + (limit - 1), i64(limit)))
    height = e.bind("height", tirx.floordiv(m, tiles))
    extra = e.bind("extra", m - tiles * height)
    first, last = _share(tirx.floordiv(c, i64(groups)), i64(threads // groups), tiles)
    first, last = e.bind("first", first), e.bind("last", last)
    step = max(1, _ROW_BYTES // (4 * product.depth * limit))
    expanded = e.local("expanded", product.depth * 2 * product.lanes) if product.w.coded else None
    with e.loop("r", tirx.floordiv(last - first + (step - 1), i64(step))) as r:
        begin = e.bind("begin", first + r * step)
        count = e.bind("count", tirx.Min(last - begin, i64(step)))
        with e.loop("kb", -(-product.k // product.depth)) as kb:
            start = e.bind("start", kb * product.depth)
            depth = e.bind("depth", tirx.Min(i64(product.depth), i64(product.k) - start))
            with e.loop("b", high - low) as index:
                block = low + index
                if expanded is not None:
                    product.w.expand(block, start, start + depth, expanded)
                with e.loop("t", count) as t:
                    tile = e.bind("tile", begin + t)
                    row = e.bind("row", tile * height + tirx.Min(tile, extra))
                    rows = e.bind("rows", height + tirx.Select(tile < extra, i64(1), i64(0)))
                    cases = range(limit, limit // 2 - 1, -1)
                    e.switch(rows, cases, lambda n: product.tile(n, block, row, start, depth, panel=expanded))
        if product.bias is not None:
            top = e.bind("top", begin * height + tirx.Min(begin, extra))
            end = (begin + count) * height + tirx.Min(begin + count, extra)
            product.add_bias(low, high, top, end - top)


def packed_embedding(
    vocab: int, k: int, traits: CpuTraits, *, format: WeightFormat = FLOAT32
) -> tirx.PrimFunc:
    """Rows of a packed [vocab, k] matrix, so that a tied embedding and output share one copy.

    Arguments of the function: the tensors of `packed_tensors(vocab, k, format)`, ids i64[1, n] (in range),
    y f32[1, n, k]. Raises ValueError for codes without a block.
    """
    e = Emitter()
    n = size_var("n")
    nr = panel(traits)
    w = Weights(e, vocab, k, format, traits.lanes)
    ids = argument("ids", (1, n), "int64")
    y = argument("y", (1, n, k))

    def row(i: Expr) -> None:
        token = e.bind("token", ids[i64(0), i])
        block = e.bind("block", tirx.floordiv(token, i64(nr)))
        lane = e.bind("lane", token - block * nr)
        if not w.coded:
            with e.loop("j", k) as j:
                e.store(y, w.element(block, j, i64(0), lane), i64(0), i, j)
            return
        with w.blocks(i64(0), i64(k)) as (first, count, scaling), e.loop("j", count) as j:
            e.store(y, w.element(block, first + j, scaling.index, lane), i64(0), i, first + j)

    few = e.bind("few", tirx.Cast("int64", n < 4))
    with e.loop("i", n * few) as i:
        row(i)
    with e.loop("c", (1 - few) * traits.threads, parallel=True) as c:
        low, high = _share(c, i64(traits.threads), n)
        with e.loop("i", high - low) as i:
            row(low + i)
    return e.function([*w.buffers, ids, y], [*w.buffers, ids], [y])
