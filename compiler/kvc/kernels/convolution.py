"""Convolutions that TVM generates, as register tiles of several channels by a few vectors of pixels.

A tile of rows of the input, with its padding, is copied into a buffer in which the pixels of every term of an
output's sum are as far from each other as those of the output: row after row with the room of a window
between, rows and columns of a stride apart by their remainders. Then every term is whole vectors, whatever
the window, the stride and the width. What is already so in memory, such as the pixels of a window of one, is
read where it stands.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Final

from tvm import tirx

from .contraction import WORTH_THREADS
from .emit import Emitter, Expr, chunks, f32, i64, splat, vec
from .traits import CpuTraits
from .window import Convolution

_BUFFER: Final = 192 << 10
"""Most bytes of a tile's buffer: with the weights of a few channels it stays in a second-level cache."""
_DIRECT: Final = 512 << 10
"""Most bytes of what is read where it stands for a tile."""
_CACHED: Final = 512 << 10
"""Bytes of weights that stay in a second-level cache from one tile to the next."""
_FETCH: Final = 0.5
"""Cycles for a weight from beyond that."""
_WEIGHT: Final = 0.25
"""A tile's buffers that are as large as what the kernel reads and writes count as so much more time."""
_SPARE: Final = 4
"""Vector registers that are no sums."""
_BALANCED: Final = 1.1
"""The busiest thread may do so many times as much as it would if all did as much."""


def convolution_kernel(found: Convolution, traits: CpuTraits, parallel: bool) -> tirx.PrimFunc | None:
    """The kernel of a convolution; None where no tile of it fits its buffer.

    The sum of an element runs over its terms in their order. A thread allocates the buffer of a tile, of up
    to 192 KiB, and the sums of a few channels of it.
    """
    shape = _shape(found, traits)
    return None if shape is None else _Kernel(found, shape, traits, parallel).function()


