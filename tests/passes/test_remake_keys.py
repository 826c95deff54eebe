"""RemakeKeys: keys and values that are made again from what they are projections of give what they gave."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from head_products import define_remade
from rotary_graphs import DIM, HALF, HEADS, KV_HEADS, WIDTH, Draft, arrays, attention
from tvm import relax
from tvm.relax import op

from kvc_passes.graph import Graph, op_name
from kvc_passes.markers import ATTENTION, REMADE, HeadProduct, Latent, attributes, tensors
from kvc_passes.rebuild import tidy
from kvc_passes.remake_keys import RemakeKeys
from kvc_passes.sites import Remade
from kvc_passes.state_forms import Forms, Illegal
from support import ops, params_of, run_markers, shape_of


def straight(emit: Draft, x: relax.Var, cosine: relax.Var, sine: relax.Var) -> relax.Var:
    """Keys that are not turned."""
    return x


@pytest.mark.parametrize("half", [HALF, DIM // 2])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("kv_heads", [KV_HEADS, HEADS])
def test_keys_and_values_that_are_made_again_give_the_same(
    kv_heads: int, joined: bool, bias: bool, half: int
) -> None:
    before, facts = attention(kv_heads=kv_heads, joined=joined, bias=bias, half=half)
    result = RemakeKeys((facts,), frozenset({0})).run(before)
    (kept,) = result.facts
    assert kept == replace(facts, kept="x_gemm", remade=Remade(WIDTH, half, fine=False))
    assert kept.token_bytes() == 4 * (WIDTH + 2 * half)
    assert params_of(result.module) == params_of(before)
    graph = Graph(result.module["main"])
    (call,) = (c for v in graph.order if op_name(c := graph.definitions[v]) == REMADE)
    queries, keys = HEADS * DIM, kv_heads * DIM
    places = (queries, queries + keys) if joined else (0, 0)
    group = HEADS // kv_heads
    parts = [HeadProduct(HEADS, group, DIM, first, DIM) for first in places]
    assert attributes(call, Latent) == Latent(0, *parts, (bias, bias))
    assert [shape_of(b) for b in tensors(call)[4:]] == [[str(keys)]] * (2 * bias)
    # Only the query's product is left, and of a joint weight it reads its own columns alone.
    (matmul,) = (c for v in graph.order if op_name(c := graph.definitions[v]) == "matmul")
    assert shape_of(matmul.args[1]) == [str(WIDTH), str(queries)]
    define_remade((kept,))
    given = arrays(before)
    got = run_markers(result.module, (kept,), *given)[0]
    np.testing.assert_allclose(got, run_markers(before, (facts,), *given)[0], rtol=0, atol=1e-4)


def test_keys_that_are_not_turned_need_no_angles() -> None:
    before, facts = attention(straight, half=DIM // 2)
    result = RemakeKeys((facts,), frozenset({0})).run(before)
    (kept,) = result.facts
    assert kept.remade == Remade(WIDTH, 0, fine=False)
    define_remade((kept,))
    given = arrays(before)
    got = run_markers(result.module, (kept,), *given)[0]
    np.testing.assert_allclose(got, run_markers(before, (facts,), *given)[0], rtol=0, atol=1e-4)


def test_a_query_that_is_changed_otherwise_keeps_the_joint_product() -> None:
    """Keys are turned, queries are not only turned: the first turn is the query's."""
    first: list[relax.Var] = []

    def turn(emit: Draft, x: relax.Var, cosine: relax.Var, sine: relax.Var) -> relax.Var:
        from rotary_graphs import turned

        first.append(x)
        return turned(emit, emit(op.tanh(x)) if len(first) == 1 else x, cosine, sine)

    before, facts = attention(turn, joined=True, half=DIM // 2)
    result = RemakeKeys((facts,), frozenset({0})).run(before)
    assert ops(result.module)["matmul"] == ops(tidy(before))["matmul"] == 1
    define_remade(result.facts)
    given = arrays(before)
    got = run_markers(result.module, result.facts, *given)[0]
    np.testing.assert_allclose(got, run_markers(before, (facts,), *given)[0], rtol=0, atol=1e-4)


def test_only_the_chosen_sites_change() -> None:
    before, facts = attention()
    result = RemakeKeys((facts,), frozenset()).run(before)
    assert result.facts == (facts,)
    assert (ops(result.module)[ATTENTION], ops(result.module)[REMADE]) == (1, 0)


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        ({"width": 48}, {}, "48 elements of float32, 192 bytes, are no smaller than keys and values, 192"),
        ({"width": 42}, {}, "50 elements of float32, 200 bytes, are no smaller than keys and values, 192"),
        ({"turn": lambda emit, x, c, s: emit(op.tanh(x))}, {}, "K goes through tanh"),
    ],
)
def test_what_makes_the_form_illegal(options: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    module, facts = attention(**options)
    facts = replace(facts, **changes)
    forms = Forms(Graph(module["main"]))
    with pytest.raises(Illegal, match=message):
        forms.remaking(forms.markers()[0], facts)
    (form,) = (f for f in forms.of(forms.markers()[0], facts) if f.name == "x_gemm")
    assert (form.legal, form.token_bytes) == (False, 0)


def test_a_learned_score_a_softcap_and_biases_are_no_hindrance() -> None:
    module, facts = attention()
    facts = replace(facts, sinks=(1.0,) * HEADS, softcap=5.0)
    forms = Forms(Graph(module["main"]))
    (form,) = (f for f in forms.of(forms.markers()[0], facts) if f.name == "x_gemm")
    assert (form.legal, form.token_bytes) == (True, 4 * (WIDTH + 2 * HALF))
    assert "they are made again" in form.detail
