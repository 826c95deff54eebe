"""Which keys a query sees: causal masks and windows in many spellings, proved, and near misses, refused."""

from __future__ import annotations

import numpy as np
import pytest
from attention_graphs import MIN, Attention, Context, causal, f32, i64
from mask_graphs import (
    TABLE,
    TRIANGLE,
    Emit,
    Mask,
    W,
    add,
    blocks,
    check_numbers,
    constant,
    drop,
    far,
    ones,
    positions,
    table,
    twice,
)
from tvm import relax
from tvm.relax import op

from kvc_passes.errors import UnsupportedModel

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

ACCEPTED = {f"causal: {n}": (a, None) for n, a in CAUSAL.items()}
ACCEPTED |= {f"window: {n}": pair for n, pair in WINDOW.items()}


@pytest.mark.parametrize(("attention", "window"), ACCEPTED.values(), ids=ACCEPTED)
def test_a_spelling_is_proved_and_computes_what_was_proved(attention: Attention, window: int | None) -> None:
    (site,) = attention.recognize().facts
    assert (site.mask.kind, site.mask.window) == ("causal" if window is None else "window", window)
    assert site.mask.proof.startswith("SMT: for all query, key, past")
    check_numbers(attention, site)


def fixed_blocks(emit: Emit, c: Context) -> Mask:
    """Blocks of tokens that see only themselves, from a constant table."""
    block = np.kron(np.eye(TABLE // 4), np.ones((4, 4))).astype(bool)
    return table(emit, c, block & TRIANGLE)


def broken_table(emit: Emit, c: Context) -> Mask:
    array = TRIANGLE.copy()
    array[TABLE - 1, 5] = False
    return table(emit, c, array)


def counted(emit: Emit, c: Context) -> Mask:
    """Queries stand where the attention mask's sum says, which is not where they stand."""
    count = emit(op.cumsum(c.padding, axis=1))
    return emit(op.less_equal(c.key(emit), emit(op.reshape(count, [c.batch, 1, c.total, 1]))))


def from_data(emit: Emit, c: Context) -> Mask:
    """A window as wide as the first token's id."""
    width = emit(op.reshape(emit(op.max(c.tokens, axis=1)), [c.batch, 1, 1, 1]))
    near = emit(op.greater(c.key(emit), emit(op.subtract(c.query(emit), width))))
    return emit(op.logical_and(causal(emit, c), near))


REFUSED = {
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
    "the attention mask's sum": (Attention(counted), "lets the token at position 0 see the later key 1"),
    "the tokens": (Attention(from_data), "found add"),
}


@pytest.mark.parametrize(("attention", "reason"), REFUSED.values(), ids=REFUSED)
def test_a_near_miss_is_refused_with_the_node_and_the_reason(attention: Attention, reason: str) -> None:
    with pytest.raises(
        UnsupportedModel, match=rf"attention at node '/layers.0/Softmax' \(softmax\): .*{reason}"
    ):
        attention.recognize()
