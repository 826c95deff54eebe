"""KeepValues: keys that are made of what is kept of values give what the graph's own gave."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from head_products import define_rekeyed
from rotary_graphs import turned
from test_rekeying import a_head, one_more
from tvm.relax import op
from value_graphs import DIM, KV_HEADS, arrays, attention, by_weight

from kvc_passes.graph import Graph, op_name
from kvc_passes.keep_values import KeepValues
from kvc_passes.markers import ATTENTION, REKEYED, tensors
from kvc_passes.sites import Rekeyed
from kvc_passes.state_forms import Forms, Illegal
from support import ops, params_of, run_markers, shape_of

HALF = DIM // 2
CASES: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "weight, one head": ((by_weight,), {"kv_heads": 1, "half": 2}),
    "a part is turned": ((one_more,), {"half": 2, "normed": False}),
    "a table of heads": ((a_head,), {"half": 4}),
    "as it is, turned": ((lambda emit, x, w: x,), {}),
    "as it is": ((lambda emit, x, w: x, None), {}),
}


@pytest.mark.parametrize(
    ("name", "still"), [*((name, 1) for name in CASES), ("weight, one head", 0), ("as it is, turned", 0)]
)
def test_keys_made_of_values_give_the_same(name: str, still: int) -> None:
    """still: frequencies at the end that are 0, whose angles are not kept."""
    given, options = CASES[name]
    before, facts = attention(*given, **options)
    inputs = arrays(kv_heads=facts.kv_heads, half=options.get("half", HALF))
    speeds = inputs[-1]
    speeds[len(speeds) - still :] = 0
    result = KeepValues((facts,), frozenset({0}), {"speeds": speeds}).run(before)
    (kept,) = result.facts
    turns = len(given) < 2
    half = options.get("half", HALF) if turns else 0
    pairs = half - still if turns else 0
    scaled = not name.startswith("as it is")
    form = Rekeyed(facts.kv_heads, DIM, half, pairs, fine=False, scaled=scaled)
    assert kept == replace(facts, kept="v_only", rekeyed=form)
    assert kept.token_bytes() == 4 * (facts.kv_heads * DIM + 2 * pairs)
    assert params_of(result.module) == params_of(before)
    assert (ops(result.module)[ATTENTION], ops(result.module)[REKEYED]) == (0, 1)
    graph = Graph(result.module["main"])
    (call,) = (c for v in graph.order if op_name(c := graph.definitions[v]) == REKEYED)
    shapes = [shape_of(x) for x in tensors(call)[1:]]
    assert shapes == [["1", "1", "n", str(form.width)], *[[str(form.values)]] * scaled]
    assert "negative" not in ops(result.module)  # no key is turned any more
    define_rekeyed((kept,))
    got = run_markers(result.module, (kept,), *inputs)[0]
    np.testing.assert_allclose(got, run_markers(before, (facts,), *inputs)[0], rtol=0, atol=1e-5)


def test_only_the_chosen_sites_change() -> None:
    before, facts = attention()
    result = KeepValues((facts,), frozenset()).run(before)
    assert result.facts == (facts,)
    assert (ops(result.module)[ATTENTION], ops(result.module)[REKEYED]) == (1, 0)


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        ({"kv_heads": 1}, {}, "24 elements of float32, 96 bytes, are no smaller than keys and values, 96"),
        ({}, {"head_dim": DIM + 4}, "K has 16 elements a head, V 12"),
        ({}, {"kv_dtype": "float16"}, "48 elements of float16, 96 bytes, are no smaller"),
        ({"change": lambda emit, x, w: op.tanh(x)}, {}, "K goes through tanh"),
    ],
)
def test_what_makes_the_form_illegal(options: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    module, facts = attention(**options)
    facts = replace(facts, **changes)
    forms = Forms(Graph(module["main"]))
    with pytest.raises(Illegal, match=message):
        forms.values(forms.markers()[0], facts)
    (form,) = (f for f in forms.of(forms.markers()[0], facts) if f.name == "v_only")
    assert (form.legal, form.token_bytes) == (False, 0)


def test_a_learned_score_a_softcap_and_slopes_are_no_hindrance() -> None:
    module, facts = attention(by_weight, turned, half=2)
    facts = replace(facts, sinks=(1.0,) * 4, softcap=5.0, slopes=(0.5,) * 4)
    forms = Forms(Graph(module["main"]))
    (form,) = (f for f in forms.of(forms.markers()[0], facts) if f.name == "v_only")
    assert (form.legal, form.token_bytes) == (True, 4 * (KV_HEADS * DIM + 4))
    assert form.detail == "28 elements: V, its cosines and sines; K is made of them"
