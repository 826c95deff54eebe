"""AbsorbProjections: attention over what keys and values are projections of gives what it gave before."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from flat_graphs import DIM, HEADS, KV_HEADS, SITES, WEIGHTS, WIDTH, flat, tokens_and_positions
from head_products import define_latent
from tvm import IRModule, relax
from tvm.relax import op

from kvc_passes.absorb_projections import AbsorbProjections
from kvc_passes.graph import Graph, op_name
from kvc_passes.markers import ATTENTION, LATENT, HeadProduct, Latent, attributes
from kvc_passes.rebuild import tidy
from kvc_passes.sites import AttentionSite
from kvc_passes.state_forms import Forms, Illegal
from support import Draft, floats, module_of, ops, param, params_of, run_markers, site, symbol

TOLERANCE = 1e-5  # float32 sums of 16 and 8 products in another order, through two layers


def outputs(module: IRModule, sites: tuple[AttentionSite, ...], *arrays: np.ndarray) -> np.ndarray:
    define_latent(sites)
    return run_markers(module, sites, *arrays)[0]


@pytest.mark.parametrize("chosen", [{0}, {1}, {0, 1}, set()])
def test_the_chosen_sites_are_changed_and_compute_the_same(chosen: set[int]) -> None:
    """Heads that share keys: every KV head's matrix serves its group."""
    before = flat()
    result = AbsorbProjections(SITES, frozenset(chosen)).run(before)
    assert result.sites == len(chosen)
    assert ops(result.module)[LATENT] == len(chosen)
    assert ops(result.module)[ATTENTION] == 2 - len(chosen)
    for old, new in zip(SITES, result.facts):
        kept = (new.kv_heads, new.head_dim, new.value_dim, new.kept)
        wanted = (1, WIDTH, WIDTH, "x_absorbed") if old.index in chosen else (KV_HEADS, DIM, DIM, "paged_kv")
        assert (kept, new.heads, new.scale) == (wanted, HEADS, old.scale)
    # Keys and values are not computed any more: only queries, outputs, and the logits.
    assert ops(result.module)["matmul"] == ops(tidy(before))["matmul"] - 2 * len(chosen)
    tokens, positions = tokens_and_positions(9)
    weights = list(WEIGHTS.values())
    assert params_of(result.module) == params_of(before)
    np.testing.assert_allclose(
        outputs(result.module, result.facts, tokens, positions, *weights),
        outputs(before, SITES, tokens, positions, *weights),
        rtol=0,
        atol=TOLERANCE,
    )


def joined(
    *, bias: bool = True, tail: int = 0, between: Any = None, wide: bool = False
) -> tuple[IRModule, AttentionSite]:
    """`main(tokens, x, w, b)`: q, k and v from one product; keys end with `tail` elements that all share."""
    n, columns = symbol("n"), 3 * HEADS * DIM
    params = [param("tokens", [n], "int64"), param("x", [1, n, WIDTH], "float16" if wide else "float32")]
    params += [param("w", [WIDTH, columns]), param("b", [columns])]

    def body(emit: Draft, _: relax.Var, x: relax.Var, w: relax.Var, b: relax.Var) -> relax.Expr:
        given = emit(op.astype(x, "float32")) if wide else x
        rows = emit(op.matmul(emit(op.reshape(given, [n, WIDTH])), w))
        product = emit(op.reshape(emit(op.add(rows, b)) if bias else rows, [1, n, columns]))
        parts = emit(op.split(product, 3, axis=2))
        heads = [emit(op.reshape(emit(relax.TupleGetItem(parts, i)), [1, n, HEADS, DIM])) for i in range(3)]
        q, k, v = (emit(op.permute_dims(each, [0, 2, 1, 3])) for each in heads)
        k = emit(between(k)) if between else k
        if tail:
            angles = emit(op.tanh(emit(op.strided_slice(given, [2], [1], [1 + tail], assume_inbound=True))))
            turned = emit(op.broadcast_to(emit(op.reshape(angles, [1, 1, n, tail])), [1, HEADS, n, tail]))
            k = emit(op.concat([k, turned], axis=3))
            q = emit(op.concat([q, emit(op.tanh(turned))], axis=3))
        out = relax.TensorType([1, n, HEADS, DIM], "float32")
        return emit(op.call_pure_packed(ATTENTION, q, k, v, relax.prim_value(0), ty_args=out))

    module = module_of(params, body)[0]
    return module, site(0, kv_heads=HEADS, head_dim=DIM + tail)


