"""From scores of a block of keys to the weights of a running softmax, in base 2."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from tvm import tirx

from . import vector_math
from .emit import Expr, chunks, f32, fold, i64, splat, vec

if TYPE_CHECKING:
    from .attention_block import BlockKernel

NEVER: Final = -1e30
"""Score of a masked key, and the maximum before the first key: finite, so that differences are too."""


class BlockSoftmax:
    """Emits what stands between the two products of a block: softcap, biases, mask, weights."""

    def __init__(self, block: BlockKernel) -> None:
        self.block, self.e, self.shape, self.lanes = block, block.e, block.shape, block.lanes

    def weights(self, row: Expr, slot: Expr, start: Expr, vectors: Expr, masked: Expr) -> None:
        """Turn a tile's scores into weights of the running softmax, and rescale what was summed before."""
        if self.shape.softcap:
            self._softcap(slot, vectors)
        if "slopes" in self.block.extras:
            self._slope(row, slot, start * self.shape.page_size, vectors)
        if "bias" in self.block.extras:
            self._bias(row, slot, start * self.shape.page_size, vectors)
        with self.e.when(masked):
            self._mask(row, slot, start * self.shape.page_size, vectors)
        with self.e.loop("i", self.block.height) as i:
            self._weights(row + i, (slot + i) * self.block.keys, vectors)

    def _softcap(self, slot: Expr, vectors: Expr) -> None:
        e, cap = self.e, float(self.shape.softcap or 1.0)
        with e.loop("i", self.block.height) as i, e.loop("v", vectors) as v:
            at = vec((slot + i) * self.block.keys + v * self.lanes, self.lanes)
            value = self.block.scores[at] * splat(f32(1 / cap), self.lanes)
            value = vector_math.tanh(e.bind, value) * splat(f32(cap * vector_math.LOG2E), self.lanes)
            e.store(self.block.scores, value, at)

    def _slope(self, row: Expr, slot: Expr, key: Expr, vectors: Expr) -> None:
        """Add the slope of the row's head, times how far the key is behind."""
        e, lanes = self.e, self.lanes
        with e.loop("i", self.block.height) as i:
            slope = self.block.extras["slopes"][tirx.Cast("int64", self.block.heads[row + i])]
            slope = e.bind("slope", splat(slope * f32(vector_math.LOG2E), lanes))
            position = e.bind("row_at", splat(self.block.positions[row + i], lanes))
            with e.loop("v", vectors) as v:
                at = vec((slot + i) * self.block.keys + v * lanes, lanes)
                distance = tirx.Cast(f"float32x{lanes}", self._positions(key + v * lanes) - position)
                e.store(self.block.scores, self.block.scores[at] + distance * slope, at)

    def _bias(self, row: Expr, slot: Expr, key: Expr, vectors: Expr) -> None:
        """Add what is learned for the row's head and how far the key is behind."""
        e, lanes, count = self.e, self.lanes, self.shape.distances
        last, zero = (splat(tirx.IntImm("int32", n), lanes) for n in (count - 1, 0))
        with e.loop("i", self.block.height) as i:
            first = e.bind("first", splat(self.block.heads[row + i] * count, lanes))
            position = e.bind("row_at", splat(self.block.positions[row + i], lanes))
            with e.loop("v", vectors) as v:
                at = vec((slot + i) * self.block.keys + v * lanes, lanes)
                distance = position - self._positions(key + v * lanes)  # below 0 for keys that are masked
                place = e.bind("place", first + tirx.Min(tirx.Max(distance, zero), last))
                bias = self.block.extras["bias"][place] * splat(f32(vector_math.LOG2E), lanes)
                e.store(self.block.scores, self.block.scores[at] + bias, at)

    def _mask(self, row: Expr, slot: Expr, key: Expr, vectors: Expr) -> None:
        e, lanes = self.e, self.lanes
        never = splat(f32(NEVER), lanes)
        with e.loop("i", self.block.height) as i:
            position = e.bind("row_at", splat(self.block.positions[row + i], lanes))
            head = (
                None
                if self.block.heads is None
                else e.bind("head_at", splat(self.block.heads[row + i], lanes))
            )
            with e.loop("v", vectors) as v:
                at = vec((slot + i) * self.block.keys + v * lanes, lanes)
                keys = e.bind("key", self._positions(key + v * lanes))
                value = self.block.scores[at]
                for seen in self.block.mask.seen(keys, position, head):
                    value = tirx.Select(seen, value, never)
                e.store(self.block.scores, value, at)

    def _positions(self, key: Expr) -> Expr:
        """Positions of a vector of keys, of which `key` is the first as the mask counts them."""
        return vec(tirx.Cast("int32", self.block.mask.position(key)), self.lanes)

    def _weights(self, row: Expr, base: Expr, vectors: Expr) -> None:
        e, lanes, dim = self.e, self.lanes, self.shape.value_dim
        top = e.local("vtop", lanes)
        every = vec(i64(0), lanes)
        e.store(top, splat(f32(NEVER), lanes), every)
        with e.loop("v", vectors) as v:
            e.store(top, tirx.Max(top[every], self.block.scores[vec(base + v * lanes, lanes)]), every)
        before = e.bind("before", self.block.maximum[row])
        highest = e.bind("highest", tirx.Max(before, fold(top[every], tirx.Max)))
        e.store(self.block.maximum, highest, row)
        factor = e.bind("factor", vector_math.exp2_nonpositive(e.bind, before - highest))
        for start, width in chunks(dim, lanes):
            at = vec(row * dim + start, width)
            e.store(self.block.output, self.block.output[at] * splat(factor, width), at)
        shift = e.bind("shift", splat(highest, lanes))
        e.store(top, splat(f32(0), lanes), every)
        with e.loop("v", vectors) as v:
            at = vec(base + v * lanes, lanes)
            weight = e.bind("weight", vector_math.exp2_nonpositive(e.bind, self.block.scores[at] - shift))
            e.store(self.block.scores, weight, at)
            e.store(top, top[every] + weight, every)
        e.store(self.block.total, self.block.total[row] * factor + fold(top[every], lambda a, b: a + b), row)
