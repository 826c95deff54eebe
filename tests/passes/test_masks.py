"""Which keys a query sees: masks in many spellings, proved, and near misses, refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from attention_graphs import HEADS, MIN, Attention, Context, arrays, causal, f32, i64
from tvm import relax
from tvm.relax import op

from kvc_passes.errors import UnsupportedModel
from support import attend, run

W = 4
TABLE = 64  # rows of a constant mask table
TOLERANCE = 2e-6  # see test_recognize_attention

Emit, Mask = Any, Any


def constant(array: np.ndarray) -> relax.Expr:
    return relax.const(array, str(array.dtype))


def ones(emit: Emit, c: Context, dtype: str = "bool") -> Mask:
    one = relax.const(1, dtype) if dtype != "bool" else relax.const(True, "bool")
    return emit(op.full([c.sequence, c.total], one, dtype))


def far(emit: Emit, c: Context, window: int = W) -> Mask:
    """Keys that lie behind the window."""
    return emit(op.less_equal(c.key(emit), emit(op.subtract(c.query(emit), i64(window)))))


def table(emit: Emit, c: Context, array: np.ndarray) -> Mask:
    """The rows of the queries and the columns of the keys of a constant [1, 1, TABLE, TABLE]."""
    values = constant(array.reshape(1, 1, TABLE, TABLE))
    return emit(op.strided_slice(values, [2, 3], [c.start, 0], [c.total, c.total], assume_inbound=True))


def positions(emit: Emit, c: Context) -> Mask:
    """The position_ids as [b, 1, s, 1]."""
    return emit(op.reshape(c.positions, [c.batch, 1, c.sequence, 1]))


def drop(emit: Emit, c: Context, scores: Any, mask: Mask) -> Any:
    """Adds MIN where a mask is true."""
    return emit(op.add(scores, emit(op.where(mask, f32(MIN), f32(0.0)))))


def add(emit: Emit, c: Context, scores: Any, mask: Mask) -> Any:
    """Adds a mask that is already a number."""
    return emit(op.add(scores, mask))


def twice(emit: Emit, c: Context, scores: Any, mask: Mask) -> Any:
    """Two additive masks, one after the other."""
    causal_, far_ = (emit(op.where(m, f32(v), f32(w))) for m, v, w in mask)
    return emit(op.add(emit(op.add(scores, causal_)), far_))


TRIANGLE = np.tril(np.ones((TABLE, TABLE), bool))

CAUSAL = {
    "key <= query": Attention(causal),
    "key <= query, past": Attention(causal, past=True),
    "not key > query": Attention(
        lambda e, c: e(op.logical_not(e(op.greater(c.key(e), c.query(e))))), past=True
    ),
    "key > query is hidden": Attention(lambda e, c: e(op.greater(c.key(e), c.query(e))), apply=drop),
    "key < query + 1": Attention(lambda e, c: e(op.less(c.key(e), e(op.add(c.query(e), i64(1))))), past=True),
    "query - key >= 0": Attention(
        lambda e, c: e(op.greater_equal(e(op.subtract(c.query(e), c.key(e))), i64(0))), past=True
    ),
    "tril of ones": Attention(lambda e, c: e(op.tril(ones(e, c)))),
    "tril of integers": Attention(lambda e, c: e(op.not_equal(e(op.tril(ones(e, c, "int64"))), i64(0)))),
    "triu of -inf": Attention(
        lambda e, c: e(op.triu(e(op.full([c.sequence, c.total], f32(MIN), "float32")), 1)), apply=add
    ),
    "tril with the past as diagonal": Attention(lambda e, c: e(op.tril(ones(e, c), c.start)), past=True),
    "a slice of a constant table": Attention(lambda e, c: table(e, c, TRIANGLE)),
    "a slice of a constant table, past": Attention(lambda e, c: table(e, c, TRIANGLE), past=True),
    "a slice of an additive table": Attention(
        lambda e, c: table(e, c, np.where(TRIANGLE, 0, MIN).astype(np.float32)), apply=add
    ),
    "rows taken from a table": Attention(
        lambda e, c: e(
            op.strided_slice(
                e(op.take(constant(TRIANGLE), e(op.reshape(c.query(e), [c.sequence])), axis=0)),
                [1],
                [0],
                [c.total],
                assume_inbound=True,
            )
        )
    ),
    "position_ids": Attention(lambda e, c: e(op.less_equal(c.key(e), positions(e, c))), past=True),
    "and the padding": Attention(
        lambda e, c: e(
            op.logical_and(
                causal(e, c),
                e(op.reshape(e(op.astype(c.padding, "bool")), [c.batch, 1, 1, c.total])),
            )
        ),
        past=True,
    ),
    "and the padding, gathered": Attention(
        lambda e, c: e(
            op.logical_and(
                causal(e, c),
                e(
                    op.reshape(
                        e(
                            op.take(
                                e(op.not_equal(c.padding, i64(0))), e(op.arange(0, c.total, 1, "int64")), 1
                            )
                        ),
                        [c.batch, 1, 1, c.total],
                    )
                ),
            )
        ),
        past=True,
    ),
    "(1 - mask) * MIN": Attention(
        lambda e, c: e(
            op.multiply(e(op.subtract(f32(1.0), e(op.astype(causal(e, c), "float32")))), f32(MIN))
        ),
        past=True,
        apply=add,
    ),
    "a choice compared with one": Attention(
        lambda e, c: e(op.equal(e(op.where(causal(e, c), i64(1), i64(0))), i64(1))), past=True
    ),
    "broadcast to batch and heads": Attention(
        lambda e, c: e(
            op.broadcast_to(
                e(op.expand_dims(e(op.expand_dims(causal(e, c), 0)), 0)), [c.batch, 4, c.sequence, c.total]
            )
        ),
        past=True,
    ),
    "or with nothing": Attention(
        lambda e, c: e(op.logical_or(causal(e, c), e(op.less(c.key(e), i64(0))))), past=True
    ),
    "one past counted in two": Attention(
        lambda e, c: e(
            op.less_equal(
                c.key(e),
                e(
                    op.add(
                        e(op.expand_dims(e(op.arange(0, c.sequence, 1, "int64")), 1)),
                        e(op.shape_to_tensor(relax.ShapeExpr([c.start]))),
                    )
                ),
            )
        ),
        past=True,
    ),
}

WINDOW = {
    "and key > query - W": (
        Attention(lambda e, c: e(op.logical_and(causal(e, c), e(op.logical_not(far(e, c))))), past=True),
        W,
    ),
    "bitwise and": (
        Attention(lambda e, c: e(op.bitwise_and(causal(e, c), e(op.bitwise_not(far(e, c))))), past=True),
        W,
    ),
    "query - key < W": (
        Attention(
            lambda e, c: e(
                op.logical_and(causal(e, c), e(op.less(e(op.subtract(c.query(e), c.key(e))), i64(W))))
            ),
            past=True,
        ),
        W,
    ),
    "not (later or far)": (
        Attention(
            lambda e, c: e(op.logical_or(e(op.greater(c.key(e), c.query(e))), far(e, c))),
            past=True,
            apply=drop,
        ),
        W,
    ),
    "inclusive": (
        Attention(
            lambda e, c: e(
                op.logical_and(causal(e, c), e(op.less_equal(e(op.subtract(c.query(e), c.key(e))), i64(W))))
            ),
            past=True,
        ),
        W + 1,
    ),
    "two triangles": (
        Attention(
            lambda e, c: e(
                op.logical_and(e(op.tril(ones(e, c))), e(op.logical_not(e(op.tril(ones(e, c), -W)))))
            )
        ),
        W,
    ),
    "tril and triu": (
        Attention(lambda e, c: e(op.triu(e(op.tril(ones(e, c))), 1 - W))),
        W,
    ),
    "two additive masks": (
        Attention(lambda e, c: ((causal(e, c), 0.0, -np.inf), (far(e, c), MIN, 0.0)), past=True, apply=twice),
        W,
    ),
    "position_ids": (
        Attention(
            lambda e, c: e(
                op.logical_and(
                    e(op.less_equal(c.key(e), positions(e, c))),
                    e(op.greater(c.key(e), e(op.subtract(positions(e, c), i64(W))))),
                )
            ),
            past=True,
        ),
        W,
    ),
    "wider than any probe": (
        Attention(
            lambda e, c: e(op.logical_and(causal(e, c), e(op.logical_not(far(e, c, 131072))))), past=True
        ),
        131072,
    ),
}


def blocks(emit: Emit, c: Context, size: int = W) -> Mask:
    """Blocks of tokens that see only themselves."""
    query = emit(op.floor_divide(c.query(emit), i64(size)))
    return emit(op.equal(query, emit(op.floor_divide(c.key(emit), i64(size)))))


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


def check_numbers(attention: Attention, site: Any) -> None:
    """The graph computes what the facts of its attention promise."""
    past = 7 if attention.past else 0
    inputs = arrays(attention, past=past)
    (expected,) = run(attention.build()[0], *inputs)
    q, k, v = inputs[-3:]
    if past:
        k, v = (np.concatenate(pair, axis=2) for pair in zip(inputs[3:5], (k, v)))
    np.testing.assert_allclose(attend(q, k, v, site), expected, rtol=0, atol=TOLERANCE)


def alibi(emit: Emit, c: Context) -> Mask:
    distance = emit(op.subtract(c.key(emit), c.query(emit)))
    return emit(op.astype(distance, "float32"))


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


def alibi_and_causal(emit: Emit, c: Context, scores: Any, mask: Mask) -> Any:
    """A bias, then a mask."""
    hidden = emit(op.where(causal(emit, c), f32(0.0), f32(MIN)))
    return emit(op.add(emit(op.add(scores, mask)), hidden))


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


ACCEPTED = {f"causal: {n}": (a, None) for n, a in CAUSAL.items()}
ACCEPTED |= {f"window: {n}": pair for n, pair in WINDOW.items()}


@pytest.mark.parametrize(("attention", "window"), ACCEPTED.values(), ids=ACCEPTED)
def test_a_spelling_is_proved_and_computes_what_was_proved(attention: Attention, window: int | None) -> None:
    (site,) = attention.recognize().facts
    assert (site.mask.kind, site.mask.window) == ("causal" if window is None else "window", window)
    assert site.mask.proof.startswith("SMT: for all query, key, past")
    check_numbers(attention, site)


def by_head(emit: Emit, c: Context) -> Mask:
    """Causal for the first head alone; the others see everything."""
    head = emit(op.reshape(emit(op.arange(0, 4, 1, "int64")), [1, 4, 1, 1]))
    return emit(op.logical_or(causal(emit, c), emit(op.greater(head, i64(0)))))


def by_request(emit: Emit, c: Context) -> Mask:
    """Causal for the first request alone."""
    row = emit(op.reshape(emit(op.arange(0, c.batch, 1, "int64")), [c.batch, 1, 1, 1]))
    return emit(op.logical_or(causal(emit, c), emit(op.greater(row, i64(0)))))


def fixed_blocks(emit: Emit, c: Context) -> Mask:
    """The same, from a constant table."""
    block = np.kron(np.eye(TABLE // 4), np.ones((4, 4))).astype(bool)
    return table(emit, c, block & TRIANGLE)


def broken_table(emit: Emit, c: Context) -> Mask:
    array = TRIANGLE.copy()
    array[TABLE - 1, 5] = False
    return table(emit, c, array)


def squared(emit: Emit, c: Context) -> Mask:
    distance = alibi(emit, c)
    return emit(op.multiply(distance, emit(op.multiply(distance, f32(0.5)))))


def either_way(emit: Emit, c: Context) -> Mask:
    """The nearest eight keys get more, those behind them less."""
    near = emit(op.greater(c.key(emit), emit(op.subtract(c.query(emit), i64(8)))))
    return emit(op.where(near, f32(0.5), f32(-0.5)))


def counted(emit: Emit, c: Context) -> Mask:
    """Queries stand where the attention mask's sum says, which is not where they stand."""
    count = emit(op.cumsum(c.padding, axis=1))
    return emit(op.less_equal(c.key(emit), emit(op.reshape(count, [c.batch, 1, c.total, 1]))))


