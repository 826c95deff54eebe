"""For every operation that masks, positions and layouts use: an element of its output from its inputs'."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from tvm import relax, tirx

from .affine import Affine
from .arithmetic_rules import ARITHMETIC
from .conditions import Unprovable, as_condition, both, choose, either, is_condition, lift, negate
from .graph import aligned, dims, op_name, operands, static
from .indices import bind_index, divided, int64
from .regroup import regroup

if TYPE_CHECKING:
    from .element import Elements

Index = Sequence[Any]


def _elementwise(function: Callable[..., Any]) -> Callable[[Elements, relax.Call, Index], Any]:
    def rule(elements: Elements, call: relax.Call, index: Index) -> Any:
        values = [elements.at(operand, aligned(operand, index)) for operand in operands(call)]
        return lift(lambda *v: elements.simplify(function(*v)), *values)

    return rule


def _divide(elements: Elements, call: relax.Call, index: Index) -> Any:
    """Floats divide; integers drop the remainder, which is the floor where nothing is negative."""
    if "int" not in str(call.ty.dtype.dtype):
        return _elementwise(ARITHMETIC["divide"])(elements, call, index)

    def rule(x: Any, y: Any) -> Any:
        if not isinstance(x, (int, float)) and not elements.prove(x >= 0):
            raise Unprovable("divides an integer that may be negative")
        return ARITHMETIC["divide" if isinstance(x, int) else "floor_divide"](x, y)

    return _elementwise(rule)(elements, call, index)


def _where(elements: Elements, call: relax.Call, index: Index) -> Any:
    condition, then, other = (elements.at(o, aligned(o, index)) for o in operands(call))
    return choose(condition, then, other)


def _compare(function: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    return _elementwise(
        lambda x, y: (
            function(x, y)
            if isinstance(x, (int, float)) and isinstance(y, (int, float))
            else function(int64(x), int64(y))
        )
    )


def _equal(x: Any, y: Any) -> Any:
    if isinstance(x, (int, float)) and isinstance(y, (int, float)):
        return x == y
    for value, constant in ((x, y), (y, x)):
        if isinstance(constant, bool):
            return value if constant else negate(value)
    return tirx.EQ(int64(x), int64(y))


def _cast(elements: Elements, call: relax.Call, index: Index) -> Any:
    target = str(call.attrs.dtype)
    value = elements.at(call.args[0], index)
    if target == "bool":
        return lift(
            lambda v: (
                bool(v) if isinstance(v, (int, float)) else v if is_condition(v) else tirx.NE(v, int64(0))
            ),
            value,
        )
    one: Any = 1.0 if target.startswith(("float", "bfloat")) else 1

    def convert(v: Any) -> Any:
        if isinstance(v, (bool, int, float)):
            return type(one)(v)
        if isinstance(v, Affine):
            if one == 1 and isinstance(one, int):
                raise Unprovable("rounds a value that depends on the position")
            return v
        if is_condition(v):
            return choose(v, one, type(one)(0))
        # Positions fit int32.
        if "int" in target and target not in ("int32", "int64") and not _fits(elements, v, target):
            raise Unprovable(f"makes a number {target} that may not fit")
        return v

    return lift(convert, value)


def _fits(elements: Elements, value: Any, dtype: str) -> bool:
    info = np.iinfo(dtype)
    return elements.prove(tirx.And(value >= int64(int(info.min)), value <= int64(int(info.max))))


def _arange(elements: Elements, call: relax.Call, index: Index) -> Any:
    start, _, step = call.args[:3]
    return elements.simplify(start + int64(index[0]) * step)


def _full(elements: Elements, call: relax.Call, index: Index) -> Any:
    return elements.at(call.args[1], [])


def _fill(value: int) -> Callable[..., Any]:
    def rule(elements: Elements, call: relax.Call, index: Index) -> Any:
        dtype = str(call.attrs.dtype)
        return float(value) if "float" in dtype else bool(value) if dtype == "bool" else value

    return rule


def _expand_dims(elements: Elements, call: relax.Call, index: Index) -> Any:
    added = {int(a) % len(index) for a in call.attrs.axis}
    return elements.at(call.args[0], [i for axis, i in enumerate(index) if axis not in added])


def _squeeze(elements: Elements, call: relax.Call, index: Index) -> Any:
    shape = dims(call.args[0])
    gone = (
        {int(a) % len(shape) for a in call.attrs.axis}
        if call.attrs.axis is not None
        else {a for a, d in enumerate(shape) if static(d) == 1}
    )
    rest = iter(index)
    return elements.at(call.args[0], [0 if axis in gone else next(rest) for axis in range(len(shape))])


def _broadcast_to(elements: Elements, call: relax.Call, index: Index) -> Any:
    return elements.at(call.args[0], aligned(call.args[0], index))


def _reshape(elements: Elements, call: relax.Call, index: Index) -> Any:
    """The same position in row-major order, computed within the smallest groups of equal product."""
    source, target = dims(call.args[0]), dims(call)
    parts: list[Any] = []
    for low, high, first, last in regroup(elements.analyzer, source, target):
        position: Any = tirx.IntImm("int64", 0)
        for dim, i in zip(target[first:last], index[first:last]):
            position = elements.simplify(position * dim + int64(i))
        group: list[Any] = []
        for axis in reversed(range(low, high)):
            if axis == low:
                group.append(position)
                continue
            position, inner = divided(position, source[axis], elements.prove)
            group.append(elements.simplify(inner))
            position = elements.simplify(position)
        parts += [0 if static(d) == 1 else i for d, i in zip(source[low:high], group[::-1])]
    return elements.at(call.args[0], parts)


def _permute(elements: Elements, call: relax.Call, index: Index) -> Any:
    axes = [int(a) for a in call.attrs.axes] if call.attrs.axes is not None else list(range(len(index)))[::-1]
    source: list[Any] = [0] * len(index)
    for position, axis in enumerate(axes):
        source[axis] = index[position]
    return elements.at(call.args[0], source)


def _strided_slice(elements: Elements, call: relax.Call, index: Index) -> Any:
    result = list(index)
    axes, begins, _, *strides = (
        list(a.fields) if isinstance(a, relax.Tuple) else list(a.values) for a in call.args[1:5]
    )
    for position, axis in enumerate(axes):
        stride = strides[0][position] if strides else 1
        at = int(static(axis) or 0)
        result[at] = elements.simplify(int64(index[at]) * stride + begins[position])
    return elements.at(call.args[0], result)


def _concat(elements: Elements, call: relax.Call, index: Index) -> Any:
    parts = operands(call)
    axis = int(call.attrs.axis) % len(index)
    offset: Any = tirx.IntImm("int64", 0)
    cases = []
    for part in parts:
        end = elements.simplify(offset + dims(part)[axis])
        here = [elements.simplify(int64(i) - offset) if a == axis else i for a, i in enumerate(index)]
        cases.append((int64(index[axis]) < end, part, here))
        offset = end
    result = elements.at(cases[-1][1], cases[-1][2])
    for condition, part, here in reversed(cases[:-1]):
        decided = elements.simplify(condition)
        result = choose(decided, elements.at(part, here), result)
    return result


def _item(elements: Elements, item: relax.TupleGetItem, index: Index) -> Any:
    """An element of one part of a split."""
    call = elements.graph.resolve(item.tuple_value)
    if op_name(call) != "split":
        raise Unprovable("takes a part of something that is no split")
    axis, sizes = int(call.attrs.axis) % len(index), call.attrs.indices_or_sections
    begin: Any
    if isinstance(sizes, (int, tirx.IntImm)):
        begin = dims(item)[axis] * int(item.index)
    else:
        begin = [0, *sizes][int(item.index)]
    moved = elements.simplify(int64(index[axis]) + begin)
    return elements.at(call.args[0], [moved if a == axis else i for a, i in enumerate(index)])


def _take(elements: Elements, call: relax.Call, index: Index) -> Any:
    data, indices = call.args[:2]
    axis = int(call.attrs.axis) if call.attrs.axis is not None else 0
    rank = len(dims(indices))
    at = elements.at(indices, list(index)[axis : axis + rank])
    return lift(lambda i: elements.at(data, [*index[:axis], i, *index[axis + rank :]]), at)


def _gather_nd(elements: Elements, call: relax.Call, index: Index) -> Any:
    data, indices = call.args[:2]
    batch = int(call.attrs.batch_dims)
    rank = len(dims(indices)) - 1
    width = static(dims(indices)[-1])
    if width is None:
        raise Unprovable("gathers with an index of unknown width")
    at = [elements.at(indices, [*index[:rank], column]) for column in range(width)]
    return lift(lambda *i: elements.at(data, [*index[:batch], *i, *index[rank:]]), *at)


def _cumsum(elements: Elements, call: relax.Call, index: Index) -> Any:
    if bool(call.attrs.exclusive):
        raise Unprovable("takes an exclusive cumulative sum")
    axis = int(call.attrs.axis)
    any_index = bind_index(elements.analyzer, "summand", dims(call.args[0])[axis])
    summand = elements.simplify(
        elements.at(call.args[0], [any_index if a == axis else i for a, i in enumerate(index)])
    )
    if isinstance(summand, (int, float)) and float(summand).is_integer():  # a bool counts as 0 or 1
        return elements.simplify(int(summand) * (int64(index[axis]) + 1))
    zero = as_condition(lift(_is_zero, summand))
    if not elements.prove(zero):
        raise Unprovable("takes a cumulative sum of values that are not all equal")
    return 0


def _sum(elements: Elements, call: relax.Call, index: Index) -> Any:
    """A sum of values that are all the same number."""
    shape = dims(call.args[0])
    axes = range(len(shape)) if call.attrs.axis is None else [int(a) % len(shape) for a in call.attrs.axis]
    rest = iter([i for a, i in enumerate(index) if a not in axes] if call.attrs.keepdims else index)
    inside = [
        bind_index(elements.analyzer, "summand", d) if a in axes else next(rest) for a, d in enumerate(shape)
    ]
    summand = elements.simplify(elements.at(call.args[0], inside))
    if not isinstance(summand, (int, float)) or not float(summand).is_integer():
        raise Unprovable("sums values that are not all the same number")
    count: Any = int(summand)
    for axis in axes:
        count = elements.simplify(int64(count) * int64(shape[axis]))
    return count


def _is_zero(value: Any) -> Any:
    if isinstance(value, (int, float)):
        return value == 0
    return negate(value) if is_condition(value) else tirx.EQ(value, int64(0))


def _triangle(lower: bool) -> Callable[..., Any]:
    def rule(elements: Elements, call: relax.Call, index: Index) -> Any:
        k = call.args[1]
        row, column = int64(index[-2]), int64(index[-1])
        condition = column <= row + k if lower else column >= row + k
        zero: Any = (
            False if str(call.ty.dtype.dtype) == "bool" else 0.0 if "float" in str(call.ty.dtype.dtype) else 0
        )
        return choose(condition, elements.at(call.args[0], index), zero)

    return rule


def _shape_to_tensor(elements: Elements, call: relax.Call, index: Index) -> Any:
    at = index[0] if isinstance(index[0], int) else static(index[0])
    if at is None:
        raise Unprovable("reads a shape at an unknown axis")
    shape = elements.graph.resolve(call.args[0])
    return elements.simplify(shape.values[at] if isinstance(shape, relax.ShapeExpr) else shape.ty.values[at])


RULES: dict[str, Callable[[Elements, Any, Index], Any]] = {
    **{name: _elementwise(rule) for name, rule in ARITHMETIC.items()},
    "divide": _divide,
    "less": _compare(lambda x, y: x < y),
    "less_equal": _compare(lambda x, y: x <= y),
    "greater": _compare(lambda x, y: x > y),
    "greater_equal": _compare(lambda x, y: x >= y),
    "equal": _elementwise(_equal),
    "not_equal": _elementwise(lambda x, y: negate(_equal(x, y))),
    "logical_and": _elementwise(both),
    "logical_or": _elementwise(either),
    "bitwise_and": _elementwise(both),
    "bitwise_or": _elementwise(either),
    "logical_not": _elementwise(negate),
    "bitwise_not": _elementwise(negate),
    "where": _where,
    "astype": _cast,
    "arange": _arange,
    "full": _full,
    "zeros": _fill(0),
    "ones": _fill(1),
    "expand_dims": _expand_dims,
    "squeeze": _squeeze,
    "broadcast_to": _broadcast_to,
    "reshape": _reshape,
    "permute_dims": _permute,
    "strided_slice": _strided_slice,
    "concat": _concat,
    "TupleGetItem": _item,
    "take": _take,
    "gather_nd": _gather_nd,
    "cumsum": _cumsum,
    "sum": _sum,
    "tril": _triangle(True),
    "triu": _triangle(False),
    "shape_to_tensor": _shape_to_tensor,
}
