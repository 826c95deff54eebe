"""Other masks: chunks, first keys, predicates, heads with masks of their own, biases and learned scores."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from attention_graphs import HEADS, MIN, Attention, Context, causal, f32, i64
from mask_graphs import (
    Emit,
    Mask,
    W,
    add,
    alibi,
    alibi_and_causal,
    blocks,
    check_numbers,
    constant,
    far,
)
from tvm import relax
from tvm.relax import op

from kvc_passes.errors import UnsupportedModel


def sunk(emit: Emit, c: Context, sinks: int = 2) -> Mask:
    """A window, and the first keys."""
    near = emit(op.logical_not(far(emit, c)))
    first = emit(op.less(c.key(emit), i64(sinks)))
    return emit(op.logical_and(causal(emit, c), emit(op.logical_or(near, first))))


def divided(emit: Emit, c: Context) -> Mask:
    """Blocks, counted with an integer division."""
    query, key = (emit(op.divide(x, i64(W))) for x in (c.query(emit), c.key(emit)))
    return emit(op.logical_and(causal(emit, c), emit(op.equal(query, key))))


def every_other(emit: Emit, c: Context) -> Mask:
    distance = emit(op.subtract(c.query(emit), c.key(emit)))
    even = emit(op.equal(emit(op.floor_mod(distance, i64(2))), i64(0)))
    return emit(op.logical_and(causal(emit, c), even))


def by_head_window(emit: Emit, c: Context) -> Mask:
    """Head h sees h + 1 keys."""
    head = emit(op.reshape(emit(op.arange(0, 4, 1, "int64")), [1, 4, 1, 1]))
    near = emit(op.less_equal(emit(op.subtract(c.query(emit), c.key(emit))), head))
    return emit(op.logical_and(causal(emit, c), near))


def by_head_table(emit: Emit, c: Context, sizes: tuple[int, ...] = (2, 5, 8, 11)) -> Mask:
    """Head h sees sizes[h] keys, read from a table."""
    near = emit(
        op.less(emit(op.subtract(c.query(emit), c.key(emit))), constant(np.array(sizes).reshape(1, 4, 1, 1)))
    )
    return emit(op.logical_and(causal(emit, c), near))


OTHERS = {
    "a window for every head, of a table": (by_head_table, "predicate", None),
    "chunk": (lambda e, c: e(op.logical_and(causal(e, c), blocks(e, c))), "chunk", W),
    "chunk by integer division": (divided, "chunk", W),
    "sinks": (sunk, "sinks", W),
    "every other key": (every_other, "predicate", None),
    "a window for every head": (by_head_window, "predicate", None),
}


@pytest.mark.parametrize("past", [False, True], ids=["", "past"])
@pytest.mark.parametrize(("mask", "kind", "size"), OTHERS.values(), ids=OTHERS)
def test_other_masks_are_proved_or_kept_as_predicates(
    mask: Any, kind: str, size: int | None, past: bool
) -> None:
    attention = Attention(mask, past=past)
    (site,) = attention.recognize().facts
    assert site.mask.kind == kind
    assert {"chunk": site.mask.chunk, "sinks": site.mask.window, "predicate": None}[kind] == size
    assert site.mask.sinks == (2 if kind == "sinks" else None)
    check_numbers(attention, site)


def slopes(emit: Emit, c: Context) -> Mask:
    """A slope a head, times the distance."""
    table = constant(np.array([0.5, 0.25, 0.125, 0.0625], np.float32).reshape(1, 4, 1, 1))
    return emit(op.multiply(table, alibi(emit, c)))


def slopes_of_key(emit: Emit, c: Context) -> Mask:
    """The same for a softmax: a slope times the key's position, however many there are."""
    table = constant(np.array([0.5, 0.25, 0.125, 0.0625], np.float32).reshape(1, 4, 1, 1))
    position = emit(op.subtract(emit(op.cumsum(c.padding, axis=1)), i64(1)))
    position = emit(op.multiply(position, c.padding))
    position = emit(op.reshape(emit(op.astype(position, "float32")), [c.batch, 1, 1, c.total]))
    return emit(op.multiply(position, table))


