"""Converters of normalizations, spelled out as exported models do and computed in float32 or more."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import onnx
from tvm import relax
from tvm.relax import op
from tvm.relax.frontend.onnx import onnx_frontend as stock

from kvc_passes.spelled_out import cast, dtype_of

if TYPE_CHECKING:
    from .graph_importer import Importer

_TINY = 1e-12  # the default epsilon of ONNX Runtime's fused norms

Converter = Callable[[Any, Sequence[Any], dict[str, Any]], Any]


def rms_normalized(
    importer: Importer,
    x: relax.Expr,
    weight: relax.Expr,
    epsilon: float,
    axis: int = -1,
    wide: str = "float32",
) -> relax.Expr:
    """x / sqrt(mean(x^2) + epsilon) * weight over the axes from `axis` on, computed as `wide`."""
    return _rms(importer, x, weight, epsilon, axis, wide)[0]


def _rms(
    importer: Importer, x: relax.Expr, weight: relax.Expr, epsilon: float, axis: int, wide: str
) -> tuple[relax.Expr, relax.Expr]:
    """The normalized tensor, and 1 / root mean square."""
    emit = importer.emit
    rank = len(importer.shape(x))
    axes = list(range(axis % rank, rank))
    values = cast(emit, x, wide)
    square = emit(op.mean(emit(op.multiply(values, values)), axis=axes, keepdims=True))
    scale = emit(op.rsqrt(emit(op.add(square, relax.const(epsilon, wide)))))
    result = emit(op.multiply(emit(op.multiply(values, scale)), cast(emit, weight, wide)))
    return cast(emit, result, dtype_of(x)), scale


def _layer(
    importer: Importer,
    x: relax.Expr,
    weight: relax.Expr,
    bias: relax.Expr | None,
    epsilon: float,
    axis: int = -1,
    wide: str = "float32",
) -> list[relax.Expr]:
    """(x - mean) / sqrt(variance + epsilon) * weight + bias, the mean, and 1 / standard deviation."""
    emit = importer.emit
    rank = len(importer.shape(x))
    axes = list(range(axis % rank, rank))
    values = cast(emit, x, wide)
    mean = emit(op.mean(values, axis=axes, keepdims=True))
    centred = emit(op.subtract(values, mean))
    variance = emit(op.mean(emit(op.multiply(centred, centred)), axis=axes, keepdims=True))
    scale = emit(op.rsqrt(emit(op.add(variance, relax.const(epsilon, wide)))))
    result = emit(op.multiply(emit(op.multiply(centred, scale)), cast(emit, weight, wide)))
    if bias is not None:
        result = emit(op.add(result, cast(emit, bias, wide)))
    return [cast(emit, result, dtype_of(x)), mean, scale]


def _stash(attrs: dict[str, Any], x: relax.Expr) -> str:
    """The type of the computation: at least float32."""
    stash = stock.get_type(attrs.get("stash_type", onnx.TensorProto.FLOAT))
    return "float64" if "float64" in (stash, dtype_of(x)) else "float32"


def _rms_normalization(importer: Importer, inputs: Sequence[Any], attrs: dict[str, Any]) -> list[relax.Expr]:
    """RMSNormalization of ai.onnx, SimplifiedLayerNormalization of ONNX Runtime."""
    x, weight = importer.tensor(inputs[0]), importer.tensor(inputs[1])
    epsilon, axis = attrs.get("epsilon", 1e-5), attrs.get("axis", -1)
    return list(_rms(importer, x, weight, epsilon, axis, _stash(attrs, x)))


def _layer_normalization(importer: Importer, inputs: Sequence[Any], attrs: dict[str, Any]) -> Any:
    x, weight, bias = (None if i is None else importer.tensor(i) for i in (inputs[0], inputs[1], inputs[2]))
    axis, epsilon, rank = attrs.get("axis", -1), attrs.get("epsilon", 1e-5), len(importer.shape(x))
    last = axis % rank == rank - 1 and dtype_of(x) == "float32" and bias is not None
    if last and not importer.wants(1) and not importer.wants(2):
        return op.nn.layer_norm(x, weight, bias, axes=[-1], epsilon=epsilon)
    return _layer(importer, x, weight, bias, epsilon, axis, _stash(attrs, x))


def _skip_simplified(importer: Importer, inputs: Sequence[Any], attrs: dict[str, Any]) -> list[Any]:
    total = _sum(importer, (inputs[0], inputs[1], inputs[3]))
    epsilon = attrs.get("epsilon", _TINY)
    result, scale = _rms(importer, total, importer.tensor(inputs[2]), epsilon, -1, _stash(attrs, total))
    if importer.wants(1):
        raise ValueError("its output 1, the mean for training, is used")
    return [result, None, scale, total]


def _skip_layer(importer: Importer, inputs: Sequence[Any], attrs: dict[str, Any]) -> list[Any]:
    total = _sum(importer, (inputs[0], inputs[1], inputs[4]))
    weight, bias = importer.tensor(inputs[2]), inputs[3]
    bias = None if bias is None else importer.tensor(bias)
    wide = _stash(attrs, total)
    result, mean, scale = _layer(importer, total, weight, bias, attrs.get("epsilon", _TINY), -1, wide)
    return [result, mean, scale, total]


def _sum(importer: Importer, inputs: Sequence[Any]) -> relax.Expr:
    first, *others = (importer.tensor(x) for x in inputs if x is not None)
    for other in others:
        first = importer.emit(op.add(first, other))
    return first


CONVERTERS: dict[str, Converter] = {
    "LayerNormalization": _layer_normalization,
    "RMSNormalization": _rms_normalization,
    "SimplifiedLayerNormalization": _rms_normalization,
    "com.microsoft::SimplifiedLayerNormalization": _rms_normalization,
    "com.microsoft::SkipLayerNormalization": _skip_layer,
    "com.microsoft::SkipSimplifiedLayerNormalization": _skip_simplified,
}