def from_data(emit: Emit, c: Context) -> Mask:
    """A window as wide as the first token's id."""
    width = emit(op.reshape(emit(op.max(c.tokens, axis=1)), [c.batch, 1, 1, 1]))
    near = emit(op.greater(c.key(emit), emit(op.subtract(c.query(emit), width))))
    return emit(op.logical_and(causal(emit, c), near))


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
    "off by one: without itself": (
        Attention(lambda e, c: e(op.less(c.key(e), c.query(e))), past=True),
        "not proved to show a token itself",
    ),
    "off by one: with the next": (
        Attention(lambda e, c: e(op.less_equal(c.key(e), e(op.add(c.query(e), i64(1))))), past=True),
        "lets the token at position 0 see the later key 1",
    ),
    "past forgotten": (
        Attention(lambda e, c: e(op.tril(ones(e, c))), past=True),
        "not proved to show a token itself",
    ),
    "table read from its first row": (
        Attention(
            lambda e, c: e(
                op.strided_slice(
                    constant(TRIANGLE), [0, 1], [0, 0], [c.sequence, c.total], assume_inbound=True
                )
            ),
            past=True,
        ),
        "not proved to show a token itself",
    ),
    "reversed": (
        Attention(lambda e, c: e(op.greater_equal(c.key(e), c.query(e)))),
        "lets the token at position 0 see the later key 1",
    ),
    "window in both directions": (
        Attention(
            lambda e, c: e(
                op.logical_and(
                    e(op.less(e(op.subtract(c.query(e), c.key(e))), i64(W))),
                    e(op.less(e(op.subtract(c.key(e), c.query(e))), i64(W))),
                )
            )
        ),
        "lets the token at position 0 see the later key 1; its predicate is",
    ),
    "prefix seen by all": (
        Attention(lambda e, c: e(op.logical_or(causal(e, c), e(op.less(c.key(e), i64(3)))))),
        "is a prefix mask: all tokens see the first 3",
    ),
    "window from the start of the call": (
        Attention(lambda e, c: e(op.logical_and(causal(e, c), e(op.greater(c.key(e), i64(W))))), past=True),
        "not proved to show a token itself",
    ),
    "bidirectional": (
        Attention(lambda e, c: e(op.greater_equal(c.key(e), i64(0)))),
        "the attention is bidirectional",
    ),
    "padding alone": (
        Attention(lambda e, c: e(op.reshape(e(op.astype(c.padding, "bool")), [c.batch, 1, 1, c.total]))),
        "the attention is bidirectional",
    ),
    "nothing": (
        Attention(lambda e, c: e(op.less(c.key(e), i64(0)))),
        "",
    ),
    "block-diagonal": (Attention(blocks), "lets the token at position 0 see the later key 1"),
    "block-diagonal table": (Attention(fixed_blocks), "neither uniform, nor triangular"),
    "a hole in the table": (Attention(broken_table), "neither uniform, nor triangular"),
    "a constant that hides little": (
        Attention(lambda e, c: e(op.where(causal(e, c), f32(0.0), f32(-1.0))), apply=add),
        "adds -1 to some scores and 0 to others",
    ),
    "a bias by distance": (Attention(alibi, apply=add), "the attention is bidirectional"),
    "a bias that is not linear": (Attention(squared, apply=alibi_and_causal), "depend on the position"),
    "a bias of the distance either way": (Attention(either_way, apply=alibi_and_causal), "some scores"),
    "the attention mask's sum": (Attention(counted), "lets the token at position 0 see the later key 1"),
    "the tokens": (Attention(from_data), "found add"),
    "another mask for every head": (Attention(by_head), "mask cannot be proved"),
    "another mask for every request": (Attention(by_request), "mask cannot be proved"),
}


@pytest.mark.parametrize(("attention", "reason"), REFUSED.values(), ids=REFUSED)
def test_a_near_miss_is_refused_with_the_node_and_the_reason(attention: Attention, reason: str) -> None:
    with pytest.raises(
        UnsupportedModel, match=rf"attention at node '/layers.0/Softmax' \(softmax\): .*{reason}"
    ):
        attention.recognize()