def alibi_in_mask(emit: Emit, c: Context, scores: Any, mask: Mask) -> Any:
    """A bias and a mask in one."""
    hidden = emit(op.where(causal(emit, c), f32(0.0), f32(MIN)))
    return emit(op.add(scores, emit(op.add(mask, hidden))))


@pytest.mark.parametrize("past", [False, True], ids=["", "past"])
@pytest.mark.parametrize("apply", [alibi_and_causal, alibi_in_mask])
@pytest.mark.parametrize("mask", [alibi, slopes, slopes_of_key])
def test_a_bias_that_is_linear_in_the_key_becomes_slopes(mask: Any, apply: Any, past: bool) -> None:
    attention = Attention(mask, past=past, apply=apply)
    (site,) = attention.recognize().facts
    assert site.mask.kind == "causal"
    assert site.slopes == ((1.0,) * 4 if mask is alibi else (0.5, 0.25, 0.125, 0.0625))
    check_numbers(attention, site)


def column(emit: Emit, c: Context) -> Any:
    """A score a head, beside the keys' [b,h,s,1]."""
    table = relax.const(np.linspace(-1, 1, HEADS, dtype=np.float32).reshape(1, HEADS, 1, 1))
    return emit(op.broadcast_to(table, relax.ShapeExpr([c.batch, HEADS, c.sequence, 1])))


def with_sinks(change: Any) -> Attention:
    """A learned score beside the masked scores, and `change` made to something."""

    def apply(emit: Emit, c: Context, scores: Any, mask: Mask) -> Any:
        return change(emit, c, add(emit, c, scores, mask), column(emit, c))

    def weigh(emit: Emit, c: Context, weights: Any, v: Any) -> Any:
        kept = emit(op.strided_slice(weights, [3], [0], [c.total], assume_inbound=True))
        return emit(op.matmul(kept, v))

    hidden = lambda e, c: e(op.where(causal(e, c), f32(0.0), f32(MIN)))  # noqa: E731
    return Attention(hidden, apply=apply, weigh=weigh)


def beside(emit: Emit, c: Context, scores: Any, sinks: Any) -> Any:
    return emit(op.concat([scores, sinks], axis=3))


def largest_off(emit: Emit, x: Any) -> Any:
    return emit(op.subtract(x, emit(op.max(x, axis=[-1], keepdims=True))))


def largest_of_some_off(emit: Emit, x: Any) -> Any:
    """As the importer writes ReduceMax: -inf of rows in which all is -inf."""
    top = emit(op.max(x, axis=[-1], keepdims=True))
    finite = emit(op.astype(emit(op.not_equal(x, f32(-np.inf))), "int8"))
    some = emit(op.astype(emit(op.max(finite, axis=[-1], keepdims=True)), "bool"))
    return emit(op.subtract(x, emit(op.where(some, top, f32(-np.inf)))))


WITH_SINKS = {
    "and the largest of some taken off": with_sinks(
        lambda e, c, x, s: largest_of_some_off(e, beside(e, c, x, s))
    ),
    "beside": with_sinks(beside),
    "and the largest taken off": with_sinks(lambda e, c, x, s: largest_off(e, beside(e, c, x, s))),
}


@pytest.mark.parametrize("attention", WITH_SINKS.values(), ids=WITH_SINKS)
def test_learned_scores_are_read(attention: Attention) -> None:
    (site,) = attention.recognize().facts
    np.testing.assert_allclose(site.sinks, np.linspace(-1, 1, HEADS), rtol=1e-6)
    check_numbers(attention, site)


def by_head(emit: Emit, c: Context) -> Mask:
    """Causal for the first head alone; the others see everything."""
    head = emit(op.reshape(emit(op.arange(0, 4, 1, "int64")), [1, 4, 1, 1]))
    return emit(op.logical_or(causal(emit, c), emit(op.greater(head, i64(0)))))


