"""Converters of operators with a state of their own: caches written in place, carries of convolutions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from tvm import relax, tirx
from tvm.relax import op

from kvc_passes.spelled_out import cast, dtype_of

from .integers import expr

if TYPE_CHECKING:
    from .graph_importer import Importer


def _tensor_scatter(importer: Importer, inputs: Sequence[Any], attrs: dict[str, Any]) -> relax.Expr:
    """A cache [b,..,t,..] with an update [b,..,s,..] written from each sequence's index on."""
    emit = importer.emit
    cache, update = importer.tensor(inputs[0]), importer.tensor(inputs[1])
    shape, rank = importer.shape(cache), len(importer.shape(cache))
    axis = attrs.get("axis", -2) % rank
    if axis == 0:
        raise ValueError("it scatters along the batch")
    along = [-1 if i == axis else 1 for i in range(rank)]
    extent, count = expr(shape[axis]), expr(importer.shape(update)[axis])
    source = emit(op.reshape(emit(op.arange(0, extent, 1, "int64")), along))
    if inputs[2] is not None:
        first = cast(emit, importer.tensor(inputs[2]), "int64")
        first = emit(op.reshape(first, [-1, *[1] * (rank - 1)]))
        source = emit(op.subtract(source, first))
    if attrs.get("mode", b"linear") in (b"circular", "circular"):
        source = emit(op.floor_mod(source, importer.tensor(importer.integer(shape[axis]))))
    size = importer.tensor(importer.integer(importer.shape(update)[axis]))
    zero = relax.const(0, "int64")
    inside = emit(op.logical_and(emit(op.greater_equal(source, zero)), emit(op.less(source, size))))
    last = importer.tensor(importer.integer(importer.folder.simplify(count - 1)))
    nearest = emit(op.minimum(emit(op.maximum(source, zero)), last))
    indices = emit(op.broadcast_to(nearest, relax.ShapeExpr([expr(d) for d in shape])))
    return op.where(inside, emit(op.gather_elements(update, indices, axis)), cache)


def _causal_conv(importer: Importer, inputs: Sequence[Any], attrs: dict[str, Any]) -> list[relax.Expr]:
    """CausalConvWithState: x [b,c,l] and weight [c,1,k], behind a carry [b,c,k-1] or zeros."""
    emit = importer.emit
    x, weight = importer.tensor(inputs[0]), importer.tensor(inputs[1])
    (batch, channels, length), taps = importer.shape(x), importer.shape(weight)[2]
    if not isinstance(taps, int):
        raise ValueError(f"its kernel has {taps} taps, not a fixed number")
    own = dtype_of(x)
    wide = "float32" if own in ("float16", "bfloat16") else own
    if inputs[3] is not None:
        padded = emit(op.concat([importer.tensor(inputs[3]), x], axis=2))
    elif taps > 1:
        carry = op.zeros(relax.ShapeExpr([expr(d) for d in (batch, channels, taps - 1)]), own)
        padded = emit(op.concat([emit(carry), x], axis=2))
    else:
        padded = x
    kernel = cast(emit, emit(op.squeeze(weight, [1])), wide)
    total: relax.Expr | None = None
    for tap in range(taps):
        piece = cast(
            emit, _columns(importer, padded, tap, importer.folder.simplify(expr(length) + tap)), wide
        )
        term = emit(op.multiply(piece, _columns(importer, kernel, tap, tap + 1)))
        total = term if total is None else emit(op.add(total, term))
    if inputs[2] is not None:
        bias = emit(op.expand_dims(cast(emit, importer.tensor(inputs[2]), wide), 1))
        total = emit(op.add(total, bias))
    if attrs.get("activation", b"none") in (b"silu", b"swish", "silu", "swish"):
        total = emit(op.multiply(total, emit(op.sigmoid(total))))
    end = importer.folder.simplify(expr(length) + taps - 1)
    present = _columns(importer, padded, length, end) if taps > 1 else None
    if present is None and importer.wants(1):
        raise ValueError("its carry has no elements")
    return [cast(emit, total, own), present]


def _columns(importer: Importer, x: relax.Expr, begin: Any, end: Any) -> relax.Expr:
    """x[..., begin:end]."""
    axis = len(importer.shape(x)) - 1
    return importer.emit(
        op.strided_slice(
            x, [axis], [expr(begin)], [expr(end)], [tirx.IntImm("int64", 1)], assume_inbound=True
        )
    )


def _recurrence(importer: Importer, inputs: Sequence[Any], attrs: dict[str, Any]) -> relax.Expr:
    raise ValueError(
        "it is a recurrence over the tokens, which kvc does not serve; only attention may mix tokens"
    )


CONVERTERS: dict[str, Callable[[Any, Sequence[Any], dict[str, Any]], Any]] = {
    "CausalConvWithState": _causal_conv,
    "LinearAttention": _recurrence,
    "TensorScatter": _tensor_scatter,
}
