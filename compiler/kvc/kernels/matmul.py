"""float32 products with a constant matrix of any format, which is packed into panels (packing.py).

A panel holds `panel(traits)` output columns, two vectors. Every row count up to a register tile has its own
code, so a tail wastes nothing, and a decode batch reads each panel once. Codes become float32 in registers
for few rows; for many, a block of a panel is expanded into a buffer that its row tiles share.
"""

from __future__ import annotations

import math
from dataclasses import replace

from tvm import tirx

from kvc_passes.weight_format import FLOAT32, WeightFormat

from .emit import Emitter, Expr, argument, i64, size_var
from .knobs import PRODUCT, FewRows, ManyRows, ProductKnobs
from .packing import pack, packed_tensors
from .product import Product
from .traits import CpuTraits
from .weights import Weights

__all__ = ["pack", "packed_embedding", "packed_matmul", "packed_shape", "panel"]

_SERIAL = 16384
"""Weights up to this many elements are read faster than other workers wake up."""
_EXPANDED_BYTES = 16 * 1024
"""Codes of few rows become float32 in pieces of this size, which stay in the first-level cache."""


def panel(traits: CpuTraits) -> int:
    """Columns of a panel."""
    return 2 * traits.lanes


def packed_shape(n: int, k: int, traits: CpuTraits) -> tuple[int, ...]:
    """Shape of the packed form of a float32 [n, k] weight."""
    return packed_tensors(n, k, FLOAT32, traits.lanes)[0].shape


def _share(part: Expr, parts: Expr, total: Expr) -> tuple[Expr, Expr]:
    """First and end of the `part`-th of `parts` nearly equal shares of `total`."""
    return tirx.floordiv(part * total, parts), tirx.floordiv((part + 1) * total, parts)


def _column_groups(panels: int, threads: int) -> int:
    """Into how many groups of panels a large product is split: the most that stay balanced."""
    groups = [g for g in range(1, threads + 1) if threads % g == 0]
    balanced = [g for g in groups if math.ceil(panels / g) * g <= 1.1 * panels]
    return max(balanced)


def _depth(n: int, k: int, most: int, format: WeightFormat, traits: CpuTraits) -> int:
    """Inputs of a block along k. Codes are expanded block by block, so they have blocks for every n."""
    each = -(-k // -(-k // most))
    if format.coded:
        unit = format.block if format.block <= most // 8 and format.block % 2 == 0 else 2
        return min(k, -(-each // unit) * unit)
    return k if n % panel(traits) else each


def packed_matmul(
    n: int,
    k: int,
    traits: CpuTraits,
    *,
    bias: bool = False,
    max_rows: int | None = None,
    flat: bool = False,
    format: WeightFormat = FLOAT32,
    knobs: ProductKnobs = PRODUCT,
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
    depth = _depth(n, k, knobs.many.depth, format, traits)
    product = Product(e, n, k, traits, x, w, b, y, flat, depth)
    limit = traits.tile_rows
    threads = 1 if n * k <= _SERIAL else traits.threads
    with e.loop("c", threads, parallel=threads > 1) as c:
        with e.when(m <= limit):
            _few_rows(product, m, c, threads, min(limit, max_rows or limit), knobs.few)
        if max_rows is None or max_rows > limit:
            with e.when(m > limit):
                _many_rows(product, m, c, threads, knobs.many)
    inputs = [x, *w.buffers, b] if bias else [x, *w.buffers]
    return e.function([*inputs, y], inputs, [y])


def _few_rows(product: Product, m: Expr, c: Expr, threads: int, limit: int, knobs: FewRows) -> None:
    """One register tile of m <= limit rows: each panel is read once, whole."""
    e, w = product.e, product.w
    low, high = _share(c, i64(threads), i64(w.panels))
    low = e.bind("low", low)

    def splits(rows: int) -> int:
        return product.splits(rows, knobs.accumulators)

    if not w.coded:
        with e.loop("b", high - low) as index:
            block = e.bind("block", low + index)
            whole = (i64(0), i64(0), i64(product.k))
            e.switch(
                m,
                range(1, limit + 1),
                lambda rows: product.tile(rows, block, *whole, splits(rows), ahead=knobs.ahead),
            )
    else:
        most = min(limit, product.coded_rows)
        with e.when(m <= most), e.loop("b", high - low) as index:
            block = e.bind("block", low + index)
            e.switch(m, range(1, most + 1), lambda rows: product.coded_tile(rows, block, splits(rows)))
        if most < limit:
            with e.when(m > most), e.loop("b", high - low) as index:
                _expanded_tile(product, m, range(most + 1, limit + 1), e.bind("block", low + index))
    if product.bias is not None:
        product.add_bias(low, high, i64(0), m)


def _expanded_tile(product: Product, m: Expr, cases: range, block: Expr) -> None:
    """A tile of m rows, one of `cases`, of a panel of codes that becomes float32 by and by."""
    e = product.e
    product = replace(product, depth=min(product.k, _EXPANDED_BYTES // (8 * product.lanes)))
    expanded = e.local("expanded", product.depth * 2 * product.lanes)
    with e.loop("kb", -(-product.k // product.depth)) as kb:
        start = e.bind("start", kb * product.depth)
        depth = e.bind("depth", tirx.Min(i64(product.depth), i64(product.k) - start))
        product.w.expand(block, start, start + depth, expanded)
        e.switch(m, cases, lambda rows: product.tile(rows, block, i64(0), start, depth, panel=expanded))


def _many_rows(product: Product, m: Expr, c: Expr, threads: int, knobs: ManyRows) -> None:
    """Row tiles of nearly equal height, in blocks whose x stays in cache while the panels pass."""
    e, limit = product.e, knobs.rows or product.traits.tile_rows
    groups = math.gcd(knobs.groups, threads) if knobs.groups else _column_groups(product.w.panels, threads)
    low, high = _share(tirx.floormod(c, i64(groups)), i64(groups), i64(product.w.panels))
    low, high = e.bind("low", low), e.bind("high", high)
    tiles = e.bind("tiles", tirx.floordiv(m + (limit - 1), i64(limit)))
    height = e.bind("height", tirx.floordiv(m, tiles))
    extra = e.bind("extra", m - tiles * height)
    first, last = _share(tirx.floordiv(c, i64(groups)), i64(threads // groups), tiles)
    first, last = e.bind("first", first), e.bind("last", last)
    step = max(1, knobs.row_bytes // (4 * product.depth * limit))
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
