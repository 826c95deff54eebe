"""Converters of operators that pick, repeat and place elements, in forms that keep tokens apart.

What a decoder does with them is regular: the largest few of a row, rows of a table, a part of an axis. Those
become gathers, concatenations and choices; anything else is left to the stock converters or refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from tvm import relax
from tvm.ir import GenericConst
from tvm.relax import op

from .integers import Integers, expr

if TYPE_CHECKING:
    from .graph_importer import Importer

_MOST = 32
"""Elements of a row that are picked one after the other."""


def _static(value: Any) -> np.ndarray | None:
    """A constant tensor, None for one that is computed."""
    if isinstance(value, Integers):
        return value.numpy() if value.static else None
    return value.value.numpy() if isinstance(value, GenericConst) else None


def _top_k(importer: Importer, inputs: Sequence[Any], attrs: dict[str, Any]) -> Any:
    """The k largest elements of each row, one by one; of equal ones the first, as ONNX wants."""
    x, emit = importer.tensor(inputs[0]), importer.emit
    shape, count = importer.shape(x), _static(inputs[1])
    axis, dtype = attrs.get("axis", -1) % len(shape), str(x.ty.dtype.dtype)
    if dtype.startswith("uint"):
        raise ValueError(f"it sorts {dtype}; only signed integers and floats are supported")
    if not importer.decoder:
        return importer.stock("TopK", inputs, attrs)
    if count is None or int(count.reshape(-1)[0]) > _MOST or not isinstance(shape[axis], int):
        raise ValueError(f"it picks a number of elements that is not known, or more than {_MOST}")
    if axis != len(shape) - 1:
        raise ValueError("it picks along another axis than the last")
    if not dtype.startswith(("float", "bfloat")):
        raise ValueError(f"it picks elements of type {dtype}; floats are supported")
    if not attrs.get("largest", 1):
        x = emit(op.negative(x))
    numbers = relax.const(np.arange(shape[axis]), "int64")
    lowest = relax.const(-np.inf, dtype)
    values, indices, rest = [], [], x
    for _ in range(int(count.reshape(-1)[0])):
        index = emit(op.argmax(rest, axis=-1, keepdims=True))
        here = emit(op.equal(numbers, index))
        # A sum with one element that is not zero is that element.
        picked = emit(op.where(here, x, relax.const(0, dtype)))
        values.append(emit(op.sum(picked, axis=-1, keepdims=True)))
        indices.append(index)
        rest = emit(op.where(here, lowest, rest))
    result = emit(op.concat(values, axis=-1))
    if not attrs.get("largest", 1):
        result = emit(op.negative(result))
    return [result, op.concat(indices, axis=-1)]


def _scatter_elements(importer: Importer, inputs: Sequence[Any], attrs: dict[str, Any]) -> relax.Expr:
    """data with updates[.., i] in column indices[.., i], for a known number of columns i."""
    data, indices, updates = (importer.tensor(v) for v in inputs[:3])
    shape, given = importer.shape(data), importer.shape(indices)
    axis = attrs.get("axis", 0) % len(shape)
    if attrs.get("reduction", b"none") not in (b"none", "none"):
        raise ValueError(f"it combines elements with {attrs['reduction']}")
    same = all(importer.folder.equal(a, b) for a, b in zip(shape[:-1], given[:-1]))
    if axis != len(shape) - 1 or not same or not isinstance(given[-1], int) or given[-1] > _MOST:
        raise ValueError("it places elements along another axis than the last, or too many of them")
    if not isinstance(shape[-1], int):
        raise ValueError("it places elements in rows of unknown length")
    emit, last = importer.emit, len(shape) - 1
    numbers = relax.const(np.arange(shape[-1]), "int64")
    indices = emit(op.astype(indices, "int64"))
    from_end = emit(op.add(indices, relax.const(shape[-1], "int64")))
    indices = emit(op.where(emit(op.less(indices, relax.const(0, "int64"))), from_end, indices))

    def column(value: relax.Expr, i: int) -> relax.Expr:
        return emit(op.strided_slice(value, [last], [i], [i + 1], [1], assume_inbound=True))

    for i in range(given[-1]):
        data = emit(op.where(emit(op.equal(numbers, column(indices, i))), column(updates, i), data))
    return data


def _gather_nd(importer: Importer, inputs: Sequence[Any], attrs: dict[str, Any]) -> relax.Expr:
    """Rows of a table where the index has one component; else TVM's gather_nd."""
    data, indices = (importer.tensor(v) for v in inputs[:2])
    batch = attrs.get("batch_dims", 0)
    if batch == 0 and importer.shape(indices)[-1:] == [1]:
        rows = importer.emit(op.squeeze(indices, [-1]))
        return op.take(data, rows, axis=0, mode="wrap")
    return op.gather_nd(data, indices, batch)


def _scatter_nd(importer: Importer, inputs: Sequence[Any], attrs: dict[str, Any]) -> relax.Expr:
    """data with consecutive rows replaced: a concatenation."""
    data, updates, rows = importer.tensor(inputs[0]), importer.tensor(inputs[2]), _static(inputs[1])
    shape = importer.shape(data)
    if rows is None or rows.ndim != 2 or rows.shape[1] != 1 or attrs.get("reduction", b"none") != b"none":
        raise ValueError(
            "it places elements at computed indices; only whole rows at known ones are supported"
        )
    first, count = int(rows[0, 0]), len(rows)
    if first < 0 and isinstance(shape[0], int):
        first, rows = first + shape[0], rows + shape[0]
    if not isinstance(shape[0], int) or not np.array_equal(rows[:, 0], np.arange(first, first + count)):
        raise ValueError("it places rows that are not consecutive")

    def part(begin: int, end: int) -> list[relax.Expr]:
        if begin == end:
            return []
        return [importer.emit(op.strided_slice(data, [0], [begin], [end], [1], assume_inbound=True))]

    pieces = [*part(0, first), updates, *part(first + count, shape[0])]
    return pieces[0] if len(pieces) == 1 else op.concat(pieces, axis=0)


def _tile(importer: Importer, inputs: Sequence[Any], attrs: dict[str, Any]) -> relax.Expr:
    """Repetition, also a symbolic number of times: as a broadcast along new axes."""
    data, repeats = importer.tensor(inputs[0]), inputs[1]
    if not isinstance(repeats, Integers):
        raise ValueError("its repeats depend on the data, not only on shapes")
    shape, times = importer.shape(data), repeats.flat()
    if all(isinstance(t, int) and t == 1 for t in times):
        return data
    split: list[Any] = []
    wide: list[Any] = []
    final: list[Any] = []
    for extent, time in zip(shape, times):
        one = isinstance(time, int) and time == 1
        split += [extent] if one else [1, extent]
        wide += [extent] if one else [time, extent]
        final.append(extent if one else importer.folder.simplify(expr(extent) * time))
    spread = importer.emit(op.reshape(data, [expr(d) for d in split]))
    spread = importer.emit(op.broadcast_to(spread, relax.ShapeExpr([expr(d) for d in wide])))
    return op.reshape(spread, [expr(d) for d in final])


CONVERTERS: dict[str, Callable[[Any, Sequence[Any], dict[str, Any]], Any]] = {
    "GatherND": _gather_nd,
    "ScatterElements": _scatter_elements,
    "ScatterND": _scatter_nd,
    "Tile": _tile,
    "TopK": _top_k,
}
