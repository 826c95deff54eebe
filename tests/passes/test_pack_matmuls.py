"""PackMatmuls: products with weights become kernels on packed weights, others stay."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from flat_graphs import PRODUCTS, QUICK, SITES, WEIGHTS, flat, tokens_and_positions
from packing import packed
from tvm import IRModule, relax, tirx
from tvm.relax import op

from kvc.codegen.lower import fused
from kvc.kernels.cuda.host_products import CudaProducts
from kvc.kernels.cuda.launches import Variants
from kvc.pipeline import Runner
from kvc_passes.loop_nests import OVERWRITES, OVERWRITTEN
from kvc_passes.overwrite_inputs import OverwriteInputs
from kvc_passes.pack_matmuls import MATMUL, PackMatmuls
from kvc_passes.weights import WeightPart
from support import Compiled, floats, module_of, ops, param, params_of, run_markers, symbol

TOLERANCE = 2e-6  # float32 sums of 16 products in another order
N = symbol("n")
X = param("x", [1, N, 16])


def check(module: IRModule, weights: dict[str, np.ndarray], x: np.ndarray) -> dict[str, WeightPart]:
    """Pack, run both, compare; the recipes."""
    result = PackMatmuls(PRODUCTS).run(module)
    known = packed(result.facts, weights)
    (expected,) = Compiled(module)(x, *weights.values())
    (got,) = Compiled(result.module, QUICK)(x, *(known[name] for name in params_of(result.module)[1:]))
    np.testing.assert_allclose(got, expected, rtol=TOLERANCE, atol=TOLERANCE)
    recipes: dict[str, WeightPart] = result.facts
    return recipes


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rank", [2, 3, 4])
def test_a_product_with_a_weight(bias: bool, transposed: bool, rank: int) -> None:
    columns = 40  # no multiple of a panel
    leading = [1] * (rank - 2)
    x = param("x", [*leading, N, 16])
    w = param("w", [columns, 16] if transposed else [16, columns])
    b = param("b", [columns])

    def body(emit: Any, *_: Any) -> Any:
        right = emit(op.permute_dims(w)) if transposed else w
        y = emit(op.matmul(x, right))
        return emit(op.add(b, y)) if bias else y

    params = [x, w, b] if bias else [x, w]
    module, _ = module_of(params, body)
    result = PackMatmuls(PRODUCTS).run(module)
    assert ops(result.module)["matmul"] == ops(result.module)["add"] == 0
    assert ops(result.module)["call_tir"] == result.sites == 1
    weights = {p.name: floats(*(int(d) for d in p.ty.shape.values)) for p in params[1:]}
    check(module, weights, floats(*leading, 7, 16))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("turned", [False, True])
def test_a_residual_goes_into_kernels_that_add(bias: bool, turned: bool) -> None:
    """As those of GPUs do; the CPU's leave the addition to its own function."""
    w, b, rest = param("w", [16, 16]), param("b", [16]), param("rest", [1, N, 16])

    def body(emit: Any, *_: Any) -> Any:
        y = emit(op.matmul(X, w))
        y = emit(op.add(y, b)) if bias else y
        total = emit(op.add(rest, y) if turned else op.add(y, rest))
        return emit(op.tanh(total))

    module, _ = module_of([X, w, b, rest], body)
    adding = PackMatmuls(CudaProducts(Variants(90))).run(module).module
    assert ops(adding)["add"] == 0
    (kernel,) = (f for f in adding.functions.values() if isinstance(f, tirx.PrimFunc))
    assert len(kernel.params) == 4 + bias  # x, the weight, the bias, the residual, y
    assert list(kernel.attrs[OVERWRITES]) == [2 + bias]
    assert ops(PackMatmuls(PRODUCTS).run(module).module)["add"] == 1


@pytest.mark.parametrize(
    ("case", "over"), [("read no more", 1), ("read later", 0), ("multiplied, too", 0), ("a parameter", 0)]
)
def test_a_sum_lies_over_its_residual(case: str, over: int) -> None:
    """Unless something reads that later, or the same product reads it whole, or it is the caller's."""
    w, rest = param("w", [16, 16]), param("rest", [1, N, 16])

    def body(emit: Any, *_: Any) -> Any:
        value = rest if case == "a parameter" else emit(op.tanh(rest))
        x = value if case == "multiplied, too" else X
        total = emit(op.tanh(emit(op.add(emit(op.matmul(x, w)), value))))
        return emit(op.multiply(total, value)) if case == "read later" else total

    module, _ = module_of([X, w, rest], body)
    mod = fused(PackMatmuls(CudaProducts(Variants(90))).run(module).module, QUICK, Runner())
    mod = OverwriteInputs().run(mod).module
    (kernel,) = (f for v, f in mod.functions_items() if v.name_hint.startswith(MATMUL))
    assert len(kernel.params) == 4 - over
    assert (OVERWRITTEN in kernel.attrs) == bool(over)


@pytest.mark.parametrize("bias", [False, True])
def test_of_two_products_that_are_added_both_are_packed(bias: bool) -> None:
    """As where attention and feed-forward stand side by side: the first product adds the second."""
    a, w, b = param("a", [16, 16]), param("w", [16, 16]), param("b", [16])

    def body(emit: Any, *_: Any) -> Any:
        second = emit(op.matmul(emit(op.tanh(X)), w))
        second = emit(op.add(second, b)) if bias else second
        return emit(op.tanh(emit(op.add(emit(op.matmul(X, a)), second))))

    module, _ = module_of([X, a, w, b], body)
    packed_module = PackMatmuls(CudaProducts(Variants(90))).run(module).module
    assert ops(packed_module)["matmul"] == ops(packed_module)["add"] == 0
    assert ops(packed_module)["call_tir"] == 2


