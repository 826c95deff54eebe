"""Converters of element-wise operators for the forms that the stock importer takes wrongly or not at all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from tvm import relax
from tvm.ir import GenericConst
from tvm.relax import op

from kvc_passes.spelled_out import cast, dtype_of

from .integers import Integers

if TYPE_CHECKING:
    from .graph_importer import Importer

Converter = Callable[[Any, Sequence[Any], dict[str, Any]], Any]


def _binary(function: Callable[[Any, Any], relax.Expr]) -> Converter:
    def convert(importer: Importer, inputs: Sequence[Any], attrs: dict[str, Any]) -> relax.Expr:
        return function(importer.tensor(inputs[0]), importer.tensor(inputs[1]))

    return convert


def _not(importer: Importer, inputs: Sequence[Any], attrs: dict[str, Any]) -> relax.Expr:
    return op.logical_not(importer.tensor(inputs[0]))


def _power(importer: Importer, inputs: Sequence[Any], attrs: dict[str, Any]) -> relax.Expr:
    """The result has the base's type; an exponent of another type is cast to it."""
    base, exponent = importer.tensor(inputs[0]), inputs[1]
    dtype = dtype_of(base)
    if not dtype.startswith(("float", "bfloat")):
        raise ValueError(f"it raises {dtype} to a power; only floats are supported")
    if isinstance(exponent, Integers) and exponent.static:  # stays a constant, which SimplifyPowers looks for
        return op.power(base, relax.const(exponent.numpy().astype(dtype), dtype))
    return op.power(base, cast(importer.emit, importer.tensor(exponent), dtype))


def _infinite(importer: Importer, inputs: Sequence[Any], attrs: dict[str, Any]) -> relax.Expr:
    x = importer.tensor(inputs[0])
    limits = (("detect_positive", np.inf), ("detect_negative", -np.inf))
    found = [op.equal(x, relax.const(v, dtype_of(x))) for name, v in limits if attrs.get(name, 1)]
    if not found:
        raise ValueError("it detects neither positive nor negative infinities")
    return found[0] if len(found) == 1 else op.logical_or(*(importer.emit(f) for f in found))


def _remainder(importer: Importer, inputs: Sequence[Any], attrs: dict[str, Any]) -> relax.Expr:
    """Integers: the sign of the divisor, or with fmod that of the dividend. Floats: only with fmod."""
    left, right = importer.tensor(inputs[0]), importer.tensor(inputs[1])
    if attrs.get("fmod", 0):
        return op.mod(left, right)
    if dtype_of(left).startswith(("float", "bfloat")):
        raise ValueError("it is a remainder of floats with the sign of the divisor (fmod=0)")
    return op.floor_mod(left, right)


def _clip(importer: Importer, inputs: Sequence[Any], attrs: dict[str, Any]) -> relax.Expr:
    """Both bounds may be left out; each is a scalar."""
    x = importer.tensor(inputs[0])
    for bound, function in ((inputs[1], op.maximum), (inputs[2], op.minimum)):
        if bound is not None:
            scalar = importer.tensor(bound)
            if importer.shape(scalar):
                scalar = importer.emit(op.reshape(scalar, ()))
            x = importer.emit(function(x, scalar))
    return x


def _one_hot(importer: Importer, inputs: Sequence[Any], attrs: dict[str, Any]) -> relax.Expr:
    """values[1] where an index is that of its place on the new axis, values[0] elsewhere."""
    emit = importer.emit
    indices, depth, values = importer.tensor(inputs[0]), _depth(inputs[1]), importer.tensor(inputs[2])
    rank = len(importer.shape(indices)) + 1
    axis = attrs.get("axis", -1) % rank
    own = cast(emit, indices, "int64")
    count = relax.const(depth, "int64")
    negative = emit(op.less(own, relax.const(0, "int64")))
    own = emit(op.where(negative, emit(op.add(own, count)), own))  # counted from the end
    places = op.reshape(
        emit(op.arange(0, depth, 1, "int64")), [depth if i == axis else 1 for i in range(rank)]
    )
    here = emit(op.equal(emit(op.expand_dims(own, axis)), emit(places)))
    off, on = (emit(op.strided_slice(values, [0], [i], [i + 1], [1], assume_inbound=True)) for i in (0, 1))
    return op.where(here, on, off)


def _depth(value: Any) -> int:
    if isinstance(value, GenericConst):
        return int(value.value.numpy().reshape(-1)[0])
    if not isinstance(value, Integers) or not value.static:
        raise ValueError("its depth depends on the data")
    return int(value.flat()[0])


CONVERTERS: dict[str, Converter] = {
    "And": _binary(op.logical_and),
    "Clip": _clip,
    "IsInf": _infinite,
    "Mod": _remainder,
    "Not": _not,
    "OneHot": _one_hot,
    "Or": _binary(op.logical_or),
    "Pow": _power,
    "Xor": _binary(op.logical_xor),
}
