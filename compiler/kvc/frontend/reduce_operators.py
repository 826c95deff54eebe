"""Converters of reductions whose TVM counterpart differs from ONNX in values at the edge of their type."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from tvm import relax
from tvm.relax import op

from kvc_passes.spelled_out import dtype_of

from .integers import Integers

if TYPE_CHECKING:
    from .graph_importer import Importer


def _extreme(function: Callable[..., relax.Expr], identity: float) -> Callable[..., relax.Expr]:
    """ReduceMax or ReduceMin. TVM starts from a finite number: rows of inf come out finite."""

    def convert(importer: Importer, inputs: Sequence[Any], attrs: dict[str, Any]) -> relax.Expr:
        emit = importer.emit
        x = importer.tensor(inputs[0])
        axes = _axes(inputs[1], attrs)
        if axes == [] and attrs.get("noop_with_empty_axes", 0):
            return x
        keep = bool(attrs.get("keepdims", 1))
        dtype = dtype_of(x)
        if dtype == "bool":
            wide = emit(op.astype(x, "int8"))
            return op.astype(emit(function(wide, axes or None, keep)), "bool")
        result = emit(function(x, axes or None, keep))
        if not dtype.startswith(("float", "bfloat")):
            return result
        limit = relax.const(identity, dtype)
        finite = emit(op.astype(emit(op.not_equal(x, limit)), "int8"))
        return op.where(emit(op.astype(emit(op.max(finite, axes or None, keep)), "bool")), result, limit)

    return convert


def _axes(given: Any, attrs: dict[str, Any]) -> list[int]:
    if given is None:
        return [int(a) for a in attrs.get("axes", ())]
    if not isinstance(given, Integers) or not given.static:
        raise ValueError("its axes depend on the data")
    return [int(a) for a in given.flat()]


CONVERTERS: dict[str, Callable[[Any, Sequence[Any], dict[str, Any]], Any]] = {
    "ReduceMax": _extreme(op.max, -np.inf),
    "ReduceMin": _extreme(op.min, np.inf),
}
