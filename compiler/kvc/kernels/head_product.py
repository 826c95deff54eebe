"""float32 products with a matrix for every head, all of which stand packed one behind the other."""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx

from kvc_passes.kernel_sets import TensorType
from kvc_passes.weight_format import FLOAT32, WeightFormat

from .emit import Emitter, Expr, argument, i64, size_var
from .packing import packed_tensors
from .product import Product
from .traits import CpuTraits
from .weights import Weights

_SERIAL = 16384
"""Weights up to this many elements are read faster than other workers wake up."""


def packed_tensor(heads: int, n: int, k: int, format: WeightFormat, traits: CpuTraits) -> TensorType:
    """The tensor of `heads` packed [n, k] weights of floats."""
    (one,) = packed_tensors(n, k, format, traits.lanes)
    return TensorType(one.dtype, (heads * one.shape[0], *one.shape[1:]))


@dataclass(frozen=True)
class _HeadProduct(Product):
    """The product of one head."""

    head: Expr = 0
    absorbed: bool = False
    first: Expr = 0
    """The first panel of the head's weight."""

    def out(self, row: Expr, column: Expr) -> list[Expr]:
        return [i64(0), *([self.head, row] if self.absorbed else [row, self.head]), column]

    def source(self, row: Expr, k: Expr) -> Expr:
        return self.x[(i64(0), *([self.head, row] if self.absorbed else [row, self.head]), k)]

    def weight(self, block: Expr, k: Expr, v: int) -> Expr:
        return self.w.vector(self.first + block, k, v)


def head_product(
    heads: int,
    group: int,
    n: int,
    k: int,
    traits: CpuTraits,
    *,
    absorbed: bool,
    format: WeightFormat = FLOAT32,
) -> tirx.PrimFunc:
    """y_h = x_h w_(h // group)^T for every head and any number of rows m >= 1.

    Arguments of the function: x f32[1, m, heads, k], `packed_tensor(heads // group, n, k, format)`,
    y f32[1, m, heads, n]; absorbed: x f32[1, heads, m, k] and y f32[1, heads, m, n].
    A task is a panel of a head, which passes over all rows in tiles.
    """
    e, m, limit = Emitter(), size_var("m"), traits.tile_rows
    shape = (lambda d: (1, heads, m, d)) if absorbed else (lambda d: (1, m, heads, d))
    x, y = argument("x", shape(k)), argument("y", shape(n))
    tensor = packed_tensor(heads // group, n, k, format, traits)
    w = Weights(e, n, k, format, traits.lanes)
    w.buffers = [argument("w", tensor.shape, tensor.dtype)]
    panels = tensor.shape[0] // (heads // group)
    threads = 1 if heads * n * k <= _SERIAL else traits.threads
    with e.loop("c", threads, parallel=threads > 1) as c:
        low = e.bind("low", tirx.floordiv(c * (heads * panels), i64(threads)))
        high = tirx.floordiv((c + 1) * (heads * panels), i64(threads))
        with e.loop("j", high - low) as j:
            head = e.bind("head", tirx.floordiv(low + j, i64(panels)))
            block = e.bind("block", tirx.floormod(low + j, i64(panels)))
            first = e.bind("first", tirx.floordiv(head, i64(group)) * panels)
            product = _HeadProduct(e, n, k, traits, x, w, None, y, False, k, head, absorbed, first)

            def tile(rows: int, row: Expr, product: Product = product, block: Expr = block) -> None:
                product.tile(rows, block, row, i64(0), i64(k), product.splits(rows))

            with e.when(m <= limit):
                e.switch(m, range(1, limit + 1), lambda rows: tile(rows, i64(0)))
            with e.when(m > limit):
                tiles = e.bind("tiles", tirx.floordiv(m + (limit - 1), i64(limit)))
                height = e.bind("height", tirx.floordiv(m, tiles))
                extra = e.bind("extra", m - tiles * height)
                with e.loop("t", tiles) as t:
                    row = e.bind("row", t * height + tirx.Min(t, extra))
                    rows = e.bind("rows", height + tirx.Select(t < extra, i64(1), i64(0)))
                    e.switch(rows, range(limit, limit // 2 - 1, -1), lambda n: tile(n, row))
    return e.function([x, *w.buffers, y], [x, *w.buffers], [y])
