"""KeepKeys: keys before they are turned, and values made from them, give what keys and values gave."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from head_products import define_head_product
from rotary_graphs import DIM, HALF, HEADS, arrays, attention
from tvm.relax import op

from kvc.reconstruction import WithKeyWeights
from kvc_passes.graph import Graph
from kvc_passes.keep_keys import KeepKeys
from kvc_passes.markers import HEAD_PRODUCT
from kvc_passes.sites import Sliced
from kvc_passes.state_forms import Forms, Illegal
from support import ops, params_of, run_markers


@pytest.mark.parametrize("rest", [0, 3])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_values_made_from_keys_are_the_values(kv_heads: int, joined: bool, bias: bool, rest: int) -> None:
    before, facts = attention(kv_heads=kv_heads, joined=joined, bias=bias)
    given = arrays(before)
    result = KeepKeys((facts,), {0: rest}).run(before)
    (kept,), layers = result.facts
    sliced = Sliced(kv_heads, DIM, rest, HALF, fine=False)
    assert (kept.sliced, kept.head_dim, kept.value_dim) == (sliced, sliced.width, sliced.value_dim)
    assert (kept.kept, kept.kv_heads, kept.heads) == ("k_plus_r" if rest else "k_only", 1, HEADS)
    assert ops(result.module)[HEAD_PRODUCT] == 1
    weights = dict(zip(params_of(before)[2:], given[2:]))
    every = WithKeyWeights(weights, layers)
    names = params_of(result.module)
    assert [n for n in names if n.startswith("layer_")] == [
        name for name, has in zip(layers[0].names, (True, rest > 0, bias)) if has
    ]
    define_head_product()
    got = run_markers(result.module, (kept,), *given[:2], *(every[n] for n in names[2:]))[0]
    # float32 M of a W_K whose condition is up to 30, and values up to 20.
    np.testing.assert_allclose(got, run_markers(before, (facts,), *given)[0], rtol=0, atol=2e-4)


def test_finer_angles_where_what_is_kept_has_fewer_bits() -> None:
    before, facts = attention(kv_heads=4)
    facts = replace(facts, kv_dtype="float16")
    (kept,), _ = KeepKeys((facts,), {0: 0}).run(before).facts
    assert kept.sliced == Sliced(4, DIM, 0, HALF, fine=True)
    assert kept.head_dim == 4 * DIM + 4 * HALF


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        ({"width": 60}, {}, "K has 24 elements, fewer than the 60 that V is a projection of"),
        ({}, {"sinks": (1.0,) * HEADS}, "with a learned score the weights do not sum to 1"),
        ({"turn": lambda emit, x, c, s: emit(op.tanh(x))}, {}, "K goes through tanh"),
    ],
)
def test_what_makes_the_form_illegal(options: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    module, facts = attention(**options)
    forms = Forms(Graph(module["main"]))
    with pytest.raises(Illegal, match=message):
        forms.keys(forms.markers()[0], replace(facts, **changes))
    of = {form.name: form for form in forms.of(forms.markers()[0], replace(facts, **changes))}
    assert not of["k_only"].legal
    assert not of["k_plus_r"].legal
