"""RecognizeAttention: spellings of attention that must become one marker."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from attention_graphs import (
    DIM,
    HEADS,
    MIN,
    TOLERANCE,
    Attention,
    Context,
    arrays,
    causal,
    f32,
    heads_in_turn,
    scores_divided,
)
from tvm import relax
from tvm.relax import op

from kvc_passes.errors import UnsupportedModel
from kvc_passes.graph import Graph, op_name
from kvc_passes.markers import ATTENTION
from kvc_passes.recognize_attention import RecognizeAttention
from support import attend, floats, module_of, ops, param, run, run_markers


def scores_scaled_before(emit: Any, c: Context, q: Any, k: Any) -> Any:
    root = f32(0.5)
    q = emit(op.multiply(q, root))
    k = emit(op.multiply(root, emit(op.permute_dims(k, [0, 1, 3, 2]))))
    return emit(op.matmul(q, k))


def scores_softcapped(emit: Any, c: Context, q: Any, k: Any) -> Any:
    scores = emit(op.multiply(emit(op.matmul(q, emit(op.permute_dims(k, [0, 1, 3, 2])))), f32(0.25)))
    return emit(op.multiply(emit(op.tanh(emit(op.divide(scores, f32(2.0))))), f32(2.0)))


def nan_guard(emit: Any, c: Context, weights: Any, v: Any) -> Any:
    guarded = emit(op.where(emit(op.isnan(weights)), f32(0.0), weights))
    return emit(op.matmul(guarded, v))


def choose_scores(emit: Any, c: Context, scores: Any, mask: Any) -> Any:
    return emit(op.where(mask, scores, f32(-np.inf)))


def choose_hidden(emit: Any, c: Context, scores: Any, mask: Any) -> Any:
    return emit(op.where(emit(op.logical_not(mask)), f32(-np.inf), scores))


def joined(emit: Any, c: Context, x: Any) -> Any:
    """[b, heads, .., ..] as [b * heads, .., ..]."""
    return emit(op.reshape(x, [c.batch * HEADS, *x.ty.shape.values[2:]]))


def scores_in_three_axes(emit: Any, c: Context, q: Any, k: Any) -> Any:
    """Batch and heads in one axis, as batched products of three axes have it."""
    keys = emit(op.permute_dims(joined(emit, c, k), [0, 2, 1]))
    scores = emit(op.multiply(emit(op.matmul(joined(emit, c, q), keys)), f32(0.25)))
    return emit(op.reshape(scores, [c.batch, HEADS, c.sequence, c.total]))


def weigh_in_three_axes(emit: Any, c: Context, weights: Any, v: Any) -> Any:
    mixed = emit(op.matmul(joined(emit, c, weights), joined(emit, c, v)))
    return emit(op.reshape(mixed, [c.batch, HEADS, c.sequence, DIM]))


def less_the_largest(emit: Any, c: Context, x: Any) -> Any:
    shifted = emit(op.subtract(x, emit(op.max(x, axis=-1, keepdims=True))))
    return emit(op.nn.softmax(shifted, axis=-1), "/layers.0/Softmax")


def learned_score(emit: Any, c: Context, x: Any) -> Any:
    """One more column, whose weight is left out."""
    table = emit(op.reshape(relax.const(np.array(LEARNED, np.float32)), [1, HEADS, 1, 1]))
    column = emit(op.broadcast_to(table, [c.batch, HEADS, c.sequence, 1]))
    wide = emit(op.concat([x, column], axis=-1))
    weights = emit(op.nn.softmax(wide, axis=-1), "/layers.0/Softmax")
    return emit(op.strided_slice(weights, [3], [0], [c.total], assume_inbound=True))


LEARNED = (0.5, -1.0, 2.0, 0.0)

SPELLINGS = {
    "plain": Attention(),
    "every head of its own": Attention(kv_heads=HEADS),
    "one KV head": Attention(kv_heads=1),
    "past": Attention(past=True),
    "scale on q and k": Attention(scores=scores_scaled_before),
    "scale as a divisor": Attention(scores=scores_divided),
    "softcap": Attention(scores=scores_softcapped),
    "guarded against NaN": Attention(weigh=nan_guard),
    "scores chosen by the mask": Attention(apply=choose_scores),
    "scores chosen against the mask": Attention(apply=choose_hidden),
    "three axes": Attention(scores=scores_in_three_axes, weigh=weigh_in_three_axes),
    "three axes, past": Attention(scores=scores_in_three_axes, weigh=weigh_in_three_axes, past=True),
    "scores less the largest": Attention(softmax=less_the_largest),
    "a learned score a head": Attention(softmax=learned_score),
    "a learned score a head, past": Attention(softmax=learned_score, past=True),
    "heads stay in front": Attention(finish=lambda emit, c, x: emit(op.add(x, f32(0.0)))),
}


@pytest.mark.parametrize("attention", SPELLINGS.values(), ids=SPELLINGS)
def test_a_spelling_becomes_one_marker_that_computes_the_same(attention: Attention) -> None:
    module, *_ = attention.build()
    result = attention.recognize()
    counted = ops(result.module)
    assert counted[ATTENTION] == 1
    assert counted["softmax"] == counted["matmul"] == 0
    assert result.sites == 1
    (site,) = result.facts
    assert (site.heads, site.kv_heads, site.head_dim, site.value_dim) == (HEADS, attention.kv_heads, DIM, DIM)
    assert site.scale == pytest.approx(0.25)
    assert site.softcap == (2.0 if attention is SPELLINGS["softcap"] else None)
    assert (site.node, site.index, site.mask.kind, site.rope) == ("/layers.0/Softmax", 0, "causal", None)
    assert site.guarded == (attention.weigh is nan_guard)
    assert site.sinks == (LEARNED if attention.softmax is learned_score else None)
    inputs = arrays(attention)
    expected, got = run(module, *inputs), run_markers(result.module, result.facts, *inputs)
    np.testing.assert_allclose(got[0], expected[0], rtol=0, atol=TOLERANCE)


def test_keys_that_are_moved_at_once_are_put_in_order() -> None:
    """The keys of one token stand together, head by head."""
    c = Context(past=False, kv_heads=HEADS)
    k = param("k_by_token", [c.batch, c.sequence, HEADS, DIM])

    def body(emit: Any, *_: Any) -> Any:
        scores = emit(op.matmul(c.q, emit(op.permute_dims(k, [0, 2, 3, 1]))))
        scores = emit(op.add(scores, emit(op.where(causal(emit, c), f32(0.0), f32(MIN)))))
        return emit(op.matmul(emit(op.nn.softmax(scores, axis=-1)), c.v))

    module, names = module_of([*c.params, k], body)
    result = RecognizeAttention(c.roles, names).run(module)
    inputs = [*arrays(Attention(kv_heads=HEADS)), floats(2, 11, HEADS, DIM, seed=9)]
    expected, got = run(module, *inputs), run_markers(result.module, result.facts, *inputs)
    np.testing.assert_allclose(got[0], expected[0], rtol=0, atol=TOLERANCE)


def test_values_and_outputs_may_be_wider_than_queries() -> None:
    """Queries and keys in float16, a softmax and values in float32, as PyTorch's exporter writes them."""
    c = Context(past=False, kv_heads=HEADS)
    q, k = (param(name, [c.batch, HEADS, c.sequence, DIM], "float16") for name in ("q16", "k16"))

    def body(emit: Any, *_: Any) -> Any:
        wide = [emit(op.astype(x, "float32")) for x in (q, k)]
        scores = emit(op.matmul(wide[0], emit(op.permute_dims(wide[1], [0, 1, 3, 2]))))
        scores = emit(op.add(scores, emit(op.where(causal(emit, c), f32(0.0), f32(MIN)))))
        mixed = emit(op.matmul(emit(op.nn.softmax(scores, axis=-1)), c.v))
        rows = emit(
            op.reshape(emit(op.permute_dims(mixed, [0, 2, 1, 3])), [c.batch, c.sequence, HEADS * DIM])
        )
        return emit(op.matmul(rows, relax.const(np.eye(HEADS * DIM, 4, dtype=np.float32))))

    module, names = module_of([*c.params, q, k], body)
    result = RecognizeAttention(c.roles, names).run(module)
    (marker,) = (v for v in Graph(result.module["main"]).definitions.values() if op_name(v) == ATTENTION)
    assert {str(x.ty.dtype.dtype) for x in marker.args[1:4]} == {"float16"}
    inputs = [*arrays(Attention(kv_heads=HEADS)), *(floats(2, HEADS, 11, DIM, seed=s) for s in (8, 9))]
    inputs[-2:] = (x.astype(np.float16) for x in inputs[-2:])
    expected, got = run(module, *inputs), run_markers(result.module, result.facts, *inputs)
    assert got[0].dtype == expected[0].dtype == np.float32
    np.testing.assert_allclose(got[0], expected[0], rtol=0, atol=4e-3)  # values and results in float16


