"""Converter of FlexAttention: attention with graphs of its own between its products and its softmax."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from tvm import relax
from tvm.relax import op
from tvm.relax.frontend.onnx import onnx_frontend as stock

from kvc_passes.markers import Sdpa
from kvc_passes.spelled_out import cast, dtype_of, repeat_heads, softmax

from .attention_operators import sdpa
from .integers import expr

if TYPE_CHECKING:
    from .graph_importer import Importer


def _flex_attention(importer: Importer, inputs: Sequence[Any], attrs: dict[str, Any]) -> relax.Expr:
    """ai.onnx.preview FlexAttention, spelled out if it has graphs that change scores or probabilities."""
    emit = importer.emit
    q, k, v = (importer.tensor(x) for x in inputs[:3])
    scale = attrs.get("scale", 1 / math.sqrt(importer.shape(q)[3]))
    if "score_mod" not in attrs and "prob_mod" not in attrs:
        return sdpa(importer, Sdpa(scale=scale), [q, k, v])
    own = dtype_of(q)
    wide = "float64" if own == "float64" else "float32"
    wide = stock.get_type(attrs["softmax_precision"]) if "softmax_precision" in attrs else wide
    heads = expr(importer.shape(q)[1])
    keys, values = (repeat_heads(emit, cast(emit, x, wide), heads) for x in (k, v))
    scores = emit(op.matmul(cast(emit, q, wide), emit(op.permute_dims(keys, [0, 1, 3, 2]))))
    scores = emit(op.multiply(scores, relax.const(scale, wide)))
    if "score_mod" in attrs:
        (scores,) = importer.inline(attrs["score_mod"], [scores])
    probabilities = softmax(emit, scores, None)
    if "prob_mod" in attrs:
        (probabilities,) = importer.inline(attrs["prob_mod"], [probabilities])
    return cast(emit, emit(op.matmul(probabilities, values)), own)


CONVERTERS: dict[str, Callable[[Any, Sequence[Any], dict[str, Any]], Any]] = {
    "ai.onnx.preview::FlexAttention": _flex_attention,
}
