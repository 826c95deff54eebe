"""Reading packed weights (packing.py) inside a kernel: every format becomes float32 in registers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tvm import tirx

from kvc_passes.weight_format import WeightFormat

from .emit import Emitter, Expr, argument, i64, splat, vec, widened
from .packing import packed_tensors


class Weights:
    """The tensors of one packed [n, k] weight, as arguments of a kernel, and expressions that read them."""

    def __init__(self, e: Emitter, n: int, k: int, format: WeightFormat, lanes: int) -> None:
        self.e, self.k, self.format, self.lanes = e, k, format, lanes
        names = ("w", "scales", "zeros")
        tensors = packed_tensors(n, k, format, lanes)
        self.buffers = [argument(name, t.shape, t.dtype) for name, t in zip(names, tensors)]
        self.block = format.block if format.block < k else k + k % 2
        """Inputs that share a scale; even where one block has them all."""

    @property
    def panels(self) -> int:
        return int(self.buffers[0].shape[0])

    @property
    def coded(self) -> bool:
        return self.format.coded

    def vector(self, panel: Expr, k: Expr, v: int) -> Expr:
        """The weights of input k for the v-th vector of a panel's outputs, of a format of floats."""
        return widened(self.buffers[0][panel, k, self._lanes(v)])

    def unit(self, wanted: int) -> int:
        """Most inputs, up to `wanted` but at least a byte's, that never straddle a block: a power of two."""
        unit = max(wanted, 2) if self.format.dtype == "uint4" else wanted
        while self.block % unit:
            unit //= 2
        return unit

    @contextmanager
    def blocks(self, start: Expr, end: Expr) -> Iterator[tuple[Expr, Expr, Block]]:
        """A loop over the blocks in inputs start .. end - 1: first input, inputs, and scales to apply.

        `start` is a multiple of every unit.
        """
        e = self.e
        size = i64(self.block)
        low = tirx.floordiv(start, size)
        with e.loop("s", tirx.floordiv(end + (self.block - 1), size) - low) as s:
            index = e.bind("sb", low + s)
            first = e.bind("first", tirx.Max(start, index * size))
            count = e.bind("count", tirx.Min(end, (index + 1) * size) - first)
            yield first, count, Block(self, index)

    def scale(self, panel: Expr, block: Expr, v: int) -> Expr:
        """Scales of a block, float32."""
        return widened(self.buffers[1][panel, block, self._lanes(v)])

    def zero(self, panel: Expr, block: Expr, v: int) -> Expr:
        """Zero points of a block, int32."""
        if self.format.zeros:
            return self._int(self.buffers[2][panel, block, self._lanes(v)])
        return self._constant(8 if self.format.dtype == "uint4" else 128)

    def codes(self, panel: Expr, k: Expr, v: int, count: int) -> list[Expr]:
        """Codes of `count` inputs from k, int32; for count > 1, k and count are even."""
        data, at = self.buffers[0], self._lanes(v)
        if self.format.dtype == "uint8":
            return [self._int(data[panel, k + i, at]) for i in range(count)]
        byte = tirx.floordiv(k, i64(2))
        if count == 1:
            shift = splat(tirx.Cast("int32", tirx.floormod(k, i64(2)) * 4), self.lanes)
            return [(self._int(data[panel, byte, at]) >> shift) & self._constant(15)]
        result = []
        for i in range(count // 2):
            both = self.e.bind("codes", self._int(data[panel, byte + i, at]))
            result += [both & self._constant(15), both >> self._constant(4)]
        return result

    def element(self, panel: Expr, k: Expr, block: Expr, lane: Expr) -> Expr:
        """One weight, float32; `block` is the block of k."""
        if not self.coded:
            return widened(self.buffers[0][panel, k, lane])
        if self.format.dtype == "uint8":
            code = tirx.Cast("int32", self.buffers[0][panel, k, lane])
        else:
            code = tirx.Cast("int32", self.buffers[0][panel, tirx.floordiv(k, i64(2)), lane])
            code = (code >> tirx.Cast("int32", tirx.floormod(k, i64(2)) * 4)) & tirx.const(15, "int32")
        zero = tirx.const(8 if self.format.dtype == "uint4" else 128, "int32")
        if self.format.zeros:
            zero = tirx.Cast("int32", self.buffers[2][panel, block, lane])
        return tirx.Cast("float32", code - zero) * widened(self.buffers[1][panel, block, lane])

    def expand(self, panel: Expr, start: Expr, end: Expr, to: Any) -> None:
        """to[(k - start) * NR + j] = the weight of input k for output j of a panel, k = start .. end - 1."""
        e, lanes, unit = self.e, self.lanes, self.unit(2)
        with self.blocks(start, end) as (first, count, block):
            block.load(panel)

            def step(k: Expr, size: int) -> None:
                for v in range(2):
                    for i, code in enumerate(self.codes(panel, k, v, size)):
                        value = block.value(code, v) * block.scales[v]
                        e.store(to, value, vec((k - start + i) * (2 * lanes) + v * lanes, lanes))

            self.steps(first, count, unit, step)

    def steps(self, first: Expr, count: Expr, unit: int, step: Any) -> None:
        """step(k, inputs) over `count` inputs from `first`, `unit` at a time and the rest one by one."""
        e = self.e
        with e.loop("j", tirx.floordiv(count, i64(unit))) as j:
            step(e.bind("k", first + j * unit), unit)
        if self.k % unit:
            with e.loop("j", tirx.floormod(count, i64(unit))) as j:
                step(e.bind("k", first + count - tirx.floormod(count, i64(unit)) + j), 1)

    def _lanes(self, v: int) -> Expr:
        return vec(i64(v * self.lanes), self.lanes)

    def _int(self, value: Expr) -> Expr:
        return tirx.Cast(f"int32x{self.lanes}", value)

    def _constant(self, value: int) -> Expr:
        return splat(tirx.const(value, "int32"), self.lanes)


class Block:
    """The scales and zero points of one block of inputs in a panel, in registers."""

    def __init__(self, weights: Weights, index: Expr) -> None:
        self.weights, self.index = weights, index
        self.scales: list[Expr] = []
        self.zeros: list[Expr] = []

    def load(self, panel: Expr) -> None:
        w = self.weights
        self.scales = [w.e.bind("scale", w.scale(panel, self.index, v)) for v in range(2)]
        self.zeros = [w.e.bind("zero", w.zero(panel, self.index, v)) for v in range(2)]

    def value(self, code: Expr, v: int) -> Expr:
        """code - zero as float32, which is exact."""
        return tirx.Cast(f"float32x{self.weights.lanes}", code - self.zeros[v])