def test_the_marker_takes_new_keys_and_values_only() -> None:
    attention = Attention(past=True)
    module, *_ = attention.build()
    result = attention.recognize()
    graph = Graph(result.module["main"])
    (marker,) = (v for v in graph.order if op_name(graph.definitions[v]) == ATTENTION)
    assert [a.name for a in graph.definitions[marker].args[1:4]] == ["q", "k", "v"]
    inputs = arrays(attention, length=5, past=6)
    past_k, past_v, q, k, v = inputs[3:]
    k, v = (np.concatenate(pair, axis=2) for pair in ((past_k, k), (past_v, v)))
    expected = run(module, *inputs)[0]
    np.testing.assert_allclose(attend(q, k, v, result.facts[0]), expected, rtol=0, atol=TOLERANCE)


def test_layers_are_numbered_in_order_and_only_the_logits_are_returned() -> None:
    c = Context(past=False)
    attention = Attention()

    def body(emit: Any, *_: Any) -> Any:
        first, second = attention.layer(emit, c), attention.layer(emit, c)
        present = emit(op.concat([c.k, c.v], axis=2))
        return [emit(op.add(first, second)), present]

    module, names = module_of(c.params, body)
    result = RecognizeAttention(c.roles, names).run(module)
    assert [s.index for s in result.facts] == [0, 1]
    assert ops(result.module)[ATTENTION] == 2
    assert ops(result.module)["concat"] == 0
    assert not isinstance(result.module["main"].ret_ty, relax.TupleType)


