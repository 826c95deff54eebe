"""Masks that the tests of several files are made of, and the check of what was proved of one."""

from __future__ import annotations

from typing import Any

import numpy as np
from attention_graphs import MIN, TOLERANCE, Attention, Context, arrays, causal, f32, i64
from tvm import relax
from tvm.relax import op

from support import attend, run

W = 4
TABLE = 64  # rows of a constant mask table
TRIANGLE = np.tril(np.ones((TABLE, TABLE), bool))
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


def blocks(emit: Emit, c: Context, size: int = W) -> Mask:
    """Blocks of tokens that see only themselves."""
    query = emit(op.floor_divide(c.query(emit), i64(size)))
    return emit(op.equal(query, emit(op.floor_divide(c.key(emit), i64(size)))))


def alibi(emit: Emit, c: Context) -> Mask:
    distance = emit(op.subtract(c.key(emit), c.query(emit)))
    return emit(op.astype(distance, "float32"))


def alibi_and_causal(emit: Emit, c: Context, scores: Any, mask: Mask) -> Any:
    """A bias, then a mask."""
    hidden = emit(op.where(causal(emit, c), f32(0.0), f32(MIN)))
    return emit(op.add(emit(op.add(scores, mask)), hidden))


def check_numbers(attention: Attention, site: Any) -> None:
    """The graph computes what the facts of its attention promise."""
    past = 7 if attention.past else 0
    inputs = arrays(attention, past=past)
    (expected,) = run(attention.build()[0], *inputs)
    q, k, v = inputs[-3:]
    if past:
        k, v = (np.concatenate(pair, axis=2) for pair in zip(inputs[3:5], (k, v)))
    np.testing.assert_allclose(attend(q, k, v, site), expected, rtol=0, atol=TOLERANCE)
