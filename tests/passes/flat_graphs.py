"""A small decoder with attention markers, as the passes that serve it find it, and its weights."""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import IRModule, relax
from tvm.relax import op
from tvm.target import Target

from kvc.kernels.cpu import CpuAttention, CpuProducts
from kvc.kernels.traits import default_target
from kvc_passes.facts import Roles
from kvc_passes.flatten_tokens import FlattenTokens
from kvc_passes.markers import ATTENTION
from kvc_passes.nodes import NodeNames
from support import Draft, floats, module_of, param, site, symbol

VOCAB, WIDTH, HEADS, KV_HEADS, DIM, CONTEXT = 48, 16, 4, 2, 8, 64
ROLES = Roles("input_ids")
SITES = (site(0), site(1))
TARGET = default_target()
QUICK = Target({**dict(TARGET.export()), "opt-level": 0})
"""The same without LLVM's optimizations: kernels compile several times as fast."""
ATTENTION_KERNELS = CpuAttention.for_sites(TARGET, SITES)
PRODUCTS = CpuProducts(ATTENTION_KERNELS.traits)

SHAPES: dict[str, tuple[int, ...]] = {"embedding": (VOCAB, WIDTH), "table": (CONTEXT, WIDTH)}
for _layer in range(2):
    SHAPES |= {
        f"query{_layer}": (WIDTH, HEADS * DIM),
        f"key{_layer}": (KV_HEADS * DIM, WIDTH),
        f"value{_layer}": (WIDTH, KV_HEADS * DIM),
        f"output{_layer}": (HEADS * DIM, WIDTH),
        f"bias{_layer}": (WIDTH,),
    }
WEIGHTS = {name: floats(*shape, seed=i) / 2 for i, (name, shape) in enumerate(SHAPES.items())}


def _layer_of(emit: Draft, w: dict[str, relax.Var], x: relax.Var, layer: int) -> relax.Var:
    batch, tokens, _ = x.ty.shape.values

    def heads(product: relax.Expr, count: int) -> relax.Var:
        split = emit(op.reshape(emit(product), [batch, tokens, count, DIM]))
        return emit(op.permute_dims(split, [0, 2, 1, 3]))

    q = heads(op.matmul(x, w[f"query{layer}"]), HEADS)
    k = heads(op.matmul(x, emit(op.permute_dims(w[f"key{layer}"]))), KV_HEADS)
    v = heads(op.matmul(x, w[f"value{layer}"]), KV_HEADS)
    out = relax.TensorType([batch, tokens, HEADS, DIM], "float32")
    mixed = emit(op.call_pure_packed(ATTENTION, q, k, v, relax.prim_value(layer), ty_args=out))
    joined = emit(op.reshape(mixed, [batch, tokens, HEADS * DIM]))
    product = emit(op.add(emit(op.matmul(joined, w[f"output{layer}"])), w[f"bias{layer}"]))
    return emit(op.add(x, emit(op.tanh(product))))


def decoder(ids: str = "int64", cap: float | None = None) -> tuple[IRModule, NodeNames]:
    """`main(input_ids [batch, sequence], positions [sequence], weights...) -> logits`, two layers.

    ids: dtype of the token ids. cap: bound the logits, so that no product comes last.
    """
    batch, sequence = symbol("batch"), symbol("sequence")
    tokens = param("input_ids", [batch, sequence], ids)
    positions = param("positions", [sequence], "int64")
    weights = {name: param(name, shape) for name, shape in SHAPES.items()}

    def body(emit: Draft, *_: Any) -> relax.Expr:
        words = emit(op.take(weights["embedding"], tokens, axis=0))
        places = emit(op.take(weights["table"], emit(op.reshape(positions, [1, sequence])), axis=0))
        x = emit(op.add(words, places))
        for layer in range(2):
            x = _layer_of(emit, weights, x, layer)
        logits = emit(op.matmul(x, emit(op.permute_dims(weights["embedding"]))))
        if cap is None:
            return logits
        return emit(op.multiply(emit(op.tanh(logits)), relax.const(cap, "float32")))

    return module_of([tokens, positions, *weights.values()], body)


def flat(cap: float | None = None) -> IRModule:
    """The decoder after FlattenTokens."""
    return FlattenTokens(ROLES).run(decoder(cap=cap)[0]).module


def tokens_and_positions(count: int, start: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(count)
    return rng.integers(0, VOCAB, count), np.arange(start, start + count)
