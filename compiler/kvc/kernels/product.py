"""The register tiles of a matrix product: rows of x times one panel of a packed weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import tirx

from .emit import Emitter, Expr, f32, i64, splat, vec
from .traits import CpuTraits
from .weights import Weights


@dataclass(frozen=True)
class Product:
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

    def source(self, row: Expr, k: Expr) -> Expr:
        """An element of x."""
        return self.x[i64(0), row, k]

    def weight(self, block: Expr, k: Expr, v: int) -> Expr:
        """Weights of input k for the v-th vector of a panel's outputs."""
        return self.w.vector(block, k, v)

    def splits(self, rows: int, accumulators: int = 8) -> int:
        """Independent accumulators of an element in a tile, of so many vectors in all: a power of two."""
        wanted = max(1, accumulators // (2 * rows)) if self.k >= accumulators else 1
        return 1 << (wanted.bit_length() - 1)

    def tile(
        self,
        rows: int,
        block: Expr,
        row: Expr,
        start: Expr,
        depth: Expr,
        splits: int = 1,
        panel: Any = None,
        ahead: int = 0,
    ) -> None:
        """y[row .. row + rows, panel `block`] = x w, over k = start .. start + depth - 1.

        splits: independent accumulators of an element, for tiles too small to hide the latency of an FMA.
        panel: the weights k = start .. of the panel as float32, where they are not read from the format.
        ahead: inputs that weights are prefetched ahead of their use, 0 for no prefetch.
        """
        e, lanes = self.e, self.lanes
        acc = e.local("acc", splits * rows * 2 * lanes)

        def at(i: Expr, v: int, s: int = 0) -> Expr:
            return vec(((s * rows + i) * 2 + v) * lanes, lanes)

        def step(k: Expr, s: int) -> None:
            if panel is None:
                if ahead:
                    for v in range(2):
                        e.prefetch(self.w.buffers[0], block, k + ahead, i64(v * lanes))
                weights = [e.bind("wv", self.weight(block, k, v)) for v in range(2)]
            else:
                weights = [
                    e.bind("wv", panel[vec((k - start) * (2 * lanes) + v * lanes, lanes)]) for v in range(2)
                ]
            with e.unrolled("i", rows) as i:
                xv = e.bind("xv", splat(self.source(row + i, k), lanes))
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

    @property
    def coded_rows(self) -> int:
        """Most rows of `coded_tile`: scales, zero points, codes and weights need registers too."""
        return max((self.traits.registers - 4) // 4, (self.traits.registers - 10) // 2)

    def coded_tile(self, rows: int, block: Expr, splits: int) -> None:
        """y[0 .. rows - 1, panel `block`] = x w for a weight of codes, and rows <= coded_rows.

        Where two accumulators an element fit, the sums of a block of inputs are scaled, else the weights.
        `splits` as in `tile`.
        """
        e, w, lanes = self.e, self.w, self.lanes
        late = 4 * rows <= self.traits.registers - 4
        splits = splits if late else 1
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
                    values = [scaling.value(codes[v][j], v) for v in range(2)]
                    if not late:
                        values = [value * scale for value, scale in zip(values, scaling.scales)]
                    weights = [e.bind("wv", value) for value in values]
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
