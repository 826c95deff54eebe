"""What a box of a kernel's output is computed from: boxes of its inputs, by intervals of indices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.ir import TensorLoad
from tvm_ffi import structural_walk

from .graph import same_shape, static
from .index_ranges import Bound, Range, bound
from .loop_nests import Kernel, Nest

Box = tuple[Range, ...]
"""A part of a buffer: of every dimension a range."""


@dataclass(frozen=True, eq=False)
class Read:
    """A buffer that is read, and the bounds of every index."""

    buffer: Any
    bounds: tuple[Bound, ...]
    shape: tuple[int, ...]

    def box(self, domain: Sequence[Range]) -> Box:
        """What is read inside the buffer: a kernel that asks beyond it does so behind a condition."""
        found = []
        for index, size in zip(self.bounds, self.shape, strict=True):
            low, high = index(domain)
            low = min(max(low, 0), size - 1)
            found.append((low, max(min(high, size), low + 1)))
        return tuple(found)


@dataclass(frozen=True, eq=False)
class Step:
    """A nest: what each index of what it stores is, a variable or None for a constant, and what it reads."""

    nest: Nest
    places: tuple[int | None, ...]
    sizes: tuple[int, ...]
    reads: tuple[Read, ...]

    def domain(self, box: Box) -> Box:
        """The ranges of the variables that store the elements of a box."""
        ranges: list[Range] = [(0, size) for size in self.sizes]
        for place, part in zip(self.places, box, strict=True):
            if place is not None:
                ranges[place] = part
        return tuple(ranges)


@dataclass(frozen=True, eq=False)
class Needed:
    """What a box of the output takes.

    Attributes:
        buffers: of every buffer that is read or written the box; those that are not needed are not there.
        domains: of every nest the ranges of its variables, None where it is not needed.
    """

    buffers: dict[Any, Box]
    domains: tuple[Box | None, ...]


@dataclass(frozen=True, eq=False)
class Access:
    """A kernel of static shapes, ready to be asked for boxes."""

    kernel: Kernel
    steps: tuple[Step, ...]

    @classmethod
    def of(cls, kernel: Kernel | None) -> Access | None:
        """None for a kernel whose elements are not each stored once, at a place that its variables are.

        Indices may be anything: what no interval is known for, such as an index that is read from a table,
        counts as all of its dimension.
        """
        if kernel is None:
            return None
        buffers = (*kernel.inputs, *kernel.locals, kernel.output)
        if any(static(dim) is None for buffer in buffers for dim in buffer.shape):
            return None
        stored = [nest.store.buffer for nest in kernel.nests]
        made = [*kernel.locals, kernel.output]
        if len(stored) != len(set(stored)) or not set(stored) <= set(made) or kernel.output not in stored:
            return None
        if any(load.source.same_as(kernel.output) for nest in kernel.nests for load in nest.loads):
            return None
        steps = [_step(nest) for nest in kernel.nests]
        return cls(kernel, tuple(s for s in steps if s)) if all(steps) else None

    def needed(self, box: Box) -> Needed:
        """What the elements of a box of the output take."""
        buffers: dict[Any, Box] = {self.kernel.output: box}
        domains: list[Box | None] = []
        for step in reversed(self.steps):
            wanted = buffers.get(step.nest.store.buffer)
            domain = None if wanted is None else step.domain(wanted)
            domains.insert(0, domain)
            for read in step.reads if domain else ():
                found = read.box(domain or ())
                buffers[read.buffer] = hull(buffers.get(read.buffer, found), found)
        return Needed(buffers, tuple(domains))


def hull(a: Box, b: Box) -> Box:
    """The smallest box around two."""
    return tuple((min(x[0], y[0]), max(x[1], y[1])) for x, y in zip(a, b, strict=True))


def whole(shape: Sequence[int]) -> Box:
    return tuple((0, size) for size in shape)


def extents(box: Box) -> tuple[int, ...]:
    return tuple(high - low for low, high in box)


def reshaped(box: Box, shape: Sequence[int], source: Sequence[int]) -> Box | None:
    """The box of a tensor of shape `source` whose elements, in order, are those of a box of its reshape.

    None where they are no box, or one whose own reshape is another.
    """
    found: list[Range] = []
    at = 0
    for wide, deep in _groups(shape, source):
        ranges, at = list(box[at : at + len(wide)]), at + len(wide)
        flat = _flat(ranges, wide)
        part = None if flat is None else _unflat(flat, deep)
        if part is None:
            return None
        found += part
    return tuple(found)


def _groups(a: Sequence[int], b: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Dimensions of two shapes, together as long as their products differ."""
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(a) or j < len(b):
        wide, deep = list(a[i : i + 1]), list(b[j : j + 1])
        i, j = i + 1, j + 1
        while _product(wide) != _product(deep) or (not wide or not deep):
            if i < len(a) and (_product(wide) < _product(deep) or not wide or j >= len(b)):
                wide.append(a[i])
                i += 1
            elif j < len(b):
                deep.append(b[j])
                j += 1
            else:
                break
        groups.append((wide, deep))
    return groups


def _product(sizes: Sequence[int]) -> int:
    result = 1
    for size in sizes:
        result *= size
    return result


def _flat(ranges: Sequence[Range], shape: Sequence[int]) -> tuple[int, int, int] | None:
    """A box of some dimensions as a range of their elements in order, and the number of all."""
    start, count, free = 0, 1, True
    for (low, high), size in zip(ranges, shape, strict=True):
        if not free and (low, high) != (0, size):
            return None  # rows of a part, with gaps between them
        start = start * size + low
        count *= high - low
        free = free and high - low == 1
    return start, start + count, _product(shape)


def _unflat(flat: tuple[int, int, int], shape: Sequence[int]) -> list[Range] | None:
    """A range of elements in order as a box."""
    low, high, count = flat
    found: list[Range] = []
    for size in shape:
        count //= size
        first, last = low // count, (high - 1) // count
        found.append((first, last + 1))
        if first != last:
            if low % count or high % count:
                return None
            low, high = 0, count  # all of what is left
        else:
            low, high = low - first * count, high - first * count
    return found


def _step(nest: Nest) -> Step | None:
    variables = [v.var for v in nest.block.iter_vars]
    sizes = [static(v.dom.extent) for v in nest.block.iter_vars]
    if None in sizes or any(static(v.dom.min) != 0 for v in nest.block.iter_vars):
        return None
    number = {variable: i for i, variable in enumerate(variables)}
    places: list[int | None] = []
    for index in nest.store.indices:
        place = number.get(index) if isinstance(index, tirx.Var) else None
        if place is None and static(index) is None:
            return None
        if place is not None and nest.block.iter_vars[place].iter_type != tirx.IterVar.DataPar:
            return None
        places.append(place)
    used = [place for place in places if place is not None]
    if len(used) != len(set(used)) or not _sums_in_place(nest):
        return None
    reads = [
        Read(
            load.source,
            tuple(bound(index, number) for index in load.indices),
            tuple(static(dim) or 0 for dim in load.source.shape),
        )
        for load in nest.loads
    ]
    return Step(nest, tuple(places), tuple(size or 0 for size in sizes), tuple(reads))


def _sums_in_place(nest: Nest) -> bool:
    """Whether a nest reads of what it stores only the element that it stores: no scan."""
    own: list[Any] = []
    structural_walk(nest.store.value, (TensorLoad, own.append))
    stored = list(nest.store.indices)
    return all(
        same_shape(list(load.indices), stored) for load in own if load.source.same_as(nest.store.buffer)
    )
