"""EncodeMemory and PageAttention: keys and values of rows are kept by one function and read by the others."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from flat_graphs import ATTENTION_KERNELS, DIM, HEADS, QUICK
from head_products import define_head_product
from tvm import IRModule, relax
from tvm.relax import op

from kvc_passes.absorb_projections import AbsorbProjections
from kvc_passes.encode_memory import EncodeMemory
from kvc_passes.markers import ATTENTION
from kvc_passes.page_attention import PageAttention
from kvc_passes.sites import AttentionSite, MaskFact
from support import Compiled, Draft, floats, module_of, ops, param, params_of, shape_of, site, symbol

WIDTH, ROWS, PAGES = 16, 21, 4
PAGE = ATTENTION_KERNELS.page_size
MEMORY_MASK = MaskFact("memory", None, "given", predicate="True")
SITES = tuple(site(i, mask=MEMORY_MASK, kv_heads=HEADS, head_dim=DIM, value_dim=DIM) for i in range(2))
SHAPES = {f"{name}{i}": (WIDTH, HEADS * DIM) for i in range(2) for name in ("query", "key", "value")}
WEIGHTS = {name: floats(*shape, seed=i) / 4 for i, (name, shape) in enumerate(SHAPES.items())}


def decoder() -> IRModule:
    """`main(tokens [n], positions [n], memory [1, rows, d], weights...)`, two cross-attentions, summed."""
    n, rows = symbol("n"), symbol("rows")
    params = [param("tokens", [n], "int64"), param("positions", [n], "int64")]
    params += [param("memory", [1, rows, WIDTH])]
    weights = {name: param(name, shape) for name, shape in SHAPES.items()}

    def body(emit: Draft, tokens: relax.Var, _: relax.Var, memory: relax.Var, *__: Any) -> relax.Expr:
        words = emit(op.astype(emit(op.reshape(tokens, [1, n, 1])), "float32"))
        x = emit(op.sin(emit(op.multiply(words, relax.const(floats(1, 1, WIDTH))))))

        def heads(given: relax.Var, name: str, count: Any) -> relax.Var:
            product = emit(op.matmul(given, weights[name]))
            return emit(op.permute_dims(emit(op.reshape(product, [1, count, HEADS, DIM])), [0, 2, 1, 3]))

        total: Any = None
        for i in range(2):
            q = heads(x, f"query{i}", n)
            k, v = heads(memory, f"key{i}", rows), heads(memory, f"value{i}", rows)
            out = relax.TensorType([1, n, HEADS, DIM], "float32")
            mixed = emit(op.call_pure_packed(ATTENTION, q, k, v, relax.prim_value(i), ty_args=out))
            total = mixed if total is None else emit(op.add(total, mixed))
        return total

    return module_of([*params, *weights.values()], body)[0]


def absorbed() -> tuple[IRModule, tuple[AttentionSite, ...]]:
    result = AbsorbProjections(SITES, frozenset({0, 1})).run(decoder())
    return result.module, result.facts


def expected(tokens: np.ndarray, memory: np.ndarray) -> np.ndarray:
    """In float64: every token sees every row."""
    words = tokens.reshape(1, -1, 1).astype(np.float64)
    x = np.sin(words * floats(1, 1, WIDTH))[0]
    total = 0.0
    for i in range(2):
        q, k, v = (
            (given @ WEIGHTS[f"{name}{i}"].astype(np.float64)).reshape(-1, HEADS, DIM).transpose(1, 0, 2)
            for given, name in ((x, "query"), (memory, "key"), (memory, "value"))
        )
        scores = SITES[i].scale * q @ k.transpose(0, 2, 1)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        total = total + (p / p.sum(-1, keepdims=True)) @ v
    return total.transpose(1, 0, 2)


def test_the_function_that_keeps_keys_and_values() -> None:
    result = EncodeMemory(SITES, ATTENTION_KERNELS, "memory").run(decoder())
    assert result.sites == 2
    names = ["memory", "slots", "k_0", "v_0", "k_1", "v_1", "key0", "value0", "key1", "value1"]
    assert params_of(result.module) == names
    params = {p.name: p for p in result.module["main"].params}
    assert [shape_of(params[name]) for name in names[:2]] == [["n", str(WIDTH)], ["n"]]
    assert ops(result.module)["call_tir_inplace"] == 2
    assert ops(result.module)["matmul"] == 4


def test_one_pool_holds_what_all_layers_read() -> None:
    module, sites = absorbed()
    assert [(s.kept, s.owner, s.token_bytes()) for s in sites] == [
        ("encoder_output", None, 4 * WIDTH),
        ("encoder_output", 0, 0),
    ]
    result = EncodeMemory(sites, ATTENTION_KERNELS, "memory").run(module)
    assert params_of(result.module) == ["memory", "slots", "x_0"]
    assert ops(result.module)["matmul"] == 0


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_the_functions_that_read_them(phase: Any) -> None:
    """No row is written, and what made them is no parameter any more."""
    module = PageAttention(SITES, ATTENTION_KERNELS, phase).run(decoder()).module
    tiles = ["tiles"] if phase == "prefill" else []
    pools = ["k_0", "v_0", "k_1", "v_1"]
    inputs = ["tokens", "positions", *tiles, "block_table_0", "memory_last"]
    assert params_of(module) == [*inputs, *pools, "query0", "query1"]
    assert ops(module)["call_tir_inplace"] == 0


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("form", ["paged_kv", "encoder_output"])
def test_what_is_kept_is_what_is_read(form: str, phase: Any) -> None:
    """Two sequences with other numbers of rows, their pages in disorder; rows are given in two parts."""
    module, sites = (decoder(), SITES) if form == "paged_kv" else absorbed()
    define_head_product()
    encode = Compiled(EncodeMemory(sites, ATTENTION_KERNELS, "memory").run(module).module, QUICK)
    read = PageAttention(sites, ATTENTION_KERNELS, phase).run(module).module
    pools = [
        np.zeros((PAGES, *shape), np.float32)
        for each in sites
        for _, shape in each.state(PAGE, ATTENTION_KERNELS.keys_transposed).values()
    ]
    tables, counts = [[2, 0], [3, 1]], [ROWS, 5]
    memories = [floats(count, WIDTH, seed=9 + count) for count in counts]
    weights = [WEIGHTS[f"{name}{i}"] for i in range(2) for name in ("key", "value")]
    for table, memory in zip(tables, memories):
        slots = np.array([table[i // PAGE] * PAGE + i % PAGE for i in range(len(memory))], np.int32)
        for part in (slice(0, 3), slice(3, None)):
            given = [memory[part], slots[part], *pools, *(weights if form == "paged_kv" else [])]
            pools = encode(*given)
    per = 3 if phase == "prefill" else 1
    tokens = np.arange(2 * per) + 1
    last = np.repeat(np.array(counts) - 1, per)
    inputs: list[np.ndarray] = [tokens, np.zeros(2 * per, np.int64)]
    if phase == "prefill":
        inputs.append(np.array([[0, 0, 3], [1, 3, 3]], np.int32))
    inputs += [np.array(tables, np.int32), last]
    used = [WEIGHTS[name] for name in params_of(read) if name in WEIGHTS]
    got = _run(read, [*inputs, *pools, *used])
    for s in range(2):
        own = slice(s * per, (s + 1) * per)
        wanted = expected(tokens[own], memories[s].astype(np.float64))
        np.testing.assert_allclose(got[0][own], wanted, rtol=0, atol=1e-5)  # float32 sums of 16 products


def _run(module: IRModule, arrays: list[np.ndarray]) -> np.ndarray:
    return Compiled(module, QUICK)(*arrays)[0]