def by_request(emit: Emit, c: Context) -> Mask:
    """Causal for the first request alone."""
    row = emit(op.reshape(emit(op.arange(0, c.batch, 1, "int64")), [c.batch, 1, 1, 1]))
    return emit(op.logical_or(causal(emit, c), emit(op.greater(row, i64(0)))))


def squared(emit: Emit, c: Context) -> Mask:
    distance = alibi(emit, c)
    return emit(op.multiply(distance, emit(op.multiply(distance, f32(0.5)))))


def either_way(emit: Emit, c: Context) -> Mask:
    """The nearest eight keys get more, those behind them less."""
    near = emit(op.greater(c.key(emit), emit(op.subtract(c.query(emit), i64(8)))))
    return emit(op.where(near, f32(0.5), f32(-0.5)))


def wearing_off(emit: Emit, c: Context) -> Mask:
    """Later keys are hidden by -1e4 + 100.5 * key: no more from position 100 on."""
    slope = emit(op.multiply(emit(op.astype(c.key(emit), "float32")), f32(100.5)))
    return emit(op.where(causal(emit, c), f32(0.0), emit(op.add(slope, f32(-1e4)))))


def low(emit: Emit, c: Context) -> Mask:
    return emit(op.where(causal(emit, c), f32(-9999.0), f32(-10000.0)))


def shifted_by_mean(emit: Emit, c: Context, scores: Any, mask: Mask) -> Any:
    """With -3.4e38 among the scores, the mean is so large that nothing is left of the others."""
    masked = add(emit, c, scores, emit(op.where(mask, f32(0.0), f32(MIN))))
    return emit(op.subtract(masked, emit(op.mean(masked, axis=[-1], keepdims=True))))


REFUSED = {
    "windows of a table that does not grow evenly": (
        Attention(lambda e, c: by_head_table(e, c, (2, 5, 8, 12))),
        "is another one for some heads",
    ),
    "a number that wears off": (
        Attention(wearing_off, apply=add),
        "hides keys by a number that depends on the position",
    ),
    "hidden keys hardly lower than shown ones": (Attention(low, apply=add), "adds -9999 to shown scores"),
    "the mean taken off": (Attention(apply=shifted_by_mean), "found subtract"),
    "the largest taken off, but not off the learned score": (
        with_sinks(lambda e, c, x, s: beside(e, c, largest_off(e, x), s)),
        "found subtract",
    ),
    "a constant added, but not to the learned score": (
        with_sinks(
            lambda e, c, x, s: beside(e, c, add(e, c, x, e(op.full([1, 1, 1, c.total], f32(2.0)))), s)
        ),
        "not to the learned score beside them",
    ),
    "a bias beside a learned score": (
        with_sinks(lambda e, c, x, s: beside(e, c, add(e, c, x, alibi(e, c)), s)),
        "not to the learned score beside them",
    ),
    "a learned score that a mask changes": (
        with_sinks(
            lambda e, c, x, s: add(e, c, beside(e, c, x, s), e(op.full([1, 1, 1, c.total + 1], f32(2.0))))
        ),
        "",
    ),
    "a bias by distance": (Attention(alibi, apply=add), "the attention is bidirectional"),
    "a bias that is not linear": (Attention(squared, apply=alibi_and_causal), "depend on the position"),
    "a bias of the distance either way": (Attention(either_way, apply=alibi_and_causal), "some scores"),
    "another mask for every head": (Attention(by_head), "mask cannot be proved"),
    "another mask for every request": (Attention(by_request), "mask cannot be proved"),
}


@pytest.mark.parametrize(("attention", "reason"), REFUSED.values(), ids=REFUSED)
def test_a_near_miss_is_refused_with_the_node_and_the_reason(attention: Attention, reason: str) -> None:
    with pytest.raises(
        UnsupportedModel, match=rf"attention at node '/layers.0/Softmax' \(softmax\): .*{reason}"
    ):
        attention.recognize()
