"""Convolutions read out of the blocks of a kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from tvm import tirx
from tvm.ir import Range, TensorLoad
from tvm.sym import Analyzer
from tvm_ffi import structural_walk

from kvc_passes.graph import static

from .window import Convolution, Window, substituted, uses

_FLOAT: Final = "float32"


def read_convolution(params: Sequence[Any], fill: Any, total: Any, result: Any) -> Convolution | None:
    """The convolution that blocks compute; None for another form.

    Args:
        params: of the function, the output last.
        fill: the block that makes what the sum reads, such as with padding; None where that is an input.
        total: the block of the sum.
        result: the block that is computed from it, None where the sum is the output.
    """
    blocks = [block for block in (fill, total, result) if block is not None]
    spatial = [v for v in total.iter_vars if v.iter_type == tirx.IterVar.DataPar]
    terms = [v for v in total.iter_vars if v.iter_type == tirx.IterVar.CommReduce]
    known = all(map(tirx.is_buffer_var, params)) and all(map(_is_static, blocks)) and _known(blocks, params)
    if not (known and _sums(total, spatial, terms) and _follows(total, spatial, result)):
        return None
    factors = _factors(total, spatial)
    if factors is None or not _fills(fill, *factors):
        return None
    moving, fixed = factors
    row, (channel, channels) = _row(moving, fixed, spatial), (None, 1)
    for variable in reversed(spatial[:-1]):
        group = 0 if row is not None and variable.same_as(row) else _group(moving, fixed, variable)
        if group:
            channel, channels = variable, group
            break
    column = spatial[-1]
    others = list(moving.indices)[: -1 if row is None else -2]
    down = Window(1, 1, 0, 1, None) if row is None else _window(moving.indices[-2], row, terms)
    across = _window(moving.indices[-1], column, terms)
    if down is None or across is None or any(uses(index, column.var) for index in moving.indices[:-1]):
        return None
    steps = [w.term for w in (down, across) if w.term is not None]
    if len(set(steps)) < len(steps) or any(uses(index, step) for index in others for step in steps):
        return None
    return Convolution(
        list(params), fill, total, result, moving, fixed, channel, row, column, channels, down, across
    )


def _is_static(block: Any) -> bool:
    return isinstance(block.body, tirx.BufferStore) and all(
        static(v.dom.extent) is not None and static(v.dom.min) == 0 and str(v.var.ty.dtype) == "int64"
        for v in block.iter_vars
    )


def _known(blocks: list[Any], params: Sequence[Any]) -> bool:
    """Whether each block reads parameters, the one before it and its own sum; the last writes the output."""
    if not blocks[-1].body.buffer.same_as(params[-1]):
        return False
    for number, block in enumerate(blocks):
        allowed = [*params[:-1], *(before.body.buffer for before in blocks[max(0, number - 1) : number])]
        allowed += [block.body.buffer] if block.init is not None else []
        if not all(any(load.source.same_as(b) for b in allowed) for load in _loads(block.body.value)):
            return False
    return True


def _sums(total: Any, spatial: list[Any], terms: list[Any]) -> bool:
    """Whether a block adds up float32 numbers, where its variables are, from a constant on."""
    init = total.init
    return (
        bool(spatial and terms)
        and len(spatial) + len(terms) == len(total.iter_vars)
        and str(total.body.buffer.dtype) == _FLOAT
        and isinstance(init, tirx.BufferStore)
        and isinstance(init.value, tirx.FloatImm)
        and _offsets(total.body.indices, spatial) is not None
        and isinstance(total.body.value, tirx.Add)
    )


def _factors(total: Any, spatial: list[Any]) -> tuple[Any, Any] | None:
    """The factors of a term: what moves with the columns, and what does not."""
    own, parts, column = total.body.buffer, [total.body.value.a, total.body.value.b], spatial[-1].var
    sums = [p for p in parts if isinstance(p, TensorLoad) and p.source.same_as(own)]
    products = [p for p in parts if isinstance(p, tirx.Mul) and not _reads(p, own)]
    if len(sums) != 1 or len(products) != 1:
        return None
    pair = [products[0].a, products[0].b]
    moving = [f for f in pair if isinstance(f, TensorLoad) and uses(f, column)]
    fixed = [f for f in pair if not uses(f, column)]
    one_each = len(moving) == len(fixed) == 1 and str(moving[0].source.dtype) == _FLOAT
    return (moving[0], fixed[0]) if one_each else None


def _fills(fill: Any, moving: Any, fixed: Any) -> bool:
    """Whether a block makes what moves, each element where its variables are, and nothing else."""
    if fill is None:
        return True
    made, variables = fill.body.buffer, list(fill.iter_vars)
    offsets = _offsets(fill.body.indices, variables)
    parallel = all(v.iter_type == tirx.IterVar.DataPar for v in variables)
    return moving.source.same_as(made) and not _reads(fixed, made) and parallel and not any(offsets or [1])


def _row(moving: Any, fixed: Any, spatial: list[Any]) -> Any:
    """The axis of rows of pixels; None where there is none."""
    if len(spatial) < 2 or uses(fixed, spatial[-2].var):
        return None
    places = [i for i, index in enumerate(moving.indices) if uses(index, spatial[-2].var)]
    return spatial[-2] if places and places == [len(moving.indices) - 2] else None


def _group(moving: Any, fixed: Any, channel: Any) -> int:
    """How many neighbours along an axis of the weight read the same pixels; 0 for another axis."""
    size = int(channel.dom.extent)
    if not uses(fixed, channel.var):
        return 0
    if not uses(moving, channel.var):
        return size
    divisors: list[int] = []

    def look(quotient: Any) -> None:
        if quotient.a.same_as(channel.var) and static(quotient.b):
            divisors.append(int(quotient.b))

    for index in moving.indices:
        structural_walk(index, (tirx.FloorDiv, look))
    if not divisors or size % divisors[0]:
        return 0
    group, within = tirx.Var("group", "int64"), tirx.Var("within", "int64")
    analyzer = Analyzer()
    for variable, extent in ((within, divisors[0]), (group, size // divisors[0])):
        analyzer.bind(variable, Range.from_min_extent(tirx.const(0, "int64"), tirx.const(extent, "int64")))
    moved = {channel.var: group * divisors[0] + within}
    indices = [analyzer.simplify(substituted(index, moved)) for index in moving.indices]
    return 0 if any(uses(index, within) for index in indices) else divisors[0]


def _window(index: Any, pixel: Any, terms: list[Any]) -> Window | None:
    """How an index moves; None where that is no window, or one with steps and strides both."""
    used = [v for v in terms if uses(index, v.var)]
    zero = {v.var: tirx.const(0, "int64") for v in (pixel, *used)}
    analyzer = Analyzer()
    offset = static(analyzer.simplify(substituted(index, zero)))
    if len(used) > 1 or offset is None:
        return None
    factors, rest = [], index - offset
    for v in (pixel, *used):
        one = {**zero, v.var: tirx.const(1, "int64")}
        factors.append(static(analyzer.simplify(substituted(index, one) - offset)) or 0)
        rest = rest - v.var * factors[-1]
    if min(factors) < 1 or static(analyzer.simplify(rest)) != 0:
        return None
    stride, dilation = factors[0], factors[1] if used else 1
    size, term = (int(used[0].dom.extent), used[0].var) if used else (1, None)
    return None if stride > 1 and dilation > 1 else Window(stride, dilation, offset, size, term)


def _follows(total: Any, spatial: list[Any], result: Any) -> bool:
    """Whether a block computes each element from the sum of the same one."""
    if result is None:
        return True
    variables = list(result.iter_vars)
    alike = len(variables) == len(spatial) and all(
        v.iter_type == tirx.IterVar.DataPar and static(v.dom.extent) == static(old.dom.extent)
        for v, old in zip(variables, spatial)
    )
    if not alike or _offsets(result.body.indices, variables) is None:
        return False
    stored = _offsets(total.body.indices, spatial)
    own = [load for load in _loads(result.body.value) if load.source.same_as(total.body.buffer)]
    return bool(own) and all(_offsets(load.indices, variables) == stored for load in own)


def _offsets(indices: Any, variables: list[Any]) -> list[int] | None:
    """How far each index is from its variable; None where that is not constant."""
    if len(indices) != len(variables):
        return None
    analyzer = Analyzer()
    for v in variables:
        analyzer.bind(v.var, v.dom)
    found = [static(analyzer.simplify(index - v.var)) for index, v in zip(indices, variables)]
    return None if None in found else [n or 0 for n in found]


def _loads(value: Any) -> list[Any]:
    found: list[Any] = []
    structural_walk(value, (TensorLoad, found.append))
    return found


def _reads(value: Any, buffer: Any) -> bool:
    return any(load.source.same_as(buffer) for load in _loads(value))
