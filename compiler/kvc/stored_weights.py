"""The numbers of one weight, from the ONNX file's into the kernels' layout, one tensor at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from kvc_passes.kernel_sets import TensorType
from kvc_passes.markers import Dequantize
from kvc_passes.weight_format import WeightFormat
from kvc_passes.weights import HeadWeight, Source, WeightPart

Array = np.ndarray[Any, Any]


class Layout(Protocol):
    """How a kind of kernels stores rows of weights: functions that write into a part of a tensor."""

    def extent(self, columns: int, tensor: TensorType) -> int:
        """How far `columns` rows reach along the tensor's first axis."""

    def pack_floats(self, weight: Array, format: WeightFormat, out: Array) -> None: ...
    def pack_codes(self, codes: Array, format: WeightFormat, out: Array) -> None: ...
    def pack_scales(self, scales: Array, format: WeightFormat, out: Array) -> None: ...
    def pack_zeros(self, zeros: Array, out: Array) -> None: ...


def stored(part: WeightPart, tensor: TensorType, weights: Mapping[str, Array], layout: Layout) -> Array:
    """The tensor that holds `part`, of the dtype and shape of `tensor`.

    weights: the imported model's parameters, memory-mapped; at most one weight of codes is unpacked at once.
    """
    weight, format = part.weight, part.weight.format
    if isinstance(weight, HeadWeight):
        return _stored_heads(weight, tensor, weights, layout)
    if not weight.depth:
        return np.ascontiguousarray(weights[weight.sources[0].name])
    result, at = np.empty(tensor.shape, _numpy(tensor.dtype)), 0
    for source in weight.sources:
        end = at + layout.extent(source.columns, tensor)
        out = result[at:end]
        if not format.coded:
            layout.pack_floats(_rows(source, weights[source.name]), format, out)
        elif part.part == 0:
            layout.pack_codes(_rows(source, codes_of(source, weights)), format, out)
        elif part.part == 1:
            layout.pack_scales(_rows(source, scales_of(source, weights)), format, out)
        else:
            layout.pack_zeros(_rows(source, zeros_of(source, weights)), out)
        at = end
    return result


def _stored_heads(
    weight: HeadWeight, tensor: TensorType, weights: Mapping[str, Array], layout: Layout
) -> Array:
    """The matrices of all heads, one behind the other."""
    rows = _rows(weight.source, weights[weight.source.name])
    result = np.empty(tensor.shape, _numpy(tensor.dtype))
    each = tensor.shape[0] // weight.heads
    for head in range(weight.heads):
        first = weight.first + head * weight.stride
        matrix = rows[first : first + weight.width]
        out = result[head * each : (head + 1) * each]
        layout.pack_floats(matrix.T if weight.absorbed else matrix, weight.format, out)
    return result


def codes_of(source: Source, weights: Mapping[str, Array]) -> Array:
    """The codes uint8 [rows, columns], unsigned: signed ones are moved up by half their range."""
    attrs = _coded(source)
    return _codes(weights[source.name], attrs, attrs.rows, attrs.stored)[:, : attrs.columns]


def scales_of(source: Source, weights: Mapping[str, Array]) -> Array:
    """The scales [rows, blocks] or [blocks, columns]."""
    return _each(weights[source.scales], _blocks(_coded(source)))


def zeros_of(source: Source, weights: Mapping[str, Array]) -> Array:
    """The zero points uint8 of the scales' shape, moved up like the codes."""
    attrs = _coded(source)
    rows, columns = _blocks(attrs)
    if not source.zeros:
        middle = attrs.middle + (1 << (attrs.bits - 1) if attrs.signed else 0)
        return np.full((rows, columns), middle, np.uint8)
    given = weights[source.zeros]
    if attrs.zeros_stored == 0:  # one for all
        return _each(_codes(given, attrs, 1, 1), (rows, columns))
    if attrs.bits == 8:
        return _each(_unsigned(given, attrs), (rows, columns))
    return _codes(given, attrs, rows, attrs.zeros_stored)[:, :columns]


def _coded(source: Source) -> Dequantize:
    assert source.coded is not None
    return source.coded


def _blocks(attrs: Dequantize) -> tuple[int, int]:
    if attrs.axis == 1:
        return attrs.rows, -(-attrs.columns // attrs.block)
    return -(-attrs.rows // attrs.block), attrs.columns


def _each(array: Array, shape: tuple[int, int]) -> Array:
    """An array with as many elements as `shape`, or with one for all."""
    return np.broadcast_to(array.reshape(()), shape) if array.size == 1 else array.reshape(shape)


def _unsigned(array: Array, attrs: Dequantize) -> Array:
    """8-bit codes from 0 on."""
    codes = array.view(np.uint8)
    return codes ^ np.uint8(128) if attrs.signed else codes


def _codes(array: Array, attrs: Dequantize, rows: int, stored: int) -> Array:
    """[rows, stored] codes, which stand one after the other in the bytes of `array`."""
    if attrs.bits == 8:
        return _unsigned(array, attrs).reshape(-1)[: rows * stored].reshape(rows, stored)
    both = array.view(np.uint8).reshape(-1)
    codes = np.empty(2 * both.size, np.uint8)
    codes[0::2], codes[1::2] = both & 15, both >> 4
    if attrs.signed:
        codes ^= 8
    return codes[: rows * stored].reshape(rows, stored)


def _rows(source: Source, array: Array) -> Array:
    """As rows of y = x w^T."""
    rows = array.T if source.transposed else array
    if not source.picked:
        return rows
    parts = [rows[first : first + count] for first, count in source.picked]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _numpy(dtype: str) -> Any:
    return ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
