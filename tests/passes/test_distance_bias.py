"""A learned bias by the bucket of the distance: read as a table by distance, or refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from attention_graphs import HEADS, MIN, Attention, Context, causal, f32, i64
from mask_graphs import Emit, Mask, alibi, alibi_and_causal, check_numbers, constant
from tvm import relax
from tvm.relax import op

from kvc_passes.errors import UnsupportedModel
from kvc_passes.facts import ModelFacts, facts_from_json, to_json

BUCKETS, EXACT, FARTHEST = 32, 16, 128
TABLE = np.random.default_rng(0).normal(0, 0.5, (BUCKETS, HEADS)).astype(np.float32)


def f16(value: float) -> Any:
    return relax.const(np.float16(value))


def distance(emit: Emit, c: Context) -> Any:
    """q - k, and 0 where that is below."""
    relative = emit(op.subtract(c.key(emit), c.query(emit)))
    return emit(op.negative(emit(op.minimum(relative, i64(0)))))


def far_bucket(emit: Emit, d: Any, farthest: float = FARTHEST, last: int = BUCKETS - 1) -> Any:
    """EXACT + log(d / EXACT) / log(farthest / EXACT) * EXACT, at most `last`."""
    ratio = emit(op.divide(emit(op.astype(d, "float32")), f32(EXACT)))
    share = emit(op.divide(emit(op.log(ratio)), f32(np.log(farthest / EXACT))))
    steps = emit(op.astype(emit(op.multiply(share, f32(EXACT))), "int64"))
    return emit(op.minimum(emit(op.add(steps, i64(EXACT))), i64(last)))


def bucket(emit: Emit, d: Any, **options: Any) -> Any:
    return emit(op.where(emit(op.less(d, i64(EXACT))), d, far_bucket(emit, d, **options)))


def looked_up(emit: Emit, buckets: Any) -> Mask:
    """[1,h,s,t] of buckets [s,t]."""
    found = emit(op.take(constant(TABLE), buckets, axis=0, mode="wrap"))
    return emit(op.expand_dims(emit(op.permute_dims(found, [2, 0, 1])), [0]))


def t5(emit: Emit, c: Context) -> Mask:
    return looked_up(emit, bucket(emit, distance(emit, c)))


def expected(distances: int) -> np.ndarray:
    """The table by distance, as T5 has it, in float64."""
    d = np.arange(distances)
    large = EXACT + np.log(np.maximum(d, 1) / EXACT) / np.log(FARTHEST / EXACT) * EXACT
    return TABLE[np.where(d < EXACT, d, np.minimum(large.astype(int), BUCKETS - 1))].T


def in_mask(emit: Emit, c: Context, scores: Any, mask: Mask) -> Any:
    """The bias and the mask in one, as exporters write it."""
    hidden = emit(op.where(causal(emit, c), f32(0.0), f32(MIN)))
    return emit(op.add(scores, emit(op.add(mask, hidden))))


@pytest.mark.parametrize("past", [False, True], ids=["", "past"])
@pytest.mark.parametrize("apply", [alibi_and_causal, in_mask])
def test_the_bias_by_distance(apply: Any, past: bool) -> None:
    attention = Attention(t5, past=past, apply=apply)
    (site,) = attention.recognize().facts
    assert (site.mask.kind, site.slopes) == ("causal", None)
    # The last bucket begins at 16 * 8 ** (15 / 16) = 112.6.
    assert np.shape(site.bias) == (HEADS, 114)
    np.testing.assert_array_equal(site.bias, expected(114))
    np.testing.assert_array_equal(expected(5000)[:, 113:], np.repeat(expected(114)[:, -1:], 4887, 1))
    check_numbers(attention, site)


def test_with_slopes_and_few_buckets() -> None:
    """ALiBi's bias on top of a table that is read at min(q - k, 4)."""

    def both(emit: Emit, c: Context) -> Mask:
        near = emit(op.minimum(distance(emit, c), i64(4)))
        return emit(op.add(looked_up(emit, near), alibi(emit, c)))

    attention = Attention(both, apply=in_mask)
    (site,) = attention.recognize().facts
    assert site.slopes == (1.0,) * HEADS
    np.testing.assert_array_equal(site.bias, TABLE[:5].T)
    check_numbers(attention, site)


def by_bool(emit: Emit, c: Context) -> Mask:
    """Whether the key is before the query, as a bucket and a condition."""
    relative = emit(op.minimum(emit(op.subtract(c.key(emit), c.query(emit))), i64(0)))
    before = emit(op.astype(relative, "bool"))
    return looked_up(emit, emit(op.where(before, i64(1), i64(0))))


def test_a_condition_of_the_distance() -> None:
    attention = Attention(by_bool, apply=in_mask)
    (site,) = attention.recognize().facts
    np.testing.assert_array_equal(site.bias, TABLE[:2].T)
    check_numbers(attention, site)


def of_query(emit: Emit, c: Context) -> Mask:
    query = emit(op.broadcast_to(emit(op.minimum(c.query(emit), i64(9))), [c.sequence, c.total]))
    return looked_up(emit, query)


