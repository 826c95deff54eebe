"""ReadInPlace: attention that reads rows of products and turns them gives what it gave."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from rotary_graphs import DIM, HALF, HEADS, KV_HEADS, Draft, Turn, arrays, attention, turned
from test_rotations import by_halves, interleaved, the_other_way
from tvm import IRModule, relax, tirx
from tvm.relax import op

from kvc.kernels.cuda.host_attention import CudaAttention
from kvc.kernels.cuda.launches import Variants
from kvc_passes.graph import Graph, op_name
from kvc_passes.markers import ATTENTION
from kvc_passes.page_attention import PageAttention
from kvc_passes.read_in_place import ReadInPlace
from kvc_passes.sites import AttentionSite, MaskFact
from kvc_passes.views import Angle, View, Views
from support import module_of, ops, param, run_markers, shape_of, site, symbol

QUERIES, KEYS = HEADS * DIM, KV_HEADS * DIM
TOLERANCE = 1e-4  # float32 on one side, a few hundred products and sums


def views(module: IRModule, facts: AttentionSite) -> tuple[IRModule, AttentionSite]:
    result = ReadInPlace((facts,)).run(module)
    (found,) = result.facts
    return result.module, found


def marker_of(module: IRModule) -> relax.Call:
    graph = Graph(module["main"])
    (call,) = (c for v in graph.order if op_name(c := graph.definitions[v]) == ATTENTION)
    return call


@pytest.mark.parametrize("turn", [turned, by_halves])
@pytest.mark.parametrize("half", [HALF, DIM // 2])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("joined", [False, True])
def test_operands_are_read_where_products_leave_them(joined: bool, bias: bool, half: int, turn: Turn) -> None:
    before, facts = attention(turn, joined=joined, bias=bias, half=half)
    module, found = views(before, facts)
    angle, whole = Angle("float32", 2 * half, 0), QUERIES + 2 * KEYS
    places = (
        [(whole, 0), (whole, QUERIES), (whole, QUERIES + KEYS)]
        if joined
        else [(QUERIES, 0)] + 2 * [(KEYS, 0)]
    )
    query, key, value = (View(*place, DIM) for place in places)
    turning = {"half": half, "cosine": angle, "sine": angle}
    assert found.views == Views(*(View(v.columns, v.first, DIM, **turning) for v in (query, key)), value)
    # Nothing is left of the rotations, and of changes of layout only those of one axis.
    left = ops(module)
    assert not {"strided_slice", "split", "permute_dims", "negative", "subtract"} & set(left)
    assert left["concat"] == 1  # of the angles
    given = arrays(before)
    got = run_markers(module, (found,), *given)[0]
    np.testing.assert_allclose(got, run_markers(before, (facts,), *given)[0], rtol=0, atol=TOLERANCE)


def test_heads_that_stand_before_the_tokens() -> None:
    """Rows are changed behind their transposition, as a norm of every head does."""

    def turn(emit: Draft, x: relax.Var, cosine: relax.Var, sine: relax.Var) -> relax.Var:
        return turned(emit, emit(op.tanh(x)), cosine, sine)

    before, facts = attention(turn, half=DIM // 2)
    module, found = views(before, facts)
    assert found.views is not None
    assert found.views.query is not None
    assert found.views.query.columns is None
    assert found.views.query.half == DIM // 2
    assert shape_of(marker_of(module).args[1]) == ["1", str(HEADS), "n", str(DIM)]
    given = arrays(before)
    got = run_markers(module, (found,), *given)[0]
    np.testing.assert_allclose(got, run_markers(before, (facts,), *given)[0], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("turn", [interleaved, the_other_way])
def test_what_is_turned_otherwise_is_turned_where_it_was(turn: Turn) -> None:
    before, facts = attention(turn, half=DIM // 2)
    module, found = views(before, facts)
    assert found.views == Views(None, None, View(KEYS, 0, DIM))
    assert [shape_of(a)[1] for a in marker_of(module).args[1:4]] == [str(HEADS), str(KV_HEADS), "n"]


def heads_of(emit: Draft, x: relax.Var, n: tirx.Var) -> relax.Var:
    return emit(op.permute_dims(emit(op.reshape(x, [1, n, HEADS, DIM])), [0, 2, 1, 3]))


def three_times(*, again: bool) -> IRModule:
    """Queries, keys and values that are one product each; keys are used twice if `again`."""
    n, width = symbol("n"), HEADS * DIM
    params = [param("tokens", [n], "int64"), param("positions", [n], "int64"), param("words", [9, width])]
    params += [param(f"w_{name}", [width, width]) for name in "qkv"]

    def body(emit: Draft, tokens: Any, positions: Any, words: Any, *weights: Any) -> relax.Expr:
        x = emit(op.take(words, emit(op.reshape(tokens, [1, n])), axis=0))
        q, k, v = (heads_of(emit, emit(op.matmul(x, w)), n) for w in weights)
        out = relax.TensorType([1, n, HEADS, DIM], "float32")
        mixed = emit(op.call_pure_packed(ATTENTION, q, k, v, relax.prim_value(0), ty_args=out))
        return emit(op.add(mixed, emit(op.permute_dims(k, [0, 2, 1, 3])))) if again else mixed

    return module_of(params, body)[0]


def test_what_others_use_too_is_made_all_the_same() -> None:
    facts = site(0, kv_heads=HEADS, head_dim=DIM, value_dim=DIM)
    for again in (False, True):
        _, found = views(three_times(again=again), facts)
        row = View(HEADS * DIM, 0, DIM)
        assert found.views == Views(row, None if again else row, row)


def test_other_forms_stay_and_so_does_what_is_made_of_an_encoders_output() -> None:
    plain = site(0, kv_heads=HEADS, head_dim=DIM, value_dim=DIM)
    module = three_times(again=False)
    made = site(0, kv_heads=HEADS, head_dim=DIM, value_dim=DIM, kept="x_gemm")
    assert views(module, made)[1].views is None
    of_memory = site(0, kv_heads=HEADS, head_dim=DIM, value_dim=DIM, mask=MaskFact("memory", None, ""))
    assert views(module, of_memory)[1].views == Views(View(HEADS * DIM, 0, DIM), None, None)
    assert views(module, plain)[1].views != Views()


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_kernels_are_called_with_rows_and_angles(phase: Any) -> None:
    before, facts = attention(joined=True, half=DIM // 2)
    module, found = views(before, facts)
    main = module["main"]
    tokens, words, *weights = main.params
    positions = param("positions", [tokens.ty.shape.values[0]], "int64")
    main = relax.Function(
        [tokens, positions, words, *weights], main.body, main.ret_ty, main.is_pure, main.attrs
    )
    kernels = CudaAttention.for_sites((found,), 64, Variants(90))
    paged = PageAttention((found,), kernels, phase).run(IRModule({"main": main})).module
    graph = Graph(paged["main"])
    calls = {c.args[0].name_hint: c for v in graph.order if "call_tir" in op_name(c := graph.definitions[v])}
    whole, angle = ["1", "n", str(QUERIES + 2 * KEYS)], ["1", "n", str(DIM)]
    append = calls["append_kv"].args[1].fields
    assert [shape_of(a) for a in append[:4]] == [whole, whole, angle, angle]
    reading = calls[f"{phase}_attention"].args[1].fields
    assert [shape_of(a) for a in reading[:3]] == [whole, angle, angle]
