"""Convolutions as loop nests say them: sums of products, one factor of which moves with the pixels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tvm import tirx
from tvm.ir import TensorLoad
from tvm.tirx.analysis import undefined_vars
from tvm_ffi import structural_map

from kvc_passes.graph import static

Values = Mapping[Any, Any]
"""Expressions that take the place of variables."""


@dataclass(frozen=True)
class Window:
    """How an index moves: stride * pixel + dilation * term + offset.

    Pixels at the distance of a stride are neighbours in a tile's buffer; those between them lie in planes of
    their own, one for every remainder.
    """

    stride: int
    dilation: int
    offset: int
    size: int
    term: Any
    """The variable of the sum that it has; None for a window of one."""

    @property
    def phases(self) -> int:
        return min(self.stride, self.size)

    @property
    def most(self) -> int:
        """How far the last term is from the first, in pixels of the output."""
        return max(map(self.reach, range(self.phases)))

    def reach(self, phase: int) -> int:
        """The same of the terms in one plane."""
        return (self.size - 1) * self.dilation if self.stride == 1 else (self.size - 1 - phase) // self.stride

    def phase(self, values: Values) -> Any:
        return 0 if self.phases == 1 else tirx.floormod(values[self.term], tirx.const(self.stride, "int64"))

    def shift(self, values: Values) -> Any:
        if self.term is None:
            return 0
        if self.stride == 1:
            return values[self.term] * self.dilation
        return tirx.floordiv(values[self.term], tirx.const(self.stride, "int64"))


@dataclass(frozen=True)
class Convolution:
    """What a kernel computes for every channel and pixel (row, column) of all values of the outer variables.

    That is result(sum over terms of source(...) * weight(...)), where source moves with the pixels.

    Attributes:
        params: of the kernel, the output last.
        fill: the block that makes what the sum reads, such as with padding; None where that is an input.
        total: the block of the sum.
        result: the block of what is computed from it, None where the sum is the output.
        moving, fixed: the factors of a term.
        channel, row, column: variables of the sum's block; None for an axis that is not there.
        channels: as many neighbouring ones read the same pixels.
        down, across: how rows and columns move.
    """

    params: Sequence[Any]
    fill: Any
    total: Any
    result: Any
    moving: Any
    fixed: Any
    channel: Any
    row: Any
    column: Any
    channels: int
    down: Window
    across: Window

    @cached_property
    def outer(self) -> list[Any]:
        """Variables beside channel and pixel."""
        known = [v.var for v in (self.channel, self.row, self.column) if v is not None]
        return [v for v in self.spatial if not any(v.var.same_as(k) for k in known)]

    @cached_property
    def spatial(self) -> list[Any]:
        return [v for v in self.total.iter_vars if v.iter_type == tirx.IterVar.DataPar]

    @cached_property
    def terms_in_order(self) -> list[Any]:
        """Variables of the sum."""
        return [v for v in self.total.iter_vars if v.iter_type == tirx.IterVar.CommReduce]

    @cached_property
    def inner(self) -> list[Any]:
        """Those of them that are not steps of the window."""
        return [v for v in self.terms_in_order if not any(v.var.same_as(s) for s in self._steps)]

    @property
    def _steps(self) -> list[Any]:
        return [w.term for w in (self.down, self.across) if w.term is not None]

    @property
    def groups(self) -> int:
        return 1 if self.channel is None else int(self.channel.dom.extent) // self.channels

    @property
    def height(self) -> int:
        return 1 if self.row is None else int(self.row.dom.extent)

    @property
    def width(self) -> int:
        return int(self.column.dom.extent)

    @property
    def depth(self) -> int:
        return math.prod(int(v.dom.extent) for v in self.inner)

    @property
    def terms(self) -> int:
        return math.prod(int(v.dom.extent) for v in self.terms_in_order)

    @property
    def points(self) -> int:
        return math.prod(int(v.dom.extent) for v in self.total.iter_vars)

    @property
    def moved(self) -> int:
        """Elements of what moves with the pixels, and of the output."""
        return math.prod(static(n) or 0 for n in self.moving.source.shape) + self.points // self.terms

    @property
    def start(self) -> float:
        """What a sum starts with."""
        return float(self.total.init.value.value)

    @cached_property
    def direct(self) -> bool:
        """Whether the pixels of every term lie one behind the other in an input."""
        still = self.down.stride == self.across.stride == self.down.size == self.across.size == 1
        whole = self.across.offset == 0 and static(self.moving.source.shape[-1]) == self.width
        return self.fill is None and still and (self.row is None or whole)

    def pitch(self, columns: int) -> int:
        """Elements from one row of a tile's buffer to the next."""
        return columns + self.across.most

    def flat(self, rows: int, columns: int) -> int:
        """Elements from the first pixel of a tile to behind the last."""
        return (rows - 1) * self.pitch(columns) + columns

    def plane(self, rows: int, columns: int) -> int:
        return (rows + self.down.most) * self.pitch(columns)

    def buffer(self, rows: int, columns: int) -> int:
        """Elements that a tile reads."""
        return self.depth * self.down.phases * self.across.phases * self.plane(rows, columns)

    def load(self, values: Values, channel: Any, y: Any, x: Any) -> Any:
        """What a term reads from the pixel (y, x) on, of a window of one that stands in an input."""
        still = {step: tirx.const(0, "int64") for step in self._steps}
        return self.source({**values, **still}, channel, y, x)

    def source(self, values: Values, channel: Any, y: Any, x: Any) -> Any:
        """What a term reads of the input's row y and column x, before the window's offset."""
        given = self._given(values, channel)
        indices = [substituted(index, given) for index in self.moving.indices]
        indices[-1] = x + self.across.offset
        if self.row is not None:
            indices[-2] = y + self.down.offset
        if self.fill is None:
            return tirx.BufferLoad(self.moving.source, indices)
        made = dict(zip((v.var for v in self.fill.iter_vars), indices, strict=True))
        return substituted(self.fill.body.value, made)

    def weight(self, values: Values, channel: Any) -> Any:
        return substituted(self.fixed, self._given(values, channel))

    def store(self, values: Values, channel: Any, y: Any, x: Any, sum_: Any) -> Any:
        """The statement that stores an element, given its sum."""
        given = self._given(values, channel, y, x)
        last = self.total if self.result is None else self.result
        made = {v.var: given[old.var] for v, old in zip(last.iter_vars, self.spatial)}
        indices = [substituted(index, made) for index in last.body.indices]
        if self.result is not None:
            sum_ = substituted(last.body.value, made, {self.total.body.buffer: sum_})
        return tirx.BufferStore(last.body.buffer, sum_, indices)

    def _given(self, values: Values, channel: Any, y: Any = None, x: Any = None) -> dict[Any, Any]:
        places = zip((self.channel, self.row, self.column), (channel, y, x))
        return {**values, **{v.var: place for v, place in places if v is not None and place is not None}}


def uses(value: Any, variable: Any) -> bool:
    """Whether an expression depends on a variable."""
    return any(variable.same_as(v) for v in undefined_vars(value))


def substituted(value: Any, values: Values, elements: Values | None = None) -> Any:
    """An expression with others in place of its variables, and of loads of some buffers."""
    elements = elements or {}
    loads = (TensorLoad, lambda load: elements.get(load.source, load))
    return structural_map(value, [loads, (tirx.Var, lambda v: values.get(v, v))])
