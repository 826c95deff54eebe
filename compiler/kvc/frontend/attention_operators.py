"""Converters of the operators that compute a whole attention: ai.onnx Attention and ONNX Runtime's own.

What the marker `kvc.sdpa` can say becomes one; presents are an explicit concatenation of past and new.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from tvm import relax
from tvm.relax import op
from tvm.relax.frontend.onnx import onnx_frontend as stock

from kvc_passes.markers import SDPA, Extra, Sdpa, marker
from kvc_passes.spelled_out import attention as spelled_attention
from kvc_passes.spelled_out import cast, conjunction, dtype_of, visible

from .integers import expr
from .norm_operators import rms_normalized
from .rotary_operators import rotate, tables

if TYPE_CHECKING:
    from .graph_importer import Importer


def heads_first(importer: Importer, x: relax.Expr, heads: int) -> relax.Expr:
    """[b,s,heads*e] -> [b,heads,s,e]."""
    batch, length, width = importer.shape(x)
    if not isinstance(width, int) or not heads or width % heads:
        raise ValueError(f"its {heads} heads do not divide a width of {width}")
    split = [expr(d) for d in (batch, length, heads, width // heads)]
    return importer.emit(op.permute_dims(importer.emit(op.reshape(x, split)), [0, 2, 1, 3]))


def heads_last(importer: Importer, x: relax.Expr) -> relax.Expr:
    """[b,h,s,f] -> [b,s,h*f]."""
    batch, heads, length, size = importer.shape(x)
    x = importer.emit(op.permute_dims(x, [0, 2, 1, 3]))
    return importer.emit(op.reshape(x, [expr(d) for d in (batch, length, heads * size)]))


def with_past(importer: Importer, past: Any, new: relax.Expr) -> relax.Expr:
    """The keys or values [b,g,t,e] that are attended to: those of the past come first."""
    if past is None:
        return new
    given = importer.tensor(past)
    extents = [*importer.shape(given)[:3], importer.shape(new)[3]]
    if not isinstance(importer.shape(given)[3], int):  # some exporters do not say how large a head is
        given = importer.emit(op.reshape(given, [expr(d) for d in extents]))
    return importer.emit(op.concat([given, new], axis=2))


def sdpa(importer: Importer, attrs: Sdpa, operands: Sequence[relax.Expr]) -> relax.Expr:
    """The marker for q [b,h,s,e], k [b,g,t,e], v [b,g,t,f] and extras."""
    q, k, v = operands[:3]
    (batch, heads, rows, size), values = importer.shape(q), importer.shape(v)[3]
    keys = importer.shape(k)
    if not all(isinstance(d, int) for d in (heads, keys[1], size)) or heads % keys[1]:
        raise ValueError(f"{heads} query heads cannot share {keys[1]} KV heads")
    if keys[3] != size or importer.shape(v)[1] != keys[1]:
        raise ValueError(f"heads of queries {size} and keys {keys[3]}, or of keys and values, do not fit")
    shape = [expr(d) for d in (batch, heads, rows, values)]
    return importer.emit(marker(SDPA, operands, attrs, relax.TensorType(shape, dtype_of(q))))


def _attention(importer: Importer, inputs: Sequence[Any], attrs: dict[str, Any]) -> list[Any]:
    """ai.onnx Attention, opset 23 and later."""
    q, k, v = (importer.tensor(x) for x in inputs[:3])
    mask, past_key, past_value, nonpad = (inputs[i] for i in range(3, 7))
    flat = len(importer.shape(q)) == 3
    if flat:
        q = heads_first(importer, q, attrs.get("q_num_heads", 0))
        k, v = (heads_first(importer, x, attrs.get("kv_num_heads", 0)) for x in (k, v))
    if (past_key is None) != (past_value is None) or (past_key is not None and nonpad is not None):
        raise ValueError("it has a past key without a past value, or a past and nonpad_kv_seqlen")
    fresh = importer.shape(k)[2]
    k, v = with_past(importer, past_key, k), with_past(importer, past_value, v)
    wanted = Sdpa(
        scale=attrs.get("scale", 1 / math.sqrt(importer.shape(q)[3])),
        softcap=attrs.get("softcap") or None,
        causal=bool(attrs.get("is_causal", 0)) or attrs.get("right_window_size", -1) == 0,
        offset="zero" if past_key is None else "past",
        window=attrs["left_window_size"] + 1 if attrs.get("left_window_size", -1) >= 0 else None,
    )
    ahead = attrs["right_window_size"] if attrs.get("right_window_size", -1) > 0 else None
    mask = None if mask is None else _padded(importer, importer.tensor(mask), importer.shape(k)[2])
    rows = importer.shape(q)[2]
    restricted = wanted.causal or wanted.window is not None
    shifted = nonpad is not None or (past_key is not None and not importer.folder.equal(fresh, rows))
    if ahead is not None or (restricted and shifted):
        past = 0 if past_key is None else importer.shape(past_key)[2]
        seen = _visible(importer, wanted, rows, importer.shape(k)[2], past, nonpad, ahead)
        mask = _restricted(importer, mask, seen, dtype_of(q))
        wanted = replace(wanted, causal=False, window=None)
    extras: dict[Extra, relax.Expr] = {} if mask is None else {"mask": mask}
    if nonpad is not None:
        one = relax.const(1, "int64")
        extras["lengths"] = importer.emit(op.subtract(importer.tensor(nonpad), one))
    wanted = replace(wanted, extras=tuple(extras))
    output, products = _result(importer, wanted, [q, k, v, *extras.values()], attrs)
    return [heads_last(importer, output) if flat else output, k, v, products]


def _result(
    importer: Importer, wanted: Sdpa, operands: list[relax.Expr], attrs: dict[str, Any]
) -> tuple[relax.Expr, relax.Expr | None]:
    """The output [b,h,s,f], and the scores of output 3 if the node has it."""
    # The softmax is never computed in less than float32, more than that is not what the marker says.
    precise = stock.get_type(attrs.get("softmax_precision", onnx.TensorProto.FLOAT)) == "float64"
    if not importer.wants(3) and not precise:
        return sdpa(importer, wanted, operands), None
    precision = "float64" if precise else None
    stages = spelled_attention(importer.emit, wanted, operands, precision=precision)
    kinds = (stages.raw, stages.capped, stages.masked, stages.probabilities)
    return stages.output, kinds[attrs.get("qk_matmul_output_mode", 0)]


def _visible(
    importer: Importer, wanted: Sdpa, rows: Any, columns: Any, past: Any, nonpad: Any, ahead: int | None
) -> relax.Expr:
    """Which keys each query sees, bool [s,t] or [b,1,s,t], where the marker's offsets do not say it."""
    start = expr(past)
    if nonpad is not None:  # the last query is the last key that is no padding
        lengths = importer.emit(op.reshape(importer.tensor(nonpad), [-1, 1, 1, 1]))
        count = importer.tensor(importer.integer(rows))
        start = importer.emit(op.subtract(lengths, count))
    conditions = visible(
        importer.emit,
        expr(rows),
        expr(columns),
        start,
        causal=wanted.causal,
        window=wanted.window,
        ahead=ahead,
    )
    return conjunction(importer.emit, conditions)


