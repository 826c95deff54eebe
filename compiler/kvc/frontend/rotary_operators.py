"""Converters of RotaryEmbedding, of ai.onnx and of ONNX Runtime: tables are read, then the marker rotates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from tvm import relax
from tvm.relax import op

from kvc_passes.markers import ROTARY, Rotary, marker

from .integers import expr

if TYPE_CHECKING:
    from .graph_importer import Importer


def tables(importer: Importer, table: Any, positions: Any) -> relax.Expr:
    """Rows of a table [positions, r] for positions [s] or [b,s], as [1,s,r] or [b,s,r]."""
    rows = importer.emit(op.take(importer.tensor(table), importer.tensor(positions), axis=0, mode="clip"))
    return importer.emit(op.expand_dims(rows, 0)) if len(importer.shape(rows)) == 2 else rows


def rotate(
    importer: Importer, x: relax.Expr, cos: relax.Expr, sin: relax.Expr, interleaved: bool
) -> relax.Expr:
    """The marker for x [b,h,s,e] and tables [b or 1,s,r]."""
    size, half = importer.shape(x)[3], importer.shape(cos)[2]
    if not isinstance(half, int) or not isinstance(size, int) or 2 * half > size:
        raise ValueError(f"its tables of {half} pairs do not fit heads of {size} elements")
    return importer.emit(marker(ROTARY, [x, cos, sin], Rotary(interleaved), x.ty))


def _rotary_embedding(importer: Importer, inputs: Sequence[Any], attrs: dict[str, Any]) -> relax.Expr:
    """ai.onnx: x, cos, sin, position_ids [b,s]; tables [b,s,r] without them."""
    cos, sin = (importer.tensor(t) for t in inputs[1:3])
    if inputs[3] is not None:
        cos, sin = (tables(importer, t, inputs[3]) for t in (cos, sin))
    return _rotated(importer, importer.tensor(inputs[0]), cos, sin, attrs, attrs.get("num_heads", 0))


def _microsoft(importer: Importer, inputs: Sequence[Any], attrs: dict[str, Any]) -> relax.Expr:
    """com.microsoft: x, position_ids [b,s] or the first of them [1], cos, sin."""
    if attrs.get("is_packed_batching", 0):
        raise ValueError("its batch is packed (is_packed_batching)")
    if attrs.get("scale", 1.0) != 1.0:
        raise ValueError(f"it has a scale of {attrs['scale']}, which ONNX Runtime ignores on the CPU")
    x, positions = importer.tensor(inputs[0]), importer.tensor(inputs[1])
    shape, half = importer.shape(x), importer.shape(inputs[2])[1]
    if len(importer.shape(positions)) == 1:
        length = shape[2] if len(shape) == 4 else shape[1]
        count = importer.emit(op.arange(0, expr(length), 1, "int64"))
        positions = importer.emit(op.add(count, importer.emit(op.astype(positions, "int64"))))
    heads = attrs.get("num_heads", 0)
    if len(shape) == 3 and not heads:
        if not isinstance(shape[2], int) or not isinstance(half, int) or shape[2] % (2 * half):
            raise ValueError(f"its width of {shape[2]} is not made of heads of 2 * {half} elements")
        heads = shape[2] // (2 * half)
    cos, sin = (tables(importer, t, positions) for t in inputs[2:4])
    return _rotated(importer, x, cos, sin, attrs, heads)


def _rotated(
    importer: Importer, x: relax.Expr, cos: relax.Expr, sin: relax.Expr, attrs: dict[str, Any], heads: int
) -> relax.Expr:
    """x [b,h,s,e], or [b,s,h*e] with `heads` heads, rotated."""
    shape = importer.shape(x)
    flat = len(shape) == 3
    if flat:
        if not heads or not isinstance(shape[2], int) or shape[2] % heads:
            raise ValueError(f"its {heads} heads do not divide a width of {shape[2]}")
        x = importer.emit(op.reshape(x, [expr(d) for d in (shape[0], shape[1], heads, shape[2] // heads)]))
        x = importer.emit(op.permute_dims(x, [0, 2, 1, 3]))
    half = importer.shape(cos)[2]
    if (attrs.get("rotary_embedding_dim", 0) or importer.shape(x)[3]) != 2 * half:
        raise ValueError(f"its tables have {half} pairs, and that is not what it rotates")
    x = rotate(importer, x, cos, sin, bool(attrs.get("interleaved", 0)))
    if not flat:
        return x
    return op.reshape(importer.emit(op.permute_dims(x, [0, 2, 1, 3])), [expr(d) for d in shape])


CONVERTERS: dict[str, Callable[[Any, Sequence[Any], dict[str, Any]], Any]] = {
    "RotaryEmbedding": _rotary_embedding,
    "com.microsoft::RotaryEmbedding": _microsoft,
}
