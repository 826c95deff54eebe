"""ProveMemory: an encoder's output that enters through keys and values is accepted, any other way refused."""

from __future__ import annotations

from typing import Any

import pytest
from tvm import relax
from tvm.relax import op

from kvc_passes.errors import UnsupportedModel
from kvc_passes.facts import Roles
from kvc_passes.markers import ATTENTION
from kvc_passes.prove_memory import ProveMemory
from support import module_of, param, symbol

B, S, R, D = symbol("batch"), symbol("sequence"), symbol("rows"), 8
TOKENS, POSITIONS = param("input_ids", [B, S], "int64"), param("positions", [S], "int64")
X, MEMORY, WEIGHT = param("x", [B, S, D]), param("memory", [B, R, D]), param("weight", [D, D])
TABLE = param("table", [32, D])
PARAMS = [TOKENS, POSITIONS, MEMORY, X, WEIGHT, TABLE]
ROLES = Roles("input_ids", memory="memory")


def own(emit: Any) -> Any:
    """Values of the tokens [b, s, 8]."""
    return emit(op.take(TABLE, TOKENS, axis=0))


def attention(emit: Any, key: Any, value: Any = None, query: Any = None) -> Any:
    """Cross-attention of one head."""
    query = own(emit) if query is None else query
    q, k, v = (
        emit(op.reshape(x, [B, 1, x.ty.shape.values[1], D]))
        for x in (query, key, key if value is None else value)
    )
    out = relax.TensorType([B, S, 1, D], "float32")
    mixed = emit(op.call_pure_packed(ATTENTION, q, k, v, relax.prim_value(0), ty_args=out), "attention")
    return emit(op.reshape(mixed, [B, S, D]))


def prove(body: Any) -> Any:
    module, names = module_of(PARAMS, body)
    result = ProveMemory(ROLES, names).run(module)
    assert result.module.same_as(module)
    return result


ACCEPTED = {
    "itself": lambda e, *_: attention(e, MEMORY),
    "a projection": lambda e, *_: attention(e, e(op.matmul(MEMORY, WEIGHT))),
    "a norm of each row": lambda e, *_: attention(e, e(op.nn.rms_norm(MEMORY, param_scale(e), axes=[-1]))),
    "keys alone": lambda e, *_: attention(e, MEMORY, e(op.tanh(MEMORY))),
}


def param_scale(emit: Any) -> Any:
    return emit(op.reshape(emit(op.strided_slice(WEIGHT, [0], [0], [1])), [D]))


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_is_accepted(name: str) -> None:
    assert prove(ACCEPTED[name]).facts > 0


REFUSED = {
    "a mean over rows": (
        lambda e, *_: attention(e, e(op.subtract(MEMORY, e(op.mean(MEMORY, axis=1, keepdims=True), "mean")))),
        r"'mean'.*reduces over the tokens \(axis 1 of 3\); cross-attention alone may mix rows",
    ),
    "the first row": (
        lambda e, *_: attention(e, e(op.strided_slice(MEMORY, [1], [0], [1]), "first")),
        "'first'.*slices the tokens",
    ),
    "added to tokens": (
        lambda e, *_: e(op.add(own(e), e(op.max(MEMORY, axis=[1], keepdims=True))), "sum"),
        "reduces over the tokens",
    ),
    "made of tokens and rows": (
        lambda e, *_: attention(
            e, e(op.multiply(MEMORY, e(op.mean(own(e), axis=[1], keepdims=True))), "both")
        ),
        "'both'.*combines tokens or positions with the encoder's output",
    ),
    "a query": (
        lambda e, *_: attention(e, own(e), query=e(op.tanh(MEMORY))),
        "'attention'.*asks for tokens with what is made of the encoder's output",
    ),
    "the logits": (lambda e, *_: e(op.tanh(MEMORY)), "the logits are made of the encoder's output alone"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str) -> None:
    body, message = REFUSED[name]
    with pytest.raises(UnsupportedModel, match=message):
        prove(body)


def test_a_decoder_without_memory_is_left_alone() -> None:
    module, names = module_of([TOKENS, POSITIONS, TABLE], lambda e, *_: own(e))
    result = ProveMemory(Roles("input_ids"), names).run(module)
    assert (result.module.same_as(module), result.facts) == (True, 0)