def _restricted(importer: Importer, mask: relax.Expr | None, seen: relax.Expr, dtype: str) -> relax.Expr:
    """One mask that says what `mask` and the condition `seen` say."""
    if mask is None:
        return seen
    if dtype_of(mask) == "bool":
        return importer.emit(op.logical_and(mask, seen))
    return importer.emit(op.where(seen, mask, relax.const(-np.inf, dtype)))


def _padded(importer: Importer, mask: relax.Expr, keys: Any) -> relax.Expr:
    """A mask of at most 4 axes with its last one made as long as the keys: what it lacks is hidden."""
    kind = dtype_of(mask)
    if kind != "bool" and not kind.startswith(("float", "bfloat")):
        raise ValueError(f"its attn_mask is {kind}, neither bool nor a float")
    *outer, last = importer.shape(mask)
    missing = importer.folder.simplify(expr(keys) - expr(last))
    if isinstance(missing, int) and missing == 0:
        return mask
    if not isinstance(missing, int) or missing < 0:
        raise ValueError(f"its attn_mask is for {last} keys, and there are {keys}")
    fill = relax.const(False, "bool") if kind == "bool" else relax.const(-np.inf, kind)
    hidden = op.broadcast_to(fill, relax.ShapeExpr([expr(d) for d in (*outer, missing)]))
    return importer.emit(op.concat([mask, importer.emit(hidden)], axis=len(outer)))


