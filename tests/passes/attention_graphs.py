"""One attention in the spellings that exporters use; every part of it can be replaced."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import IRModule, relax
from tvm.relax import op

from kvc_passes.facts import Roles
from kvc_passes.nodes import NodeNames
from kvc_passes.recognize_attention import RecognizeAttention
from support import Draft, floats, module_of, param, symbol

MIN = float(np.finfo(np.float32).min)
HEADS, KV_HEADS, DIM = 4, 2, 8
TOLERANCE = 2e-6  # float32 against float64 sums of 8 products and a softmax over 11 keys, values of order 1


def f32(value: float) -> relax.Expr:
    return relax.const(value, "float32")


def i64(value: Any) -> relax.Expr:
    return relax.const(value, "int64")


class Context:
    """Inputs and symbols of the graph under construction."""

    def __init__(self, past: bool, kv_heads: int = KV_HEADS) -> None:
        self.batch, self.sequence = symbol("batch"), symbol("sequence")
        self.start: Any = symbol("past") if past else 0
        self.total: Any = self.start + self.sequence
        self.kv_heads, self.has_past = kv_heads, past
        self.tokens = param("input_ids", [self.batch, self.sequence], "int64")
        self.padding = param("attention_mask", [self.batch, self.total], "int64")
        self.positions = param("position_ids", [self.batch, self.sequence], "int64")
        self.q = param("q", [self.batch, HEADS, self.sequence, DIM])
        self.k, self.v = (param(n, [self.batch, kv_heads, self.sequence, DIM]) for n in "kv")
        shape = [self.batch, kv_heads, self.start, DIM]
        self.past = [param("past_k", shape), param("past_v", shape)] if past else []

    @property
    def params(self) -> list[relax.Var]:
        return [self.tokens, self.padding, self.positions, *self.past, self.q, self.k, self.v]

    @property
    def roles(self) -> Roles:
        return Roles("input_ids", "attention_mask", "position_ids", tuple(p.name for p in self.past))

    def query(self, emit: Draft) -> relax.Var:
        """Positions of the queries [s, 1]."""
        count = emit(op.arange(self.start, self.total, 1, "int64"))
        return emit(op.expand_dims(count, 1))

    def key(self, emit: Draft) -> relax.Var:
        """Positions of the keys [1, t]."""
        return emit(op.expand_dims(emit(op.arange(0, self.total, 1, "int64")), 0))


Hook = Callable[..., Any]


def causal(emit: Draft, c: Context) -> relax.Expr:
    return emit(op.less_equal(c.key(emit), c.query(emit)))


def _repeat(emit: Draft, c: Context, x: relax.Expr) -> relax.Expr:
    """Each KV head as often as query heads share it."""
    if c.kv_heads == HEADS:
        return x
    group, tokens, size = HEADS // c.kv_heads, x.ty.shape.values[2], x.ty.shape.values[3]
    wide = emit(op.broadcast_to(emit(op.expand_dims(x, 2)), [c.batch, c.kv_heads, group, tokens, size]))
    return emit(op.reshape(wide, [c.batch, HEADS, tokens, size]))


def _scores(emit: Draft, c: Context, q: relax.Expr, k: relax.Expr) -> relax.Expr:
    transposed = emit(op.permute_dims(k, [0, 1, 3, 2]))
    return emit(op.multiply(emit(op.matmul(q, transposed)), f32(0.25)))


def _apply(emit: Draft, c: Context, scores: relax.Expr, mask: relax.Expr) -> relax.Expr:
    return emit(op.add(scores, emit(op.where(mask, f32(0.0), f32(MIN)))))


def _weigh(emit: Draft, c: Context, weights: relax.Expr, v: relax.Expr) -> relax.Expr:
    return emit(op.matmul(weights, v))


def _finish(emit: Draft, c: Context, mixed: relax.Expr) -> relax.Expr:
    return emit(op.permute_dims(mixed, [0, 2, 1, 3]))


def _extend(emit: Draft, c: Context, which: int, new: relax.Expr) -> relax.Expr:
    return emit(op.concat([c.past[which], new], axis=2)) if c.has_past else new


@dataclass(frozen=True)
class Attention:
    """The parts of an attention; `mask` gives a condition that `apply` uses, None for no mask."""

    mask: Hook | None = causal
    past: bool = False
    kv_heads: int = KV_HEADS
    repeat: Hook = _repeat
    scores: Hook = _scores
    apply: Hook = _apply
    weigh: Hook = _weigh
    finish: Hook = _finish
    extend: Hook = _extend
    softmax: Hook = lambda emit, c, x: emit(op.nn.softmax(x, axis=-1), "/layers.0/Softmax")

    def layer(self, emit: Draft, c: Context) -> relax.Expr:
        k = self.repeat(emit, c, self.extend(emit, c, 0, c.k))
        v = self.repeat(emit, c, self.extend(emit, c, 1, c.v))
        scores = self.scores(emit, c, c.q, k)
        if self.mask is not None:
            scores = self.apply(emit, c, scores, self.mask(emit, c))
        return self.finish(emit, c, self.weigh(emit, c, self.softmax(emit, c, scores), v))

    def build(self) -> tuple[IRModule, Roles, NodeNames]:
        c = Context(self.past, self.kv_heads)
        module, names = module_of(c.params, lambda emit, *_: self.layer(emit, c))
        return module, c.roles, names

    def recognize(self) -> Any:
        """The pass's result."""
        module, roles, names = self.build()
        return RecognizeAttention(roles, names).run(module)


def scores_divided(emit: Any, c: Context, q: Any, k: Any) -> Any:
    """The scale as a divisor."""
    return emit(op.divide(emit(op.matmul(q, emit(op.permute_dims(k, [0, 1, 3, 2])))), f32(4.0)))


def heads_in_turn(emit: Any, c: Context, x: Any) -> Any:
    """The KV heads as a whole, twice: head h reads h % 2 and not h // 2."""
    tokens = x.ty.shape.values[2]
    wide = [c.batch, HEADS // KV_HEADS, KV_HEADS, tokens, DIM]
    return emit(
        op.reshape(emit(op.broadcast_to(emit(op.expand_dims(x, 1)), wide)), [c.batch, HEADS, tokens, DIM])
    )


def arrays(attention: Attention, batch: int = 2, length: int = 11, past: int = 0) -> list[np.ndarray]:
    """Inputs for the module, in parameter order."""
    g = attention.kv_heads
    shapes = [(batch, HEADS, length, DIM), (batch, g, length, DIM), (batch, g, length, DIM)]
    if attention.past:
        shapes = [(batch, g, past, DIM), (batch, g, past, DIM), *shapes]
    integers = [
        np.zeros((batch, length), np.int64),
        np.ones((batch, past + length), np.int64),
        np.tile(np.arange(past, past + length), (batch, 1)),
    ]
    return [*integers, *(2 * floats(*s, seed=i) for i, s in enumerate(shapes))]
