"""RecognizeAttention: near misses of attention, each refused with its node and the rule."""

from __future__ import annotations

from typing import Any

import pytest
from attention_graphs import HEADS, MIN, Attention, Context, f32, heads_in_turn, i64, scores_divided
from tvm.relax import op

from kvc_passes.errors import UnsupportedModel
from kvc_passes.recognize_attention import RecognizeAttention
from support import module_of, param, symbol


def past_behind(emit: Any, c: Context, which: int, new: Any) -> Any:
    return emit(op.concat([new, c.past[which]], axis=2))


def scaled_values(emit: Any, c: Context, weights: Any, v: Any) -> Any:
    return emit(op.matmul(weights, emit(op.multiply(v, f32(2.0)))))


def used_twice(emit: Any, c: Context, weights: Any, v: Any) -> Any:
    return emit(op.add(emit(op.matmul(weights, v)), emit(op.matmul(emit(op.exp(weights)), v))))


def no_product(emit: Any, c: Context, q: Any, k: Any) -> Any:
    return emit(op.exp(scores_divided(emit, c, q, k)))


def over_queries(emit: Any, c: Context, x: Any) -> Any:
    return emit(op.nn.softmax(x, axis=2), "/layers.0/Softmax")


def three_dimensions(emit: Any, c: Context, x: Any) -> Any:
    flat = emit(op.reshape(x, [c.batch * HEADS, c.sequence, c.total]))
    return emit(
        op.reshape(
            emit(op.nn.softmax(flat, axis=-1), "/layers.0/Softmax"), [c.batch, HEADS, c.sequence, c.total]
        )
    )


def dropped_afterwards(emit: Any, c: Context, weights: Any, v: Any) -> Any:
    far = emit(op.less(c.key(emit), emit(op.subtract(c.query(emit), i64(3)))))
    return emit(op.matmul(emit(op.where(far, f32(0.0), weights)), v))


def data_instead_of_hidden(emit: Any, c: Context, scores: Any, mask: Any) -> Any:
    return emit(op.where(mask, scores, emit(op.negative(scores))))


def zero_instead_of_hidden(emit: Any, c: Context, scores: Any, mask: Any) -> Any:
    return emit(op.where(mask, scores, f32(0.0)))


def shifted_after_masking(emit: Any, c: Context, scores: Any, mask: Any) -> Any:
    hidden = emit(op.add(scores, emit(op.where(mask, f32(0.0), f32(MIN)))))
    return emit(op.multiply(hidden, emit(op.exp(scores))))


def past_of_keys(emit: Any, c: Context, which: int, new: Any) -> Any:
    return emit(op.concat([c.past[0], new], axis=2))


REFUSALS = {
    "no mask": (Attention(mask=None), "the attention is bidirectional"),
    "GQA heads in turn": (Attention(past=True, repeat=heads_in_turn), r"k is not concat\(past, new\)"),
    "softmax over queries": (Attention(softmax=over_queries), "expected a softmax over the last axis"),
    "no head axis": (Attention(softmax=three_dimensions), "expected a softmax over the last axis"),
    "scores are no product": (
        Attention(scores=no_product),
        "expected scores from a matrix product of q and k",
    ),
    "values are scaled": (Attention(weigh=scaled_values), "the values are scaled by 2.0"),
    "two products": (Attention(weigh=used_twice), "expected one product of the softmax with the values"),
    "past behind the new": (
        Attention(past=True, extend=past_behind),
        r"k is not concat\(past, new\) along the token axis",
    ),
    "one past for keys and values": (Attention(past=True, extend=past_of_keys), ""),
    "scores chosen for hidden keys": (Attention(apply=data_instead_of_hidden), ""),
    "zero as the score of hidden keys": (Attention(apply=zero_instead_of_hidden), ""),
    "scores changed after the mask": (Attention(apply=shifted_after_masking), "found multiply"),
    "weights changed after the softmax": (Attention(weigh=dropped_afterwards), ""),
}


@pytest.mark.parametrize(("attention", "reason"), REFUSALS.values(), ids=REFUSALS)
def test_a_refusal_names_the_node_and_the_rule(attention: Attention, reason: str) -> None:
    with pytest.raises(
        UnsupportedModel, match=rf"attention at node '/layers.0/Softmax' \(softmax\): .*{reason}"
    ):
        attention.recognize()


def test_a_graph_without_softmax_is_no_decoder() -> None:
    tokens = param("input_ids", [symbol("batch"), symbol("sequence")], "int64")
    module, names = module_of([tokens], lambda emit, t: emit(op.add(t, t)))
    roles = Context(past=False).roles
    with pytest.raises(UnsupportedModel, match="the model has no attention"):
        RecognizeAttention(roles, names).run(module)