def returned(c: Context, presents: Any) -> Any:
    """The pass's result for one layer that also returns `presents(emit, k, v)` of its keys and values."""

    def body(emit: Any, *_: Any) -> Any:
        extended = {}

        def extend(emit: Any, c: Context, which: int, new: Any) -> Any:
            extended[which] = emit(op.concat([c.past[which], new], axis=2))
            return extended[which]

        logits = Attention(past=True, extend=extend).layer(emit, c)
        return [logits, *presents(emit, extended[0], extended[1])]

    module, names = module_of(c.params, body)
    return RecognizeAttention(c.roles, names).run(module)


def test_presents_are_what_attention_reads() -> None:
    assert returned(Context(past=True), lambda e, k, v: [k, v]).sites == 1
    assert returned(Context(past=True), lambda e, k, v: [k]).sites == 1  # not as many as pasts: other outputs


@pytest.mark.parametrize(
    "presents",
    [lambda e, k, v: [v, k], lambda e, k, v: [k, e(op.multiply(v, f32(2.0)))], lambda e, k, v: [k, k]],
    ids=["exchanged", "doubled", "twice the same"],
)
def test_other_presents_are_refused(presents: Any) -> None:
    with pytest.raises(
        UnsupportedModel, match=r"in the place of the past 'past_.' is not what attention reads"
    ):
        returned(Context(past=True), presents)


def test_layers_have_a_past_each() -> None:
    c = Context(past=True)
    attention = Attention(past=True)

    def body(emit: Any, *_: Any) -> Any:
        return emit(op.add(attention.layer(emit, c), attention.layer(emit, c)))

    module, names = module_of(c.params, body)
    with pytest.raises(UnsupportedModel, match="read the same past; pages keep each one's own"):
        RecognizeAttention(c.roles, names).run(module)


def test_queries_rotated_by_halves_are_reported() -> None:
    def scores(emit: Any, c: Context, q: Any, k: Any) -> Any:
        low = emit(op.strided_slice(q, [3], [0], [DIM // 2]))
        high = emit(op.strided_slice(q, [3], [DIM // 2], [DIM]))
        turned = emit(op.concat([emit(op.negative(high)), low], axis=-1))
        q = emit(op.add(emit(op.multiply(q, f32(0.8))), emit(op.multiply(turned, f32(0.6)))))
        return scores_divided(emit, c, q, k)

    attention = Attention(scores=scores)
    result = attention.recognize()
    assert result.facts[0].rope == "rotate_half"
    inputs = arrays(attention)
    expected = run(attention.build()[0], *inputs)[0]
    got = run_markers(result.module, result.facts, *inputs)[0]
    np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCE)


def test_keys_may_come_as_tokens_before_heads() -> None:
    """[b, s, g * d] split and transposed, as every exporter writes it."""
    c = Context(past=False, kv_heads=HEADS)
    flat = param("flat", [c.batch, c.sequence, HEADS * DIM])
    attention = Attention(kv_heads=HEADS)

    def body(emit: Any, *_: Any) -> Any:
        split = emit(op.permute_dims(emit(op.reshape(flat, [c.batch, c.sequence, HEADS, DIM])), [0, 2, 1, 3]))
        scores = emit(op.matmul(c.q, emit(op.permute_dims(split, [0, 1, 3, 2]))))
        scores = attention.apply(emit, c, scores, causal(emit, c))
        return attention.finish(emit, c, emit(op.matmul(attention.softmax(emit, c, scores), c.v)))

    module, names = module_of([*c.params, flat], body)
    assert ops(RecognizeAttention(c.roles, names).run(module).module)[ATTENTION] == 1


def test_heads_repeated_in_turn_are_heads_of_their_own() -> None:
    """Head h reads KV head h % 2, which no group of neighbours shares: the repeated keys are what is kept."""
    attention = Attention(repeat=heads_in_turn)
    result = attention.recognize()
    assert result.facts[0].kv_heads == HEADS
    inputs = arrays(attention)
    expected = run(attention.build()[0], *inputs)[0]
    got = run_markers(result.module, result.facts, *inputs)[0]
    np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCE)
