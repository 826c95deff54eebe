"""Attention over keys that are turned by their positions, as exporters write it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from tvm import IRModule, relax
from tvm.relax import op

from kvc_passes.markers import ATTENTION
from kvc_passes.sites import AttentionSite
from support import Draft, floats, module_of, param, site, symbol

HEADS, KV_HEADS, DIM, WIDTH, HALF = 4, 2, 12, 20, 4
Turn = Callable[[Draft, relax.Var, relax.Var, relax.Var], relax.Var]


def turned(emit: Draft, x: relax.Var, cosine: relax.Var, sine: relax.Var) -> relax.Var:
    """x * cos + rotate_half(x) * sin."""
    half = int(x.ty.shape.values[3].value) // 2
    parts = [
        emit(op.strided_slice(x, [3], [begin], [begin + half], assume_inbound=True)) for begin in (0, half)
    ]
    other = emit(op.concat([emit(op.negative(parts[1])), parts[0]], axis=-1))
    return emit(op.add(emit(op.multiply(x, cosine)), emit(op.multiply(other, sine))))


def attention(
    turn: Turn = turned,
    *,
    kv_heads: int = KV_HEADS,
    width: int = WIDTH,
    joined: bool = False,
    bias: bool = True,
    half: int = HALF,
    frequencies: bool = False,
) -> tuple[IRModule, AttentionSite]:
    """`main(tokens, words [9,width], weights...)` -> the attention [1,n,heads,dim] of the tokens' words.

    The first 2 * half elements of queries and keys are turned. joined: q, k and v are one product.
    frequencies: those of the rotation are a parameter, as they are where there are many.
    """
    n, sizes = symbol("n"), {"q": HEADS * DIM, "k": kv_heads * DIM, "v": kv_heads * DIM}
    params = [param("tokens", [n], "int64"), param("words", [9, width])]
    names = {"qkv": sum(sizes.values())} if joined else sizes
    weights = {name: param(f"w_{name}", [width, size]) for name, size in names.items()}
    biases = {name: param(f"b_{name}", [size]) for name, size in names.items()} if bias else {}

    given = param("frequencies", [half])

    def body(emit: Draft, tokens: relax.Var, words: relax.Var, *_: Any) -> relax.Expr:
        x = emit(op.take(words, emit(op.reshape(tokens, [1, n])), axis=0), "x")

        def product(name: str) -> relax.Var:
            made = emit(op.matmul(x, weights[name]))
            return emit(op.add(made, biases[name])) if bias else made

        if joined:
            ends = [sizes["q"], sizes["q"] + sizes["k"]]
            parts = emit(op.split(product("qkv"), ends, axis=2))
            flat = {name: emit(relax.TupleGetItem(parts, i)) for i, name in enumerate("qkv")}
        else:
            flat = {name: product(name) for name in "qkv"}

        def heads(name: str) -> relax.Var:
            split = emit(op.reshape(flat[name], [1, n, sizes[name] // DIM, DIM]))
            return emit(op.permute_dims(split, [0, 2, 1, 3]))

        where = emit(op.reshape(emit(op.astype(emit(op.arange(n, dtype="int64")), "float32")), [1, n, 1]))
        speeds: relax.Expr = relax.const(np.float32([[[1.0 / (i + 1) for i in range(half)]]]))
        if frequencies:
            speeds = emit(op.reshape(given, [1, 1, half]))
        angle = emit(op.multiply(where, speeds))
        both = emit(op.concat([angle, angle], axis=-1))
        cosine, sine = (emit(op.expand_dims(emit(f(both)), axis=[1])) for f in (op.cos, op.sin))

        def moved(x: relax.Var) -> relax.Var:
            if 2 * half == DIM:
                return turn(emit, x, cosine, sine)
            first = emit(op.strided_slice(x, [3], [0], [2 * half], assume_inbound=True))
            rest = emit(op.strided_slice(x, [3], [2 * half], [DIM], assume_inbound=True))
            return emit(op.concat([turn(emit, first, cosine, sine), rest], axis=-1))

        out = relax.TensorType([1, n, HEADS, DIM], "float32")
        q, k, v = (heads(name) for name in "qkv")
        return emit(op.call_pure_packed(ATTENTION, moved(q), moved(k), v, relax.prim_value(0), ty_args=out))

    last = [given] if frequencies else []
    module = module_of([*params, *weights.values(), *biases.values(), *last], body)[0]
    return module, site(0, kv_heads=kv_heads, head_dim=DIM, value_dim=DIM, rope="rotate_half")


def arrays(module: IRModule, tokens: int = 7) -> list[np.ndarray]:
    """Tokens, x and weights for the parameters."""
    shapes = [p.ty.shape.values for p in module["main"].params[1:]]
    sizes = [[tokens if not hasattr(d, "value") else int(d.value) for d in shape] for shape in shapes]
    return [np.arange(tokens), *(floats(*size, seed=i) for i, size in enumerate(sizes))]
