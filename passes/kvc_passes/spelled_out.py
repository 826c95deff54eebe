"""Attention and rotary embeddings as plain Relax operations, in the form that exporters write."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from tvm import relax, tirx
from tvm.relax import op

from .graph import dims, static
from .markers import Rotary, Sdpa

Emit = Callable[[relax.Expr], relax.Var]
_HALF = ("float16", "bfloat16")


@dataclass(frozen=True)
class Stages:
    """What an attention computes on its way, [b,h,s,t] all but the last.

    Attributes:
        raw: scale * q k^T.
        capped: after the softcap.
        masked: after the masks.
        probabilities: after the softmax; rows that see no key are zero.
        output: [b,h,s,f].
    """

    raw: relax.Expr
    capped: relax.Expr
    masked: relax.Expr
    probabilities: relax.Expr
    output: relax.Expr


def attention(
    emit: Emit,
    attrs: Sdpa,
    operands: Sequence[relax.Expr],
    *,
    precision: str | None = None,
) -> Stages:
    """The operations that `kvc.sdpa(*operands)` stands for.

    Half precision is computed in float32; stages and output have the operands' own type.

    Args:
        emit: binds a value.
        operands: q [b,h,s,e], k [b,g,t,e], v [b,g,t,f] and the extras of `attrs`.
        precision: the type of the softmax, by default that of the computation.
    """
    q, *rest = operands
    own = dtype_of(q)
    wide = "float32" if own in _HALF else own
    heads = dims(q)[1]
    keys, values = (repeat_heads(emit, cast(emit, x, wide), heads) for x in rest[:2])
    extras = dict(zip(attrs.extras, rest[2:]))
    product = emit(op.matmul(cast(emit, q, wide), emit(op.permute_dims(keys, [0, 1, 3, 2]))))
    raw = emit(op.multiply(product, relax.const(attrs.scale, wide)))
    capped = raw
    if attrs.softcap:
        bounded = emit(op.tanh(emit(op.divide(raw, relax.const(attrs.softcap, wide)))))
        capped = emit(op.multiply(bounded, relax.const(attrs.softcap, wide)))
    masked = _mask(emit, attrs, capped, extras)
    scores = cast(emit, masked, precision or wide)
    probabilities = cast(emit, softmax(emit, scores, extras.get("sinks")), wide)
    output = emit(op.matmul(probabilities, values))
    return Stages(*(cast(emit, x, own) for x in (raw, capped, masked, probabilities, output)))


def _mask(emit: Emit, attrs: Sdpa, scores: relax.Expr, extras: dict[str, relax.Expr]) -> relax.Expr:
    """Scores [b,h,s,t] plus a float mask, and -inf where a key is hidden."""
    dtype = dtype_of(scores)
    _, _, rows, columns = dims(scores)
    start = columns - rows if attrs.offset == "past" else tirx.IntImm("int64", 0)
    allowed = visible(emit, rows, columns, start, causal=attrs.causal, window=attrs.window)
    if "lengths" in extras:
        last = emit(op.reshape(cast(emit, extras["lengths"], "int64"), [-1, 1, 1, 1]))
        allowed.append(emit(op.less_equal(_count(emit, columns), last)))
    hidden = relax.const(-np.inf, dtype)
    mask = extras.get("mask")
    if mask is not None and dtype_of(mask) == "bool":
        allowed.append(mask)
    elif mask is not None:
        mask = cast(emit, mask, dtype)
        # A score that is inf or NaN must not survive under a mask of -inf, as a sum would let it.
        allowed.append(emit(op.not_equal(mask, hidden)))
        scores = emit(op.add(scores, mask))
    if not allowed:
        return scores
    return emit(op.where(conjunction(emit, allowed), scores, hidden))


def visible(
    emit: Emit,
    rows: Any,
    columns: Any,
    start: Any,
    *,
    causal: bool = False,
    window: int | None = None,
    ahead: int | None = None,
) -> list[relax.Expr]:
    """Conditions [s, t], or [b,1,s,t], under which the query of a row sees the key of a column.

    Args:
        rows, columns: s and t.
        start: position of the first query, an expression or an int64 tensor [b,1,1,1].
        causal: keys up to the query's own position.
        window: keys from position - window + 1 on.
        ahead: keys up to position + ahead.
    """
    if not causal and window is None and ahead is None:
        return []
    key = _count(emit, columns)
    if isinstance(start, relax.Expr):
        query = emit(op.add(emit(op.expand_dims(_count(emit, rows), 1)), start))
    else:
        query = emit(op.expand_dims(emit(op.arange(start, start + rows, 1, "int64")), 1))
    conditions: list[relax.Expr] = []
    if causal:
        conditions.append(emit(op.less_equal(key, query)))
    if window is not None:
        conditions.append(emit(op.greater(emit(op.add(key, relax.const(window, "int64"))), query)))
    if ahead is not None:
        conditions.append(emit(op.less_equal(key, emit(op.add(query, relax.const(ahead, "int64"))))))
    return conditions


def _count(emit: Emit, extent: Any) -> relax.Var:
    return emit(op.arange(tirx.IntImm("int64", 0), extent, 1, "int64"))


def conjunction(emit: Emit, conditions: Sequence[relax.Expr]) -> relax.Expr:
    """The and of one or more conditions."""
    result = conditions[0]
    for condition in conditions[1:]:
        result = emit(op.logical_and(result, condition))
    return result


def softmax(emit: Emit, scores: relax.Expr, sinks: relax.Expr | None) -> relax.Expr:
    """Softmax over the last axis; a row of -inf gives zeros. Sinks [h] only add to the denominator."""
    dtype = dtype_of(scores)
    info: Any = ml_dtypes.finfo
    limits = info(dtype)
    largest = emit(op.max(scores, axis=-1, keepdims=True))
    largest = emit(op.maximum(largest, relax.const(float(limits.min), dtype)))  # -inf - -inf is NaN
    if sinks is not None:
        sinks = emit(op.reshape(cast(emit, sinks, dtype), [1, -1, 1, 1]))
        largest = emit(op.maximum(largest, sinks))
    weights = emit(op.exp(emit(op.subtract(scores, largest))))
    total = emit(op.sum(weights, axis=-1, keepdims=True))
    if sinks is not None:
        total = emit(op.add(total, emit(op.exp(emit(op.subtract(sinks, largest))))))
    total = emit(op.maximum(total, relax.const(float(limits.tiny), dtype)))  # 0 / 0 is NaN
    return emit(op.divide(weights, total))


def repeat_heads(emit: Emit, x: relax.Expr, heads: Any) -> relax.Expr:
    """[b,g,t,e] -> [b,heads,t,e]: head i is KV head i // (heads // g). Both counts are static."""
    batch, groups, length, size = dims(x)
    count, own = static(heads), static(groups)
    if count is None or own is None or count % own:
        raise ValueError(f"{heads} query heads cannot share {groups} KV heads")
    if count == own:
        return x
    x = emit(op.expand_dims(x, 2))
    shape = relax.ShapeExpr([batch, groups, tirx.IntImm("int64", count // own), length, size])
    x = emit(op.broadcast_to(x, shape))
    return emit(op.reshape(x, relax.ShapeExpr([batch, tirx.IntImm("int64", count), length, size])))


def rotary(emit: Emit, attrs: Rotary, x: relax.Expr, cos: relax.Expr, sin: relax.Expr) -> relax.Expr:
    """The operations that `kvc.rotary(x [b,h,s,e], cos [b or 1,s,r], sin)` stands for."""
    *_, size = (static(d) for d in dims(x))
    half = static(dims(cos)[2])
    if size is None or half is None or 2 * half > size:
        raise ValueError(f"a rotation of {half} pairs does not fit heads of {size} elements")
    cos, sin = (emit(op.expand_dims(cast(emit, t, dtype_of(x)), 1)) for t in (cos, sin))
    turned = x if 2 * half == size else _part(emit, x, 0, 2 * half)
    result = (_interleaved if attrs.interleaved else _halves)(emit, turned, cos, sin, half)
    if 2 * half == size:
        return result
    return emit(op.concat([result, _part(emit, x, 2 * half, size)], axis=-1))


def _halves(emit: Emit, x: relax.Expr, cos: relax.Expr, sin: relax.Expr, half: int) -> relax.Expr:
    """x * [cos, cos] + [-x2, x1] * [sin, sin] with x = [x1, x2]."""
    first, second = _part(emit, x, 0, half), _part(emit, x, half, 2 * half)
    turned = emit(op.concat([emit(op.negative(second)), first], axis=-1))
    cos, sin = (emit(op.concat([t, t], axis=-1)) for t in (cos, sin))
    return emit(op.add(emit(op.multiply(x, cos)), emit(op.multiply(turned, sin))))


def _interleaved(emit: Emit, x: relax.Expr, cos: relax.Expr, sin: relax.Expr, half: int) -> relax.Expr:
    """(x1 cos - x2 sin, x1 sin + x2 cos) for every pair (x1, x2) of neighbours."""
    shape = dims(x)
    pairs = emit(
        op.reshape(x, relax.ShapeExpr([*shape[:3], tirx.IntImm("int64", half), tirx.IntImm("int64", 2)]))
    )
    first, second = _part(emit, pairs, 0, 1), _part(emit, pairs, 1, 2)
    cos, sin = (emit(op.expand_dims(t, -1)) for t in (cos, sin))
    left = emit(op.subtract(emit(op.multiply(first, cos)), emit(op.multiply(second, sin))))
    right = emit(op.add(emit(op.multiply(first, sin)), emit(op.multiply(second, cos))))
    return emit(op.reshape(emit(op.concat([left, right], axis=-1)), relax.ShapeExpr(shape)))


def _part(emit: Emit, x: relax.Expr, begin: int, end: int) -> relax.Var:
    """x[..., begin:end]."""
    return emit(op.strided_slice(x, [len(dims(x)) - 1], [begin], [end], [1], assume_inbound=True))


def dtype_of(value: relax.Expr) -> str:
    return str(value.ty.dtype.dtype)


def cast(emit: Emit, value: relax.Expr, dtype: str) -> relax.Expr:
    """`value` as `dtype`, itself where it is already."""
    return value if dtype_of(value) == dtype else emit(op.astype(value, dtype))