def used_twice(emit: Any, y: relax.Expr, rest: relax.Expr) -> relax.Expr:
    return emit(op.multiply(emit(op.add(y, rest)), y))


def doubled(emit: Any, y: relax.Expr, rest: relax.Expr) -> relax.Expr:
    return emit(op.tanh(emit(op.add(y, y))))


def broadcast(emit: Any, y: relax.Expr, rest: relax.Expr) -> relax.Expr:
    return emit(op.tanh(emit(op.add(y, emit(op.sum(rest, 1, keepdims=True))))))


def returned(emit: Any, y: relax.Expr, rest: relax.Expr) -> relax.Expr:
    """The logits' product writes where the caller wants, in a form of its own."""
    return emit(op.add(y, rest))


@pytest.mark.parametrize("body", [used_twice, doubled, broadcast, returned])
def test_other_additions_stay(body: Any) -> None:
    w, rest = param("w", [16, 16]), param("rest", [1, N, 16])
    module, _ = module_of([X, w, rest], lambda emit, *_: body(emit, emit(op.matmul(X, w)), rest))
    assert ops(PackMatmuls(CudaProducts(Variants(90))).run(module).module)["add"] == 1


def test_a_tied_embedding_is_stored_once() -> None:
    result = PackMatmuls(PRODUCTS).run(flat())
    names = params_of(result.module)
    assert "embedding" not in names
    assert sum(name.startswith("embedding") for name in names) == 1
    assert ops(result.module)["take"] == 1  # the positions' table, which is in no product
    known = packed(result.facts, WEIGHTS)
    tokens, positions = tokens_and_positions(9)
    (expected,) = run_markers(flat(), SITES, tokens, positions, *WEIGHTS.values())
    arguments = [known[name] for name in names[2:]]
    (got,) = run_markers(result.module, SITES, tokens, positions, *arguments, target=QUICK)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)


def test_a_tied_embedding_of_16_bits_is_stored_once() -> None:
    """On a CPU its rows are read as they are stored and then cast; the kernel does both."""
    w, ids = param("w", [64, 16], "float16"), param("ids", [1, N], "int64")

    def body(emit: Any, *_: Any) -> Any:
        x = emit(op.astype(emit(op.take(w, ids, axis=0)), "float32"))
        return emit(op.matmul(x, emit(op.permute_dims(emit(op.astype(w, "float32"))))))

    module, _ = module_of([ids, w], body)
    result = PackMatmuls(PRODUCTS).run(module)
    assert params_of(result.module) == ["ids", "w_packed_rows"]
    assert ops(result.module)["take"] == ops(result.module)["astype"] == 0
    weight = floats(64, 16).astype(np.float16)
    known = packed(result.facts, {"w": weight})
    tokens = np.array([[3, 63, 0]])
    (got,) = Compiled(result.module, QUICK)(tokens, known["w_packed_rows"])
    wide = weight.astype(np.float32)
    np.testing.assert_allclose(got[0], wide[tokens[0]] @ wide.T, rtol=0, atol=1e-5)


def test_a_bias_is_added_by_the_kernel_only_where_nothing_else_reads_the_product() -> None:
    w, b = param("w", [16, 32]), param("b", [32])

    def body(emit: Any, *_: Any) -> Any:
        y = emit(op.matmul(X, w))
        return emit(op.tanh(emit(op.multiply(emit(op.add(y, b)), y))))

    module, _ = module_of([X, w, b], body)
    assert ops(PackMatmuls(PRODUCTS).run(module).module)["add"] == 1
    check(module, {"w": floats(16, 32), "b": floats(32, seed=1)}, floats(1, 3, 16))


def test_one_weight_from_both_sides_is_packed_twice() -> None:
    w = param("w", [16, 16])

    def body(emit: Any, *_: Any) -> Any:
        up = emit(op.matmul(X, w))
        return emit(op.add(up, emit(op.matmul(X, emit(op.permute_dims(w))))))

    module, _ = module_of([X, w], body)
    recipes = check(module, {"w": floats(16, 16)}, floats(1, 5, 16))
    assert sorted(r.weight.sources[0].transposed for r in recipes.values()) == [False, True]


def test_a_weight_that_is_also_read_plainly_stays() -> None:
    w = param("w", [16, 16])

    def body(emit: Any, *_: Any) -> Any:
        return emit(op.add(emit(op.matmul(X, w)), emit(op.sum(w))))

    module, _ = module_of([X, w], body)
    assert "w" in params_of(PackMatmuls(PRODUCTS).run(module).module)
    check(module, {"w": floats(16, 16)}, floats(1, 5, 16))


def test_products_of_other_kinds_stay() -> None:
    y, half = param("y", [1, 16, N]), param("half", [16, 8], "float16")
    batch = param("batch", [symbol("b"), N, 16])
    w = param("w", [16, 8])

    def body(emit: Any, *_: Any) -> Any:
        data = emit(op.matmul(X, y))
        low = emit(op.matmul(emit(op.astype(X, "float16")), half))
        many = emit(op.matmul(batch, w))
        constant = emit(op.matmul(relax.const(np.ones((3, 16), np.float32)), w))
        return [data, low, many, constant]

    module, _ = module_of([X, y, half, batch, w], body)
    result = PackMatmuls(PRODUCTS).run(module)
    assert ops(result.module)["matmul"] == 4
    assert (result.sites, result.facts) == (0, {})
