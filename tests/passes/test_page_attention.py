"""PageAttention: markers become kernels over pages, which compute the same from any pages."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from flat_graphs import (
    ATTENTION_KERNELS,
    DIM,
    KV_HEADS,
    QUICK,
    SHAPES,
    SITES,
    WEIGHTS,
    flat,
    tokens_and_positions,
)
from tvm import IRModule, relax, tirx

from kvc_passes.graph import Graph, op_name
from kvc_passes.markers import ATTENTION
from kvc_passes.page_attention import PageAttention
from kvc_passes.select_rows import SelectRows
from kvc_passes.sites import MaskFact
from support import Compiled, ops, params_of, run_markers, shape_of

PAGE = ATTENTION_KERNELS.page_size
PAGES = 6
TOLERANCE = 1e-5  # float32 sums of up to 48 products in another order, through two layers
POOLS = ["k_0", "v_0", "k_1", "v_1"]


def paged(phase: Any, sites: Any = SITES) -> IRModule:
    module = SelectRows().run(flat()).module if phase == "prefill" else flat()
    result = PageAttention(sites, ATTENTION_KERNELS, phase).run(module)
    assert result.sites == len(sites)
    return result.module


def kernels(module: IRModule) -> list[str]:
    return sorted(v.name_hint for v, f in module.functions_items() if isinstance(f, tirx.PrimFunc))


def test_the_parameters_of_prefill() -> None:
    module = paged("prefill")
    inputs = ["tokens", "positions", "slots_0", "tiles", "block_table_0", "rows"]
    assert params_of(module) == [*inputs, *POOLS, *SHAPES]
    params = {p.name: p for p in module["main"].params}
    assert [shape_of(params[n]) for n in inputs[2:]] == [["n"], ["t", "3"], ["b", "m"], ["r"]]
    assert {params[n].ty.dtype.dtype for n in inputs[2:]} == {"int32"}
    assert shape_of(params["k_0"]) == ["pages_0", str(KV_HEADS), str(DIM), str(PAGE)]
    assert shape_of(params["v_0"]) == ["pages_0", str(KV_HEADS), str(PAGE), str(DIM)]


def test_the_parameters_of_decode() -> None:
    module = paged("decode")
    assert params_of(module) == ["tokens", "positions", "slots_0", "block_table_0", *POOLS, *SHAPES]
    assert shape_of(module["main"].params[3]) == ["n", "m"]


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_every_site_appends_in_place_and_then_attends(phase: Any) -> None:
    module = paged(phase)
    assert ops(module)[ATTENTION] == 0
    assert ops(module)["call_tir_inplace"] == ops(module)["call_tir"] == 2
    graph = Graph(module["main"])
    names = [
        graph.definitions[v].args[0].name_hint
        for v in graph.order
        if op_name(graph.definitions[v]).startswith("call_tir")
    ]
    assert names == ["append_kv", f"{phase}_attention"] * 2


def test_sites_of_one_geometry_share_their_kernels() -> None:
    assert kernels(paged("decode")) == ["append_kv", "decode_attention"]
    other = replace(SITES[1], mask=MaskFact("window", 4, "given"))
    assert kernels(paged("decode", (SITES[0], other))) == [
        "append_kv",
        "decode_attention",
        "decode_attention1",
    ]


def test_sites_that_keep_other_tokens_have_pages_of_their_own() -> None:
    other = replace(SITES[1], mask=MaskFact("window", 4, "given"))
    module = paged("prefill", (SITES[0], other))
    inputs = ["tokens", "positions", "slots_0", "slots_1", "tiles", "block_table_0", "block_table_1", "rows"]
    assert params_of(module) == [*inputs, *POOLS, *SHAPES]
    params = {p.name: p for p in module["main"].params}
    assert [shape_of(params[name])[0] for name in POOLS] == ["pages_0", "pages_0", "pages_1", "pages_1"]
    graph = Graph(module["main"])
    calls = [
        graph.definitions[v] for v in graph.order if op_name(graph.definitions[v]).startswith("call_tir")
    ]
    used = [[o.name for o in call.args[1].fields if isinstance(o, relax.Var)] for call in calls]
    assert [name for names in used for name in names if name.startswith(("slots", "block"))] == [
        "slots_0",
        "block_table_0",
        "slots_1",
        "block_table_1",
    ]


def pools() -> list[np.ndarray]:
    """Pools full of values that must not be read."""
    shapes = [(PAGES, KV_HEADS, DIM, PAGE), (PAGES, KV_HEADS, PAGE, DIM)]
    return [np.full(shape, 1e3, np.float32) for _ in SITES for shape in shapes]


def slots(table: np.ndarray, positions: np.ndarray) -> np.ndarray:
    return (table[positions // PAGE] * PAGE + positions % PAGE).astype(np.int32)


def test_pages_compute_what_the_markers_compute() -> None:
    """Two sequences in one prefill, then a decode of both, against each sequence alone."""
    prefill, decode = (Compiled(paged(phase), QUICK) for phase in ("prefill", "decode"))
    lengths, tables = (21, 2), np.array([[4, 1], [2, 5]], np.int32)
    inputs = [tokens_and_positions(n + 1) for n in lengths]
    weights = list(WEIGHTS.values())
    expected = [run_markers(flat(), SITES, t, p, *weights)[0][0] for t, p in inputs]

    tile, tiles, begin = ATTENTION_KERNELS.tile, [], 0
    for row, count in enumerate(lengths):
        for first in range(0, count, tile):
            tiles.append((row, begin + first, min(tile, count - first)))
        begin += count
    tokens = np.concatenate([t[:-1] for t, _ in inputs])
    positions = np.concatenate([p[:-1] for _, p in inputs])
    places = np.concatenate([slots(table, p[:-1]) for table, (_, p) in zip(tables, inputs)])
    rows = np.array([22, 20], np.int32)
    import tvm

    state = [tvm.runtime.tensor(p) for p in pools()]
    call = [tokens, positions, places, np.array(tiles, np.int32), tables, rows]
    got = prefill.machine["main"](*map(tvm.runtime.tensor, call), *state, *map(tvm.runtime.tensor, weights))
    np.testing.assert_allclose(got.numpy()[0], [expected[1][1], expected[0][20]], rtol=0, atol=TOLERANCE)

    tokens, positions = (np.array([pair[i][-1] for pair in inputs]) for i in (0, 1))
    places = np.array([slots(table, p[-1:])[0] for table, (_, p) in zip(tables, inputs)], np.int32)
    call = [tokens, positions, places, tables]
    got = decode.machine["main"](*map(tvm.runtime.tensor, call), *state, *map(tvm.runtime.tensor, weights))
    np.testing.assert_allclose(got.numpy()[0], [e[-1] for e in expected], rtol=0, atol=TOLERANCE)

    used = {0: 21, 1: 2}
    keys = state[0].numpy()
    for table, count in zip(tables, used.values()):
        assert (np.abs(keys[table[0], :, :, : min(count, PAGE)]) < 1e3).all()
    assert (keys[[0, 3]] == 1e3).all(), "pages of nobody stay as they are"
