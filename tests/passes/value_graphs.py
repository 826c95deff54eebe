"""Attention whose keys are its values times a norm's weight, turned by their positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from rotary_graphs import turned
from tvm import IRModule, relax
from tvm.relax import op

from kvc_passes.markers import ATTENTION
from kvc_passes.sites import AttentionSite
from support import Draft, module_of, param, site, symbol

HEADS, KV_HEADS, DIM, WIDTH, WORDS = 4, 2, 12, 20, 9
Turn = Callable[[Draft, relax.Var, relax.Var, relax.Var], relax.Var]
Change = Callable[[Draft, relax.Var, relax.Var], relax.Expr]


def norm(emit: Draft, x: relax.Var) -> relax.Var:
    """x / sqrt(mean(x^2) + 1e-6), over the last axis."""
    square = emit(op.mean(emit(op.multiply(x, x)), axis=[-1], keepdims=True))
    root = emit(op.power(emit(op.add(square, relax.const(np.float32(1e-6)))), relax.const(np.float32(-0.5))))
    return emit(op.multiply(x, root), "normed")


def by_weight(emit: Draft, x: relax.Var, weight: relax.Var) -> relax.Expr:
    return op.multiply(x, weight)


def attention(
    change: Change = by_weight,
    turn: Turn | None = turned,
    *,
    half: int = DIM // 2,
    normed: bool = True,
    kv_heads: int = KV_HEADS,
    moved: Callable[[Draft, relax.Var], relax.Expr] | None = None,
) -> tuple[IRModule, AttentionSite]:
    """`main(tokens, positions, words [9,width], w_q, w_v, weight [dim], speeds [half])` -> [1,n,heads,dim].

    Values [1,n,g,dim] are a product, or its norm. Keys are what `change` makes of them and of the weight;
    then their first 2 * half elements are turned; then `moved` changes them.
    """
    n = symbol("n")
    params = [param("tokens", [n], "int64"), param("positions", [n], "int64"), param("words", [WORDS, WIDTH])]
    weights = [param("w_q", [WIDTH, HEADS * DIM]), param("w_v", [WIDTH, kv_heads * DIM])]
    small = [param("weight", [DIM]), param("speeds", [half])]

    def body(emit: Draft, *given: relax.Var) -> relax.Expr:
        tokens, positions, words, w_q, w_v, weight, speeds = given
        x = emit(op.take(words, emit(op.reshape(tokens, [1, n])), axis=0), "x")
        q = emit(op.reshape(emit(op.matmul(x, w_q)), [1, n, HEADS, DIM]))
        v = emit(op.reshape(emit(op.matmul(x, w_v)), [1, n, kv_heads, DIM]))
        v = norm(emit, v) if normed else v
        where = emit(op.reshape(emit(op.astype(positions, "float32")), [1, n, 1]))
        angle = emit(op.multiply(where, emit(op.reshape(speeds, [1, 1, half]))))
        both = emit(op.concat([angle, angle], axis=-1))
        cosine, sine = (emit(op.expand_dims(emit(f(both)), axis=[2])) for f in (op.cos, op.sin))

        def rotated(x: relax.Var) -> relax.Var:
            if turn is None:
                return x
            if 2 * half == DIM:
                return turn(emit, x, cosine, sine)
            first, rest = (
                emit(op.strided_slice(x, [3], [a], [b], assume_inbound=True))
                for a, b in ((0, 2 * half), (2 * half, DIM))
            )
            return emit(op.concat([turn(emit, first, cosine, sine), rest], axis=-1))

        k = rotated(emit(change(emit, v, weight)))
        k = k if moved is None else emit(moved(emit, k))
        q, k, v = (emit(op.permute_dims(y, [0, 2, 1, 3])) for y in (q, k, v))
        out = relax.TensorType([1, n, HEADS, DIM], "float32")
        return emit(op.call_pure_packed(ATTENTION, q, k, v, relax.prim_value(0), ty_args=out))

    facts = site(0, heads=HEADS, kv_heads=kv_heads, head_dim=DIM, value_dim=DIM, rope="rotate_half")
    return module_of([*params, *weights, *small], body)[0], facts


def arrays(tokens: int = 7, kv_heads: int = KV_HEADS, half: int = DIM // 2) -> list[Any]:
    """Tokens, positions and weights for the parameters."""
    rng = np.random.default_rng(0)
    sizes = ([WORDS, WIDTH], [WIDTH, HEADS * DIM], [WIDTH, kv_heads * DIM], [DIM])
    floats = [rng.standard_normal(size).astype(np.float32) for size in sizes]
    return [
        np.arange(tokens) % WORDS,
        np.arange(tokens),
        *floats,
        (1 / (1 + np.arange(half))).astype(np.float32),
    ]
