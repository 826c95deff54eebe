"""Converters of operators whose weights are codes: the codes stay as they are, behind a `kvc.dequantize`.

A weight here is an initializer. Activations that are quantized in the graph are ordinary arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from tvm import relax
from tvm.relax import op

from kvc_passes.markers import DEQUANTIZE, Dequantize, marker

from .quantize_activations import dequantize_linear

if TYPE_CHECKING:
    from .graph_importer import Importer

_CODED_INPUTS = {
    "DequantizeLinear": (0, 1, 2),
    "MatMulInteger": (1, 3),
    "com.microsoft::MatMulNBits": (1, 2, 3),
    "com.microsoft::GatherBlockQuantized": (0, 2, 3),
}


def coded_initializers(graph: onnx.GraphProto, key: Callable[[onnx.NodeProto], str]) -> set[str]:
    """Initializers that are codes, or scales and zero points of such: they become parameters of any size."""
    large = {t.name for t in graph.initializer if len(t.dims) > 1}
    found: set[str] = set()
    shaped: dict[str, str] = {}
    for node in graph.node:
        if node.op_type == "Reshape":
            shaped[node.output[0]] = shaped.get(node.input[0], node.input[0])
        places = _CODED_INPUTS.get(key(node), ())
        names = [shaped.get(node.input[i], node.input[i]) for i in places if i < len(node.input)]
        if names and names[0] in large:
            found.update(name for name in names if name)
    return found & {t.name for t in graph.initializer}


def _weight(
    importer: Importer,
    codes: relax.Expr,
    scales: relax.Expr,
    zeros: relax.Expr | None,
    attrs: Dequantize,
    dtype: str,
) -> relax.Var:
    operands = [codes, scales] if zeros is None else [codes, scales, zeros]
    type_ = relax.TensorType((attrs.rows, attrs.columns), dtype)
    return importer.emit(marker(DEQUANTIZE, operands, attrs, type_))


def _matmul_nbits(importer: Importer, inputs: Sequence[Any], attrs: dict[str, Any]) -> relax.Expr:
    """y = x w^T (+ bias), w [N, K] in blocks along K: codes [N, blocks, bytes], scales [N, blocks]."""
    x, codes, scales, zeros, group, bias = (inputs[i] for i in range(6))
    columns, depth, bits, block = attrs["N"], attrs["K"], attrs.get("bits", 4), attrs["block_size"]
    if group is not None or attrs.get("weight_prepacked", 0):
        raise ValueError("its weight has permuted groups or a layout of one device's")
    if bits not in (4, 8):
        raise ValueError(f"its weight has {bits} bits a code; 4 and 8 are supported")
    blocks = -(-depth // block)
    if zeros is not None and str(zeros.ty.dtype.dtype) != "uint8":
        raise ValueError(f"its zero points are {zeros.ty.dtype.dtype}, not codes")
    described = Dequantize(
        rows=columns,
        columns=depth,
        bits=bits,
        signed=False,
        axis=1,
        block=block,
        stored=blocks * block,
        zeros_stored=-(-blocks * bits // 8) * 8 // bits,
        middle=1 << (bits - 1),
    )
    dtype = str(x.ty.dtype.dtype)
    w = _weight(importer, codes, scales, zeros, described, dtype)
    result = op.matmul(importer.tensor(x), importer.emit(op.permute_dims(w)))
    return result if bias is None else op.add(importer.emit(result), bias)


def _gather_quantized(importer: Importer, inputs: Sequence[Any], attrs: dict[str, Any]) -> relax.Expr:
    """Rows of a table [rows, columns] in blocks along its last axis."""
    shaped, indices, scales, zeros = (inputs[i] for i in range(4))
    rows, last = importer.shape(shaped)
    codes = importer.parameter(shaped)
    bits, block = attrs.get("bits", 4), attrs.get("block_size", 128)
    if attrs.get("gather_axis", 0) != 0 or attrs.get("quantize_axis", 1) not in (1, -1):
        raise ValueError("it gathers along another axis than the first, or has blocks along the first")
    packed = importer.file.packed.get(importer.initializer(codes))
    signed = packed.signed if packed else str(codes.ty.dtype.dtype) == "int8"
    columns = packed.dims[1] if packed else last * 8 // bits
    blocks = -(-columns // block)
    described = Dequantize(
        rows=packed.dims[0] if packed else rows,
        columns=columns,
        bits=bits,
        signed=signed,
        axis=1,
        block=block,
        stored=columns,
        zeros_stored=-(-blocks * bits // 8) * 8 // bits,
        middle=0 if signed or (bits == 8 and zeros is not None) else 1 << (bits - 1),
    )
    w = _weight(importer, codes, scales, zeros, described, str(scales.ty.dtype.dtype))
    return op.take(w, importer.tensor(indices), axis=0, mode="clip")


def _dequantize_linear(importer: Importer, inputs: Sequence[Any], attrs: dict[str, Any]) -> relax.Expr:
    codes, scales, zeros = (inputs[i] for i in range(3))
    name = importer.initializer(codes)
    if name not in importer.coded:
        return dequantize_linear(importer, inputs, attrs)
    packed = importer.file.packed.get(name)
    shape = packed.dims if packed else tuple(importer.shape(codes))
    dtype = "int4" if packed else str(codes.ty.dtype.dtype)
    if len(shape) != 2 or dtype not in ("int8", "uint8", "int4"):
        raise ValueError(f"its weight is {dtype} {list(shape)}; matrices of 4 or 8 bits are supported")
    signed = packed.signed if packed else dtype == "int8"
    axis, block = _blocks(importer, shape, scales, attrs)
    described = Dequantize(
        rows=shape[0],
        columns=shape[1],
        bits=4 if packed else 8,
        signed=signed,
        axis=axis,
        block=block,
        stored=shape[1],
        zeros_stored=-(-shape[1] // block) if axis else shape[1],
    )
    return _weight(importer, codes, scales, zeros, described, str(scales.ty.dtype.dtype))


def _blocks(
    importer: Importer, shape: tuple[int, ...], scales: relax.Expr, attrs: dict[str, Any]
) -> tuple[Any, int]:
    """Along which axis elements share a scale, and how many: for one scale, one an index, or one a block."""
    given = importer.shape(scales)
    along = attrs.get("axis", 1) % 2
    if attrs.get("block_size", 0):
        return along, attrs["block_size"]
    if not given or given == [1]:
        return 1, shape[1]
    if given != [shape[along]]:
        raise ValueError(f"its scales {given} are not one for each of the {shape[along]} along axis {along}")
    return 1 - along, shape[1 - along]


def _dynamic_quantize(importer: Importer, inputs: Sequence[Any], attrs: dict[str, Any]) -> list[relax.Expr]:
    """Codes 0 .. 255 of x, their scale and zero point: one a token, where the operator has one for all."""
    if "token-scales" not in importer.allow:
        raise ValueError(
            "it chooses one scale for all tokens of a batch, so that a token's result depends on the others; "
            "--allow token-scales gives every token a scale of its own"
        )
    importer.used.add("token-scales")
    x = importer.tensor(inputs[0])
    zero = relax.const(0, "float32")
    low = importer.emit(op.minimum(importer.emit(op.min(x, axis=-1, keepdims=True)), zero))
    high = importer.emit(op.maximum(importer.emit(op.max(x, axis=-1, keepdims=True)), zero))
    span = importer.emit(op.subtract(high, low))
    smallest = relax.const(np.float32(1e-30), "float32")
    scale = importer.emit(op.maximum(importer.emit(op.divide(span, relax.const(255.0, "float32"))), smallest))
    point = importer.emit(op.round(importer.emit(op.divide(importer.emit(op.negative(low)), scale))))
    point = importer.emit(op.clip(point, 0, 255))
    codes = importer.emit(op.add(importer.emit(op.round(importer.emit(op.divide(x, scale)))), point))
    return [op.clip(codes, 0, 255), scale, point]


def _matmul_integer(importer: Importer, inputs: Sequence[Any], attrs: dict[str, Any]) -> relax.Expr:
    """(x - x_zero) (w - w_zero): integers, here as float32, exact up to rounding."""
    x, codes, x_zero, zeros = (inputs[i] for i in range(4))
    if importer.initializer(codes) not in importer.coded:
        raise ValueError("its second operand is no initializer")
    rows, columns = importer.shape(codes)
    signed = str(codes.ty.dtype.dtype) == "int8"
    per_column = zeros is not None and importer.shape(zeros) not in ([], [1])
    described = Dequantize(rows, columns, 8, signed, 0, rows, columns, columns if per_column else 0)
    w = _weight(importer, codes, importer.one, zeros, described, "float32")
    x = importer.tensor(x)
    if str(x.ty.dtype.dtype) != "float32":
        x = importer.emit(op.astype(x, "float32"))
    if x_zero is not None:
        zero = importer.tensor(x_zero)
        if str(zero.ty.dtype.dtype) != "float32":
            zero = importer.emit(op.astype(zero, "float32"))
        x = importer.emit(op.subtract(x, zero))
    return op.matmul(x, w)


CONVERTERS: dict[str, Callable[[Any, Sequence[Any], dict[str, Any]], Any]] = {
    "DequantizeLinear": _dequantize_linear,
    "DynamicQuantizeLinear": _dynamic_quantize,
    "MatMulInteger": _matmul_integer,
    "com.microsoft::GatherBlockQuantized": _gather_quantized,
    "com.microsoft::MatMulNBits": _matmul_nbits,
}