@dataclass(frozen=True)
class _Shape:
    """Rows and columns of a tile, and of a register tile the channels and vectors."""

    rows: int
    columns: int
    direct: bool
    height: int
    width: int
    vectors: int
    cost: float

    @classmethod
    def of(cls, found: Convolution, rows: int, columns: int, direct: bool, traits: CpuTraits) -> _Shape:
        """With the register tile that takes least time."""
        pixels = found.flat(rows, columns)
        vectors = -(-pixels // traits.lanes)
        best: tuple[float, int, int] | None = None
        for height in (h for h in range(1, traits.registers) if found.channels % h == 0):
            for width in range(1, min(4, vectors) + 1):
                if (height + 1) * width > traits.registers - _SPARE:
                    break
                whole, rest = divmod(vectors, width)
                cycles = whole * _cycles(height, width) + (_cycles(height, rest) if rest else 0)
                cost = cycles * (found.channels // height)
                if best is None or cost < best[0]:
                    best = cost, height, width
        assert best is not None
        tiles = -(-found.height // rows) * (found.width // columns)
        copied = 0 if direct else found.buffer(rows, columns)
        weights = found.channels * found.terms
        fetched = _FETCH * weights if 4 * weights > _CACHED else 0
        cost = tiles * (best[0] * found.terms + copied + fetched)
        own = traits.threads * (copied + best[1] * vectors * traits.lanes)
        cost *= 1 + _WEIGHT * own / found.moved
        return cls(rows, columns, direct, best[1], best[2], vectors, cost)


def _cycles(height: int, width: int) -> float:
    """Of a term: its products, and half as long for what it loads."""
    return height * width + (height + width) / 2


def _shape(found: Convolution, traits: CpuTraits) -> _Shape | None:
    """The tile that takes least time, and not much memory for that; None where none fits."""
    if found.direct and found.flat(found.height, found.width) >= traits.lanes:
        limit = max(traits.lanes, _DIRECT // 4 // found.depth)
        rows = [r for r in _parts(found.height) if found.flat(r, found.width) >= traits.lanes]
        fitting = [r for r in rows if found.flat(r, found.width) <= limit] or rows[-1:]
        options = [_Shape.of(found, r, found.width, True, traits) for r in fitting]
    else:
        options = [
            _Shape.of(found, rows, columns, False, traits)
            for columns in (c for c in range(1, found.width + 1) if found.width % c == 0)
            for rows in _parts(found.height)
            if 4 * (found.buffer(rows, columns) + traits.lanes) <= _BUFFER
            and (columns == found.width or columns >= traits.lanes)
        ]
    return min(options, key=lambda option: option.cost, default=None)


def _parts(size: int) -> list[int]:
    """Rows of a tile, for every number of tiles, the most first."""
    return list(dict.fromkeys(-(-size // count) for count in range(1, size + 1)))


class _Kernel:
    """One convolution, written down."""

    def __init__(self, found: Convolution, shape: _Shape, traits: CpuTraits, parallel: bool) -> None:
        self.found, self.shape, self.lanes = found, shape, traits.lanes
        self.e = Emitter()
        self.pitch = found.pitch(shape.columns)
        self.threads = traits.threads if parallel and found.points >= WORTH_THREADS else 1
        self.values: dict[Any, Expr] = {}

    def function(self) -> tirx.PrimFunc:
        e, found, shape = self.e, self.found, self.shape
        down, across = -(-found.height // shape.rows), found.width // shape.columns
        outer = [(v, int(v.dom.extent)) for v in found.outer]
        tiles = math.prod(extent for _, extent in outer) * found.groups * down * across
        tall = found.channels // shape.height
        shares = _shares(tiles, tall, self.threads)
        with e.loop("task", tiles * shares, parallel=self.threads > 1 and tiles * shares > 1) as task:
            rest, share = self._digit("share", task, shares)
            rest, column = self._digit("across", rest, across)
            rest, row = self._digit("down", rest, down)
            rest, group = self._digit("group", rest, found.groups)
            for variable, extent in reversed(outer):
                rest, self.values[variable.var] = self._digit(str(variable.var.name), rest, extent)
            begin = e.bind("begin", row * shape.rows)
            # The last tile begins earlier, so that it is whole, and leaves away what others have.
            top = e.bind("top", tirx.Min(begin, i64(found.height - shape.rows)))
            left = e.bind("left", column * shape.columns)
            first = group * found.channels
            tile = None if shape.direct else self._copied(first, top, left)
            sums = e.local("sums", shape.height * shape.vectors * self.lanes)
            low = tirx.floordiv(share * tall, i64(shares))
            high = tirx.floordiv((share + 1) * tall, i64(shares))
            with e.loop("channels", high - low) as number:
                channel = e.bind("channel", first + (low + number) * shape.height)
                self._sum(tile, channel, top, sums)
                self._finish(sums, channel, top, begin, left)
        return e.function(found.params, found.params[:-1], found.params[-1:])

    def _digit(self, name: str, number: Expr, extent: int) -> tuple[Expr, Expr]:
        """A number without its last digit, and that digit."""
        if extent == 1:
            return number, i64(0)
        digit = self.e.bind(name, tirx.floormod(number, i64(extent)))
        return self.e.bind("rest", tirx.floordiv(number, i64(extent))), digit

    def _copied(self, channel: Expr, top: Expr, left: Expr) -> Any:
        """The buffer of a tile, filled."""
        e, found, shape = self.e, self.found, self.shape
        tile = e.local("tile", found.buffer(shape.rows, shape.columns) + self.lanes)
        plane = found.plane(shape.rows, shape.columns)
        values = dict(self.values)
        with _loops(e, found.inner) as inner:
            values |= inner
            number = _place(found.inner, inner)
            for p in range(found.down.phases):
                for q in range(found.across.phases):
                    start = (number * found.down.phases + p) * found.across.phases + q
                    rows, columns = shape.rows + found.down.reach(p), shape.columns + found.across.reach(q)
                    with e.loop("row", rows) as row, e.loop("column", columns) as column:
                        y = (top + row) * found.down.stride + p
                        x = (left + column) * found.across.stride + q
                        value = found.source(values, channel, y, x)
                        e.store(tile, value, start * plane + row * self.pitch + column)
        return tile

    def _sum(self, tile: Any, channel: Expr, top: Expr, sums: Any) -> None:
        """The sums of `height` channels for all pixels of the tile."""
        shape = self.shape
        whole, rest = divmod(shape.vectors, shape.width)
        if whole:
            with self.e.loop("vectors", whole) as number:
                self._register_tile(tile, channel, top, sums, number * shape.width, shape.width)
        if rest:
            self._register_tile(tile, channel, top, sums, i64(whole * shape.width), rest)

    def _register_tile(self, tile: Any, channel: Expr, top: Expr, sums: Any, first: Expr, width: int) -> None:
        e, found, shape, lanes = self.e, self.found, self.shape, self.lanes
        last = found.flat(shape.rows, shape.columns) - lanes
        starts = [(first + v) * lanes for v in range(width)]
        if shape.direct:  # nothing behind the last pixel: its vector begins earlier
            starts = [tirx.Min(start, i64(last)) for start in starts]
        starts = [e.bind("start", start) for start in starts]
        acc = e.local("acc", shape.height * width * lanes)
        for i in range(shape.height * width):
            e.store(acc, splat(f32(found.start), lanes), vec(i64(i * lanes), lanes))
        with _loops(e, found.terms_in_order) as values:
            pixels = [e.bind("pixels", p) for p in self._pixels(tile, values, channel, top, starts)]
            for i in range(shape.height):
                weight = splat(found.weight({**self.values, **values}, channel + i), lanes)
                weight = e.bind("weight", weight)
                for v in range(width):
                    at = vec(i64((i * width + v) * lanes), lanes)
                    e.store(acc, acc[at] + pixels[v] * weight, at)
        for i in range(shape.height):
            for v in range(width):
                value = acc[vec(i64((i * width + v) * lanes), lanes)]
                e.store(sums, value, vec(starts[v] + i * shape.vectors * lanes, lanes))

    def _pixels(
        self, tile: Any, values: Mapping[Any, Expr], channel: Expr, top: Expr, starts: Sequence[Expr]
    ) -> list[Expr]:
        """The vectors of one term."""
        found, shape, lanes = self.found, self.shape, self.lanes
        if shape.direct:
            own = {**self.values, **values}
            return [found.load(own, channel, top, vec(start, lanes)) for start in starts]
        plane = _place(found.inner, values)
        plane = plane * found.down.phases + found.down.phase(values)
        plane = plane * found.across.phases + found.across.phase(values)
        at = plane * found.plane(shape.rows, shape.columns)
        at = self.e.bind("at", at + found.down.shift(values) * self.pitch + found.across.shift(values))
        return [tile[vec(at + start, lanes)] for start in starts]

    def _finish(self, sums: Any, channel: Expr, top: Expr, begin: Expr, left: Expr) -> None:
        """What is computed from the sums of `height` channels."""
        e, found, shape, lanes = self.e, self.found, self.shape, self.lanes
        many = shape.columns // lanes
        with (
            e.loop("i", shape.height) as i,
            e.loop("row", shape.rows) as row,
            e.when(top + row >= begin),  # those before are another tile's
        ):
            start = e.bind("start", i * shape.vectors * lanes + row * self.pitch)

            def store(at: Expr, width: int) -> None:
                with e.vectorized("lane", width) as lane:
                    total = sums[start + at + lane]
                    e.add(found.store(self.values, channel + i, top + row, left + at + lane, total))

            if many:
                with e.loop("column", many) as column:
                    store(column * lanes, lanes)
            for at, width in chunks(shape.columns - many * lanes, lanes):
                store(i64(many * lanes + at), width)


def _shares(tiles: int, tall: int, threads: int) -> int:
    """Parts of the channels: as few as keep all threads about as busy."""

    def worst(shares: int) -> float:
        return -(-tiles * shares // threads) * threads / (tiles * shares)

    options = range(1, min(threads, tall) + 1)
    return next((shares for shares in options if worst(shares) <= _BALANCED), min(options, key=worst))


@contextmanager
def _loops(e: Emitter, variables: Sequence[Any]) -> Iterator[dict[Any, Expr]]:
    """Loops over all values of variables, the last one innermost."""
    with ExitStack() as stack:
        yield {v.var: stack.enter_context(e.loop(str(v.var.name), int(v.dom.extent))) for v in variables}


def _place(variables: Sequence[Any], values: Mapping[Any, Expr]) -> Expr:
    """The number of an element whose indices are these variables."""
    number: Expr = i64(0)
    for v in variables:
        number = number * int(v.dom.extent) + values[v.var]
    return number
