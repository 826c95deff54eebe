"""Converters of QuantizeLinear and DequantizeLinear of activations, as plain operations.

Weights are not decoded here: `dequantized` serves what computes its codes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from tvm import relax
from tvm.relax import op
from tvm.relax.frontend.onnx import onnx_frontend as stock

from kvc_passes.spelled_out import cast, dtype_of

from .integers import expr

if TYPE_CHECKING:
    from .graph_importer import Importer

CODES = ("int8", "uint8", "int16", "uint16", "int32")
"""Types of codes that are supported in activations: no 4-bit codes and no float8."""


def aligned(importer: Importer, table: relax.Expr, shape: Sequence[Any], axis: int, block: int) -> relax.Expr:
    """Scales or zero points so that they broadcast to a tensor of `shape`.

    Args:
        table: a scalar or one element, [shape[axis]] for one value a slice, or blocked: like `shape`, with
            ceil(shape[axis] / block) along `axis`.
        block: elements of a block, 0 without blocks.
    """
    sizes = importer.shape(table)
    if not block:
        if not sizes:
            return table
        if len(sizes) > 1:
            raise ValueError(f"its scales {sizes} have {len(sizes)} axes and there is no block_size")
        extent = [1] * max(len(shape), 1)
        if sizes[0] != 1 or len(shape) == 1:
            extent[axis] = sizes[0]
        return importer.emit(op.reshape(table, [expr(d) for d in extent]))
    if len(sizes) != len(shape) or not isinstance(shape[axis], int):
        raise ValueError(f"its blocked scales {sizes} do not fit a tensor {list(shape)}")
    spread = importer.emit(op.repeat(table, block, axis))
    if importer.shape(spread)[axis] == shape[axis]:
        return spread
    return importer.emit(op.strided_slice(spread, [axis], [0], [shape[axis]], [1], assume_inbound=True))


def dequantized(
    importer: Importer,
    codes: relax.Expr,
    scales: relax.Expr,
    zeros: relax.Expr | None,
    *,
    axis: int = 1,
    block: int = 0,
    dtype: str | None = None,
) -> relax.Expr:
    """(codes - zeros) * scales as `dtype`, by default the type of the scales; computed in float32 or more.

    Raises:
        ValueError: codes of a type that is not supported, or shapes that do not fit.
    """
    emit = importer.emit
    kind, shape = dtype_of(codes), importer.shape(codes)
    if kind not in CODES:
        raise ValueError(f"it dequantizes {kind}; supported are {', '.join(CODES)}")
    axis = axis % len(shape) if len(shape) > 1 else 0
    wide = "float64" if dtype_of(scales) == "float64" else "float32"
    scales = cast(emit, aligned(importer, scales, shape, axis, block), wide)
    if zeros is not None:
        zeros = cast(emit, aligned(importer, zeros, shape, axis, block), "int32")
        codes = emit(op.subtract(cast(emit, codes, "int32"), zeros))
    result = emit(op.multiply(cast(emit, codes, wide), scales))
    return cast(emit, result, dtype or dtype_of(scales))


def quantized(
    importer: Importer,
    x: relax.Expr,
    scales: relax.Expr,
    zeros: relax.Expr | None,
    kind: str,
    *,
    axis: int = 1,
    block: int = 0,
    precision: str = "float32",
) -> relax.Expr:
    """x / scales, rounded to even, plus zeros, within the range of `kind`.

    Raises:
        ValueError: a type that is not supported, or shapes that do not fit.
    """
    emit, shape = importer.emit, importer.shape(x)
    if kind not in CODES[:-1]:
        raise ValueError(f"it quantizes to {kind}; supported are {', '.join(CODES[:-1])}")
    axis = axis % len(shape) if len(shape) > 1 else 0
    scales = cast(emit, aligned(importer, scales, shape, axis, block), precision)
    result = emit(op.round(emit(op.divide(cast(emit, x, precision), scales))))
    if zeros is not None:
        result = emit(op.add(result, cast(emit, aligned(importer, zeros, shape, axis, block), precision)))
    limits = np.iinfo(kind)
    return cast(emit, emit(op.clip(result, float(limits.min), float(limits.max))), kind)


def dequantize_linear(importer: Importer, inputs: Sequence[Any], attrs: dict[str, Any]) -> relax.Expr:
    """The operator DequantizeLinear of a value that is computed."""
    codes, scales = importer.tensor(inputs[0]), importer.tensor(inputs[1])
    zeros = None if inputs[2] is None else importer.tensor(inputs[2])
    dtype = stock.get_type(attrs["output_dtype"]) if attrs.get("output_dtype", 0) else dtype_of(scales)
    axis, block = attrs.get("axis", 1), attrs.get("block_size", 0)
    return dequantized(importer, codes, scales, zeros, axis=axis, block=block, dtype=dtype)


def _quantize(importer: Importer, inputs: Sequence[Any], attrs: dict[str, Any]) -> relax.Expr:
    x, scales = importer.tensor(inputs[0]), importer.tensor(inputs[1])
    zeros = None if inputs[2] is None else importer.tensor(inputs[2])
    kind = "uint8"
    if zeros is not None:
        kind = dtype_of(zeros)
    elif attrs.get("output_dtype", 0):
        kind = stock.get_type(attrs["output_dtype"])
    given = stock.get_type(attrs["precision"]) if attrs.get("precision", 0) else dtype_of(scales)
    precision = "float64" if given == "float64" else "float32"
    axis, block = attrs.get("axis", 1), attrs.get("block_size", 0)
    return quantized(importer, x, scales, zeros, kind, axis=axis, block=block, precision=precision)


def _refused(what: str) -> Callable[..., relax.Expr]:
    def convert(importer: Importer, inputs: Sequence[Any], attrs: dict[str, Any]) -> relax.Expr:
        raise ValueError(f"{what}; kvc computes with weights that are quantized, not with activations")

    return convert


CONVERTERS: dict[str, Callable[[Any, Sequence[Any], dict[str, Any]], Any]] = {
    "ConvInteger": _refused("it is a convolution of quantized activations"),
    "DequantizeLinear": dequantize_linear,
    "QLinearConv": _refused("it is a convolution of quantized activations"),
    "QLinearMatMul": _refused("it is a product of quantized activations"),
    "QuantizeLinear": _quantize,
}