def of_sum(emit: Emit, c: Context) -> Mask:
    return looked_up(emit, emit(op.minimum(emit(op.add(c.key(emit), c.query(emit))), i64(9))))


def of_everything(emit: Emit, c: Context) -> Mask:
    """The bucket grows without end."""
    return looked_up(emit, bucket(emit, distance(emit, c), last=1 << 40))


def on_the_edge(emit: Emit, c: Context) -> Mask:
    """log(64 / 16) / log(64 / 16) * 16 is 16 or, rounded, 15: distance 64 may be in either bucket."""
    return looked_up(emit, bucket(emit, distance(emit, c), farthest=64, last=BUCKETS + 8))


def outside(emit: Emit, c: Context) -> Mask:
    return looked_up(emit, emit(op.minimum(distance(emit, c), i64(BUCKETS))))


def scaled(emit: Emit, c: Context) -> Mask:
    return emit(op.multiply(t5(emit, c), f32(2.0)))


def of_padding(emit: Emit, c: Context) -> Mask:
    """Of the number of real tokens between the two, as it were."""
    key = emit(op.cumsum(c.padding, axis=1))
    row = emit(op.reshape(emit(op.strided_slice(key, [0], [0], [1], assume_inbound=True)), [1, c.total]))
    near = emit(op.minimum(emit(op.multiply(row, c.key(emit))), i64(4)))
    return looked_up(emit, emit(op.broadcast_to(near, [c.sequence, c.total])))


def narrow(dtype: str, *, before: bool = False) -> Any:
    """min(q - k, 9), which `dtype` holds, of a distance that it does not hold; or the distance itself."""

    def mask(emit: Emit, c: Context) -> Mask:
        d = distance(emit, c) if not before else emit(op.subtract(c.query(emit), c.key(emit)))
        cut = emit(op.astype(emit(op.astype(d, dtype)), "int64"))
        return looked_up(emit, emit(op.minimum(emit(op.abs(cut)), i64(9))))

    return mask


def in_half_precision(emit: Emit, c: Context) -> Mask:
    """With 16 exact buckets and farthest=100, float16 has another bucket at distance 40."""
    d = distance(emit, c)
    ratio = emit(op.divide(emit(op.astype(d, "float16")), f16(EXACT)))
    share = emit(op.divide(emit(op.log(ratio)), f16(np.log(100 / EXACT))))
    steps = emit(op.astype(emit(op.multiply(share, f16(EXACT))), "int64"))
    far = emit(op.minimum(emit(op.add(steps, i64(EXACT))), i64(BUCKETS - 1)))
    return looked_up(emit, emit(op.where(emit(op.less(d, i64(EXACT))), d, far)))


def past_its_type(emit: Emit, c: Context) -> Mask:
    """2^22 times the distance, in int32: negative again from distance 512 on."""
    d = emit(op.astype(emit(op.multiply(distance(emit, c), i64(1 << 22))), "int32"))
    cut = emit(op.astype(emit(op.minimum(d, relax.const(9, "int32"))), "int64"))
    return looked_up(emit, emit(op.maximum(cut, i64(0))))


def truncated_table(emit: Emit, c: Context) -> Mask:
    whole = emit(op.astype(emit(op.astype(constant(TABLE), "int32")), "float32"))
    near = emit(op.minimum(distance(emit, c), i64(9)))
    found = emit(op.take(whole, near, axis=0, mode="wrap"))
    return emit(op.expand_dims(emit(op.permute_dims(found, [2, 0, 1])), [0]))


REFUSED = {
    "a distance that wraps in int8": (narrow("int8"), "int8"),
    "a difference that wraps in int8": (narrow("int8", before=True), "int8"),
    "a distance of float16": (narrow("float16"), "float16"),
    "a distance in int32 that wraps": (past_its_type, "never ends"),
    "a bucket that float16 has elsewhere": (in_half_precision, "float16"),
    "a table without its fractions": (truncated_table, ""),
    "of the query": (of_query, "depends on more than the distance"),
    "of query plus key": (of_sum, "depends on more than the distance"),
    "of the tokens between": (of_padding, "depends on more than the distance"),
    "a bucket that grows for ever": (of_everything, "never ends"),
    "a bucket that rounding decides": (on_the_edge, "not the same in any rounding"),
    "a row that is not there": (outside, "outside its table"),
    "not added once": (scaled, "adds a learned bias, but not once"),
}


@pytest.mark.parametrize(("mask", "reason"), REFUSED.values(), ids=REFUSED)
def test_a_near_miss_is_refused(mask: Any, reason: str) -> None:
    with pytest.raises(UnsupportedModel, match=rf"attention at node '/layers.0/Softmax' .*{reason}"):
        Attention(mask, apply=in_mask).recognize()


def test_a_site_with_a_bias_is_read_back() -> None:
    (found,) = Attention(t5, apply=in_mask).recognize().facts
    facts = ModelFacts("m", 9, 9, None, (found,), ("p",), {}, 1)
    assert facts_from_json(to_json(facts)) == facts
