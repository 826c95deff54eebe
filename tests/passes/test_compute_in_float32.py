"""ComputeInFloat32: values and constants become float32, parameters keep the type that they are stored in."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from tvm import IRModule, relax
from tvm.relax import op

from kvc_passes.compute_in_float32 import ComputeInFloat32
from kvc_passes.graph import Graph, op_name
from support import Compiled, floats, module_of, ops, param, symbol

N = symbol("n")
TYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def model(dtype: str) -> IRModule:
    """ids [n] -> float32 [n, 8], computed in `dtype` with weights of that type."""
    ids, table = param("ids", [N], "int64"), param("table", [32, 16], dtype)
    weight, scale = param("weight", [8, 16], dtype), param("scale", [16], dtype)

    def body(emit: Any, *_: Any) -> Any:
        x = emit(op.take(table, ids, axis=0))
        wide = emit(op.astype(x, "float32"))
        mean = emit(op.mean(emit(op.multiply(wide, wide)), -1, keepdims=True))
        x = emit(op.multiply(emit(op.astype(emit(op.divide(wide, emit(op.sqrt(mean)))), dtype)), scale))
        x = emit(op.add(x, relax.const(np.full(16, 0.25, TYPES[dtype]), dtype)))
        ones = emit(op.full([N, 16], relax.const(np.array(2.0, TYPES[dtype]), dtype), dtype))
        x = emit(op.multiply(x, ones))
        y = emit(op.matmul(x, emit(op.permute_dims(weight)), out_dtype=dtype))
        chosen = emit(op.where(emit(op.greater(y, relax.const(np.array(0, TYPES[dtype]), dtype))), y, y))
        return emit(op.astype(chosen, "float32"))

    return module_of([ids, table, weight, scale], body)[0]


@pytest.mark.parametrize("dtype", TYPES)
def test_no_value_of_16_bits_is_left_but_weights_as_they_are_stored(dtype: str) -> None:
    mod = model(dtype)
    result = ComputeInFloat32().run(mod)
    assert result.sites > 0
    function = result.module["main"]
    assert [str(p.ty.dtype.dtype) for p in function.params] == ["int64", dtype, dtype, dtype]
    graph = Graph(function)
    narrow = [v for v in graph.order if str(v.ty.dtype.dtype) == dtype]
    # The rows that were read, and a transposed view of nothing: only the rows are 16-bit values.
    assert [op_name(graph.definitions[v]) for v in narrow] == ["take"]
    assert ops(result.module)["astype"] == 3  # the rows, the weight, the scale
    assert ops(mod)["take"] == 1  # the given module is as it was


@pytest.mark.parametrize("dtype", TYPES)
def test_the_numbers_are_those_of_float32_arithmetic(dtype: str) -> None:
    """Against float64 on the same weights: float32 rounding of sums of 16 values of order 1."""
    kind = TYPES[dtype]
    table, weight, scale = (floats(*s, seed=i).astype(kind) for i, s in enumerate([(32, 16), (8, 16), (16,)]))
    ids = np.array([3, 31, 0, 7], np.int64)
    x = table.astype(np.float64)[ids]
    x = x / np.sqrt((x * x).mean(-1, keepdims=True)) * scale.astype(np.float64) + 0.25
    expected = 2 * x @ weight.astype(np.float64).T
    module = ComputeInFloat32().run(model(dtype)).module
    (got,) = Compiled(module)(ids, table, weight, scale)
    np.testing.assert_allclose(got, expected, rtol=2e-6, atol=2e-6)


def test_float32_stays_as_it_is() -> None:
    mod = module_of([param("x", [N, 4])], lambda emit, x: emit(op.tanh(x)))[0]
    result = ComputeInFloat32().run(mod)
    assert result.sites == 0
    assert result.module.same_as(mod)