def arrays(wide: bool = False) -> list[np.ndarray]:
    x = floats(1, 7, WIDTH).astype(np.float16 if wide else np.float32)
    return [np.arange(7), x, floats(WIDTH, 3 * HEADS * DIM, seed=1), floats(3 * HEADS * DIM, seed=2)]


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("tail", [0, 5])
@pytest.mark.parametrize("bias", [False, True])
def test_queries_keys_and_values_of_one_product(bias: bool, tail: int, wide: bool) -> None:
    before, facts = joined(bias=bias, tail=tail, wide=wide)
    result = AbsorbProjections((facts,), frozenset({0})).run(before)
    (kept,) = result.facts
    form = "mla_latent" if tail else "x_absorbed"
    assert (kept.kept, kept.head_dim, kept.value_dim) == (form, WIDTH + tail, WIDTH)
    assert kept.kv_dtype == ("float16" if wide else "float32")
    graph = Graph(result.module["main"])
    (call,) = (c for v in graph.order if op_name(c := graph.definitions[v]) == LATENT)
    size = HEADS * DIM
    key, value = HeadProduct(HEADS, 1, DIM, size, DIM, True), HeadProduct(HEADS, 1, DIM, 2 * size, DIM)
    assert attributes(call, Latent) == Latent(0, key, value)
    # The query's own product reads its own columns alone, unless it has elements from elsewhere.
    (matmul,) = (c for v in graph.order if op_name(c := graph.definitions[v]) == "matmul")
    assert [int(d) for d in matmul.args[1].ty.shape.values] == [WIDTH, 3 * size if tail else size]
    np.testing.assert_allclose(
        outputs(result.module, result.facts, *arrays(wide)),
        outputs(before, (facts,), *arrays(wide)),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        ({"between": op.tanh}, {}, "K is no projection: value 'tanh_14_n14_' comes between"),
        ({}, {"softcap": 5.0}, "K has a bias, which a softcap or a learned score does not cancel"),
        ({}, {"sinks": (1.0,) * HEADS}, "K has a bias"),
    ],
)
def test_what_makes_the_form_illegal(options: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    module, facts = joined(**options)
    forms = Forms(Graph(module["main"]))
    with pytest.raises(Illegal, match=message):
        forms.latent(forms.markers()[0], replace(facts, **changes))
    of = forms.of(forms.markers()[0], replace(facts, **changes))
    assert not any(form.legal for form in of if form.name not in ("paged_kv", "x_gemm"))


def test_without_a_bias_a_softcap_and_a_learned_score_are_no_hindrance() -> None:
    module, facts = joined(bias=False)
    facts = replace(facts, softcap=5.0, sinks=(0.5,) * HEADS)
    result = AbsorbProjections((facts,), frozenset({0})).run(module)
    given = arrays()
    np.testing.assert_allclose(
        outputs(result.module, result.facts, *given), outputs(module, (facts,), *given), rtol=1e-5, atol=1e-5
    )


def test_what_each_form_keeps_is_said() -> None:
    module, facts = joined(tail=5)
    forms = Forms(Graph(module["main"]))
    plain, latent, other, *_ = forms.of(forms.markers()[0], facts)
    assert (plain.name, plain.token_bytes) == ("paged_kv", facts.token_bytes())
    assert (latent.name, latent.token_bytes, latent.legal) == ("mla_latent", 4 * (WIDTH + 5), True)
    assert (other.name, other.legal, other.detail) == (
        "x_absorbed",
        False,
        "keys have elements that are no projection",
    )
