"""WriteLogits: the result stands in a tensor of the caller's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tvm
from flat_graphs import ATTENTION_KERNELS, PRODUCTS, QUICK, SITES, VOCAB, flat
from packing import packed
from tvm import IRModule, relax
from tvm.relax import op

from kvc_passes.pack_matmuls import PackMatmuls
from kvc_passes.page_attention import PageAttention
from kvc_passes.select_rows import SelectRows
from kvc_passes.write_logits import WriteLogits
from support import Compiled, floats, module_of, ops, param, params_of, run, shape_of, symbol


def written(phase: Any, cap: float | None) -> tuple[IRModule, Any]:
    module = SelectRows().run(flat(cap)).module if phase == "prefill" else flat(cap)
    module = PageAttention(SITES, ATTENTION_KERNELS, phase).run(module).module
    result = PackMatmuls(PRODUCTS).run(module)
    return WriteLogits(PRODUCTS, result.facts).run(result.module).module, result.facts


@pytest.mark.parametrize(("phase", "behind"), [("prefill", "rows"), ("decode", "block_table_0")])
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
    x, w = param("x", [1, symbol("n"), 16]), param("w", [16, VOCAB])
    table = param("block_table_0", [symbol("n"), symbol("m")], "int32")

    def body(emit: Any, *_: Any) -> Any:
        y = emit(op.matmul(x, w))
        return y if cap is None else emit(op.multiply(emit(op.tanh(y)), relax.const(cap, "float32")))

    before, _ = module_of([x, table, w], body)
    packing = PackMatmuls(PRODUCTS).run(before)
    result = WriteLogits(PRODUCTS, packing.facts).run(packing.module)
    assert params_of(result.module)[:3] == ["x", "block_table_0", "logits"]
    values, pages, weight = floats(1, 5, 16), np.zeros((5, 1), np.int32), floats(16, VOCAB, seed=1) / 2
    (expected,) = run(before, values, pages, weight)
    (known,) = (packed(packing.facts, {"w": weight})[n] for n in packing.facts)
    logits = tvm.runtime.tensor(np.full((5, VOCAB), 7, np.float32))
    compiled = Compiled(result.module, QUICK)
    returned = compiled.machine["main"](
        *map(tvm.runtime.tensor, (values, pages)), logits, tvm.runtime.tensor(known)
    )
    np.testing.assert_allclose(logits.numpy(), expected[0], rtol=0, atol=2e-6)
    np.testing.assert_array_equal(returned.numpy(), logits.numpy())