def _group_query_attention(importer: Importer, inputs: Sequence[Any], attrs: dict[str, Any]) -> list[Any]:
    """com.microsoft GroupQueryAttention: attention with the rotary embedding and the cache inside."""
    _refuse_group_query(importer, inputs, attrs)
    heads, groups = attrs["num_heads"], attrs["kv_num_heads"]
    q, k, v = (
        heads_first(importer, x, n) for x, n in zip(_parts(importer, inputs, attrs), (heads, groups, groups))
    )
    if inputs[14] is not None:
        epsilon = attrs.get("qk_norm_epsilon", 1e-6)
        q = rms_normalized(importer, q, importer.tensor(inputs[14]), attrs.get("q_norm_epsilon", epsilon))
        k = rms_normalized(importer, k, importer.tensor(inputs[15]), attrs.get("k_norm_epsilon", epsilon))
    if attrs.get("do_rotary", 0):
        positions = inputs[9]
        if positions is None:
            past = 0 if inputs[3] is None else importer.shape(inputs[3])[2]
            stop = importer.folder.simplify(expr(past) + importer.shape(q)[2])
            positions = importer.emit(op.arange(expr(past), expr(stop), 1, "int64"))
        cos, sin = (tables(importer, table, positions) for table in inputs[7:9])
        interleaved = bool(attrs.get("rotary_interleaved", 0))
        q, k = (rotate(importer, x, cos, sin, interleaved) for x in (q, k))
    k, v = with_past(importer, inputs[3], k), with_past(importer, inputs[4], v)
    extras: dict[Extra, Any] = {"mask": inputs[10], "lengths": inputs[5], "sinks": inputs[11]}
    if attrs.get("smooth_softmax", 0) == 1 and inputs[11] is None:
        extras["sinks"] = relax.const(np.zeros(heads, np.float32))  # one more score, of 0
    given = {name: importer.tensor(x) for name, x in extras.items() if x is not None}
    wanted = Sdpa(
        scale=attrs.get("scale") or 1 / math.sqrt(importer.shape(q)[3]),
        softcap=attrs.get("softcap") or None,
        causal=bool(attrs.get("causal", 1)),
        offset="past",
        window=attrs["local_window_size"] if attrs.get("local_window_size", -1) > 0 else None,
        extras=tuple(given),
    )
    output = sdpa(importer, wanted, [q, k, v, *given.values()])
    return [heads_last(importer, output), k, v]


def _refuse_group_query(importer: Importer, inputs: Sequence[Any], attrs: dict[str, Any]) -> None:
    if any(attrs.get(name, b"NONE") not in (b"NONE", "NONE") for name in ("k_quant_type", "v_quant_type")):
        raise ValueError("its KV cache is quantized")
    if inputs[12] is not None or inputs[13] is not None:
        raise ValueError("its KV cache has scales")
    # A ring of the window's size drops keys that the window hides: the same as all keys and a window.
    if attrs.get("sliding_window_cache", 0) and attrs.get("local_window_size", -1) < 1:
        raise ValueError("its cache holds only a window (sliding_window_cache), of no known size")
    if inputs[16] is not None:
        raise ValueError("it has query_seqlens, chunks that are padded on the right")
    if importer.wants(3):
        raise ValueError("its fourth output, the scores, is used")
    if (inputs[14] is None) != (inputs[15] is None):
        raise ValueError("it has only one of q_norm_weight and k_norm_weight")
    if attrs.get("do_rotary", 0) and (inputs[7] is None or inputs[8] is None):
        raise ValueError("it rotates (do_rotary) but has no cos_cache and sin_cache")


