"""NarrowProducts: products of widened 16-bit floats read the 16-bit floats; everything else stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from tvm import IRModule, relax
from tvm.relax import op

from kvc_passes.graph import Graph, op_name
from kvc_passes.narrow_products import NarrowProducts
from support import module_of, ops, param, run, shape_of, symbol

N = symbol("n")
HALF = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def wide(emit: Any, value: relax.Expr) -> relax.Expr:
    return emit(op.astype(value, "float32"))


def product(
    dtype: str, *, turned: bool = False, bias: bool = False, weight_type: str | None = None
) -> IRModule:
    """x [1, n, 16] of `dtype` -> x w^T (+ bias) summed in float32, as the importer writes it."""
    x = param("x", [1, N, 16], dtype)
    w = param("w", [8, 16] if turned else [16, 8], weight_type or dtype)
    b = param("b", [8], dtype)

    def body(emit: Any, *_: Any) -> Any:
        weight = wide(emit, w) if w.ty.dtype.dtype != "float32" else w
        weight = emit(op.permute_dims(weight)) if turned else weight
        y = emit(op.matmul(wide(emit, x), weight))
        y = emit(op.add(y, wide(emit, b))) if bias else y
        return emit(op.astype(y, dtype))

    return module_of([x, w, b] if bias else [x, w], body)[0]


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("options", [{}, {"turned": True}, {"bias": True}, {"turned": True, "bias": True}])
def test_a_widened_product_reads_16_bits(dtype: str, options: dict[str, bool]) -> None:
    result = NarrowProducts().run(product(dtype, **options))
    assert result.sites == 1
    found = ops(result.module)
    assert found["matmul"] == 1
    assert found["astype"] == 0
    assert found["add"] == options.get("bias", False)
    graph = Graph(result.module["main"])
    (matmul,) = (v for v in graph.order if op_name(graph.definitions[v]) == "matmul")
    assert str(matmul.ty.dtype.dtype) == dtype
    assert shape_of(matmul) == ["1", "n", "8"]


def test_the_numbers_stay() -> None:
    """Small integers: every product and sum is exact in float16."""
    rng = np.random.default_rng(0)
    x, w, b = (rng.integers(-4, 5, s).astype(np.float16) for s in ((1, 5, 16), (8, 16), (8,)))
    module = product("float16", turned=True, bias=True)
    narrowed = NarrowProducts().run(module).module
    np.testing.assert_array_equal(run(narrowed, x, w, b)[0], run(module, x, w, b)[0])


def used_wide(emit: Any, x: relax.Var, w: relax.Var) -> relax.Expr:
    """The float32 sums are wanted, too."""
    y = emit(op.matmul(wide(emit, x), wide(emit, w)))
    return emit(op.add(wide(emit, emit(op.astype(y, "float16"))), y))


def changed_first(emit: Any, x: relax.Var, w: relax.Var) -> relax.Expr:
    """What is multiplied is no 16-bit value."""
    doubled = emit(op.multiply(wide(emit, x), relax.const(2.0, "float32")))
    return emit(op.astype(emit(op.matmul(doubled, wide(emit, w))), "float16"))


def scaled_after(emit: Any, x: relax.Var, w: relax.Var) -> relax.Expr:
    y = emit(op.matmul(wide(emit, x), wide(emit, w)))
    return emit(op.astype(emit(op.multiply(y, relax.const(0.5, "float32"))), "float16"))


def to_another_type(emit: Any, x: relax.Var, w: relax.Var) -> relax.Expr:
    return emit(op.astype(emit(op.matmul(wide(emit, x), wide(emit, w))), "bfloat16"))


@pytest.mark.parametrize("body", [used_wide, changed_first, scaled_after, to_another_type])
def test_other_products_stay(body: Callable[..., relax.Expr]) -> None:
    x, w = param("x", [1, N, 16], "float16"), param("w", [16, 8], "float16")
    module, _ = module_of([x, w], lambda emit, *_: body(emit, x, w))
    result = NarrowProducts().run(module)
    assert result.sites == 0
    assert ops(result.module)["matmul"] == 1
    graph = Graph(result.module["main"])
    (matmul,) = (v for v in graph.order if op_name(graph.definitions[v]) == "matmul")
    assert matmul.ty.dtype.dtype == "float32"


def test_a_weight_of_another_type_stays() -> None:
    assert NarrowProducts().run(product("float16", weight_type="float32")).sites == 0
    assert NarrowProducts().run(product("float16", weight_type="bfloat16")).sites == 0
