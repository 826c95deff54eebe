"""WriteLogits: the result stands in a tensor of the caller's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tvm
from flat_graphs import (
    ATTENTION_KERNELS,
    PRODUCTS,
    QUICK,
    SITES,
    VOCAB,
    WEIGHTS,
    flat,
    tokens_and_positions,
)
from packing import packed
from tvm import IRModule

from kvc_passes.pack_matmuls import PackMatmuls
from kvc_passes.page_attention import PageAttention
from kvc_passes.select_rows import SelectRows
from kvc_passes.write_logits import WriteLogits
from support import Compiled, ops, params_of, run_markers, shape_of


def written(phase: Any, cap: float | None) -> tuple[IRModule, Any]:
    module = SelectRows().run(flat(cap)).module if phase == "prefill" else flat(cap)
    module = PageAttention(SITES, ATTENTION_KERNELS, phase).run(module).module
    result = PackMatmuls(PRODUCTS).run(module)
    return WriteLogits(PRODUCTS, result.facts).run(result.module).module, result.facts


@pytest.mark.parametrize(("phase", "behind"), [("prefill", "rows"), ("decode", "block_table")])
@pytest.mark.parametrize("cap", [None, 3.0])
def test_the_logits_are_a_parameter_before_the_pools(phase: str, behind: str, cap: float | None) -> None:
    module, _ = written(phase, cap)
    names = params_of(module)
    assert names[names.index(behind) : names.index(behind) + 3] == [behind, "logits", "k_0"]
    rows = "r" if phase == "prefill" else "n"
    assert shape_of(module["main"].params[names.index("logits")]) == [rows, str(VOCAB)]
    assert shape_of(module["main"].body.body) == [rows, str(VOCAB)]
    assert ops(module)["call_tir_inplace"] == 3  # two appends, and the logits
    kernels = {v.name_hint for v, _ in module.functions_items()}
    assert ("packed_matmul_logits" in kernels) == (cap is None)
    assert ("copy_logits" in kernels) == (cap is not None)


@pytest.mark.parametrize("cap", [None, 3.0])
def test_they_are_written_there(cap: float | None) -> None:
    module, recipes = written("decode", cap)
    known = packed(recipes, WEIGHTS)
    compiled = Compiled(module, QUICK)
    tokens, positions = tokens_and_positions(1)
    (expected,) = run_markers(flat(cap), SITES, tokens, positions, *WEIGHTS.values())
    page = ATTENTION_KERNELS.page_size
    keys, values = (np.zeros(s, np.float32) for s in ((1, 2, 8, page), (1, 2, page, 8)))
    logits = tvm.runtime.tensor(np.full((1, VOCAB), 7, np.float32))
    names = params_of(module)
    weights = [known[n] for n in names[names.index("v_1") + 1 :]]
    integers = [tokens, positions, np.zeros(1, np.int32), np.zeros((1, 1), np.int32)]
    before = [tvm.runtime.tensor(a) for a in integers]
    after = [tvm.runtime.tensor(a) for a in (keys, keys.copy(), values, values.copy(), *weights)]
    returned = compiled.machine["main"](*before, logits, *after)
    np.testing.assert_allclose(logits.numpy(), expected[0], rtol=0, atol=1e-5)
    np.testing.assert_array_equal(returned.numpy(), logits.numpy())
