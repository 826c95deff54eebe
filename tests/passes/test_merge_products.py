"""MergeProducts: products of one value become one, where the weights stay apart in the packed form."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from flat_graphs import PRODUCTS, QUICK, SITES, WEIGHTS, flat, tokens_and_positions
from packing import packed
from tvm import IRModule
from tvm.relax import op

from kvc_passes.merge_products import MergeProducts
from kvc_passes.pack_matmuls import PackMatmuls
from support import Compiled, floats, module_of, ops, param, params_of, run, run_markers, symbol

X = param("x", [1, symbol("n"), 16])
TOLERANCE = 2e-6  # float32 sums of 16 products in another order


def products(sizes: list[int], transposed: tuple[int, ...] = ()) -> IRModule:
    """x times weights of these many columns, biases added, all joined."""
    weights = [param(f"w{i}", [n, 16] if i in transposed else [16, n]) for i, n in enumerate(sizes)]
    biases = [param(f"b{i}", [n]) for i, n in enumerate(sizes)]

    def body(emit: Any, *_: Any) -> Any:
        made = []
        for i, (w, b) in enumerate(zip(weights, biases)):
            right = emit(op.permute_dims(w)) if i in transposed else w
            made.append(emit(op.tanh(emit(op.add(emit(op.matmul(X, right)), b)))))
        return emit(op.concat(made, axis=-1))

    return module_of([X, *weights, *biases], body)[0]


def inputs(module: IRModule) -> list[np.ndarray]:
    shapes = [[int(d) for d in p.ty.shape.values] for p in module["main"].params[1:]]
    return [floats(*s, seed=i) / 2 for i, s in enumerate(shapes)]


@pytest.mark.parametrize("transposed", [(), (0,), (1, 2), (0, 1, 2)])
def test_three_products_become_one(transposed: tuple[int, ...]) -> None:
    before = products([64, 32, 32], transposed)
    result = MergeProducts(32).run(before)
    assert (result.sites, ops(result.module)["matmul"]) == (1, 1)
    assert ops(result.module)["strided_slice"] == 3
    x, weights = floats(1, 5, 16), inputs(before)
    np.testing.assert_allclose(
        run(result.module, x, *weights)[0], run(before, x, *weights)[0], atol=TOLERANCE
    )


def test_a_weight_of_odd_size_stays_on_its_own() -> None:
    result = MergeProducts(32).run(products([64, 40, 32]))
    assert ops(result.module)["matmul"] == 2
    assert ops(MergeProducts(32).run(products([64, 40])).module)["matmul"] == 2
    assert MergeProducts(32).run(products([64, 40])).sites == 0


def test_a_weight_that_something_else_reads_stays_on_its_own() -> None:
    a, b = param("a", [16, 32]), param("b", [16, 32])

    def body(emit: Any, *_: Any) -> Any:
        both = emit(op.add(emit(op.matmul(X, a)), emit(op.matmul(X, b))))
        return emit(op.add(both, emit(op.sum(a))))

    assert MergeProducts(32).run(module_of([X, a, b], body)[0]).sites == 0


def test_one_weight_used_twice_is_no_group() -> None:
    a = param("a", [16, 32])

    def body(emit: Any, *_: Any) -> Any:
        return emit(op.add(emit(op.matmul(X, a)), emit(op.matmul(X, a))))

    assert MergeProducts(32).run(module_of([X, a], body)[0]).sites == 0


def test_products_of_different_values_stay_apart() -> None:
    a, b = param("a", [16, 32]), param("b", [16, 32])

    def body(emit: Any, *_: Any) -> Any:
        return emit(op.add(emit(op.matmul(X, a)), emit(op.matmul(emit(op.exp(X)), b))))

    assert MergeProducts(32).run(module_of([X, a, b], body)[0]).sites == 0


def test_merged_products_are_packed_as_one_weight() -> None:
    before = products([PRODUCTS.panel, 2 * PRODUCTS.panel], (1,))
    merged = MergeProducts(PRODUCTS.panel).run(before).module
    result = PackMatmuls(PRODUCTS).run(merged)
    (recipe,) = result.facts.values()
    assert [(s.name, s.columns, s.transposed) for s in recipe.weight.sources] == [
        ("w0", PRODUCTS.panel, True),
        ("w1", 2 * PRODUCTS.panel, False),
    ]
    names = [p.name for p in before["main"].params[1:]]
    weights = dict(zip(names, inputs(before)))
    known = packed(result.facts, weights)
    x = floats(1, 5, 16)
    (expected,) = run(before, x, *weights.values())
    (got,) = Compiled(result.module, QUICK)(x, *(known[n] for n in params_of(result.module)[1:]))
    np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCE)


def test_query_key_and_value_of_a_decoder_are_merged() -> None:
    merged = MergeProducts(16).run(flat())
    assert merged.sites == 2
    tokens, positions = tokens_and_positions(9)
    (expected,) = run_markers(flat(), SITES, tokens, positions, *WEIGHTS.values())
    (got,) = run_markers(merged.module, SITES, tokens, positions, *WEIGHTS.values())
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)