def _parts(importer: Importer, inputs: Sequence[Any], attrs: dict[str, Any]) -> list[relax.Expr]:
    """Queries, keys and values [b,s,width], taken apart where they come as one tensor."""
    if inputs[1] is not None:
        return [importer.tensor(x) for x in inputs[:3]]
    packed = importer.tensor(inputs[0])
    width, heads, groups = importer.shape(packed)[2], attrs["num_heads"], attrs["kv_num_heads"]
    if not isinstance(width, int) or width % (heads + 2 * groups):
        raise ValueError(f"its packed width of {width} is not that of {heads} + 2 * {groups} heads")
    size = width // (heads + 2 * groups)
    split = importer.emit(op.split(packed, [heads * size, (heads + groups) * size], axis=2))
    return [importer.emit(relax.TupleGetItem(split, i)) for i in range(3)]


def _multi_head_attention(importer: Importer, inputs: Sequence[Any], attrs: dict[str, Any]) -> list[Any]:
    """com.microsoft MultiHeadAttention with queries, keys and values apart."""
    if inputs[1] is None or inputs[2] is None or len(importer.shape(inputs[0])) != 3:
        raise ValueError("its queries, keys and values are packed in one tensor")
    if inputs[8] is not None or inputs[9] is not None:
        raise ValueError("it shares a buffer of past and present, or has beams (cache_indirection)")
    if importer.wants(3):
        raise ValueError("its fourth output, the scores, is used")
    parts = _biased(importer, [importer.tensor(x) for x in inputs[:3]], inputs[3])
    q, k, v = (
        x if len(importer.shape(x)) == 4 else heads_first(importer, x, attrs["num_heads"]) for x in parts
    )
    k, v = with_past(importer, inputs[6], k), with_past(importer, inputs[7], v)
    mask = None if inputs[5] is None else importer.tensor(inputs[5])
    if inputs[4] is not None:
        hidden = float(attrs.get("mask_filter_value", -10000.0))
        padding = _key_padding(
            importer, importer.tensor(inputs[4]), importer.shape(k)[2], hidden, dtype_of(q)
        )
        mask = padding if mask is None else importer.emit(op.add(mask, padding))
    wanted = Sdpa(
        scale=attrs.get("scale") or 1 / math.sqrt(importer.shape(q)[3]),
        causal=bool(attrs.get("unidirectional", 0)),
        offset="past",
        extras=() if mask is None else ("mask",),
    )
    output = sdpa(importer, wanted, [q, k, v] if mask is None else [q, k, v, mask])
    return [heads_last(importer, output), k, v]


def _biased(importer: Importer, parts: list[relax.Expr], bias: Any) -> list[relax.Expr]:
    """Queries, keys and values with their parts of one bias added."""
    if bias is None:
        return parts
    begin, result = 0, []
    for part in parts:
        width = importer.shape(part)[-1]
        if len(importer.shape(part)) != 3:
            raise ValueError("it has a bias, and keys that are already split into heads")
        piece = op.strided_slice(
            importer.tensor(bias), [0], [begin], [begin + width], [1], assume_inbound=True
        )
        result.append(importer.emit(op.add(part, importer.emit(piece))))
        begin += width
    return result


def _key_padding(importer: Importer, mask: relax.Expr, keys: Any, hidden: float, dtype: str) -> relax.Expr:
    """A mask [b,t] or [b,s,t] of ones and zeros as what is added to the scores."""
    shape = importer.shape(mask)
    if len(shape) not in (2, 3) or not importer.folder.equal(shape[-1], keys):
        raise ValueError(f"its key_padding_mask {shape} is not [batch, keys] or [batch, queries, keys]")
    axes = [1, 2] if len(shape) == 2 else [1]
    shown = importer.emit(op.expand_dims(cast(importer.emit, mask, "bool"), axes))
    return importer.emit(op.where(shown, relax.const(0, dtype), relax.const(hidden, dtype)))


CONVERTERS: dict[str, Callable[[Any, Sequence[Any], dict[str, Any]], Any]] = {
    "Attention": _attention,
    "com.microsoft::GroupQueryAttention": _group_query_attention,
    "com.microsoft::MultiHeadAttention": _multi_head_attention,
}
