"""SimplifyPowers: squares and cubes become products, other powers stay."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tvm
from tvm import IRModule, relax
from tvm.relax import op

from kvc_passes.rebuild import tidy
from kvc_passes.simplify_powers import SimplifyPowers
from support import floats, module_of, ops, param, run, symbol

X = param("x", [symbol("n"), 4])


def power(exponent: Any) -> IRModule:
    return module_of([X], lambda emit, x: emit(op.power(x, exponent)))[0]


def constant(value: float) -> relax.Expr:
    return relax.const(value, "float32")


@pytest.mark.parametrize(("exponent", "products"), [(2.0, 1), (3.0, 2)])
def test_whole_exponents_become_products(exponent: float, products: int) -> None:
    before = power(constant(exponent))
    result = SimplifyPowers().run(before)
    assert (result.sites, ops(result.module)) == (1, {"multiply": products})
    x = floats(5, 4)  # negative numbers too
    np.testing.assert_allclose(run(result.module, x)[0], x**exponent, rtol=3e-7)


def test_the_square_of_a_named_value() -> None:
    def body(emit: Any, x: Any) -> Any:
        return emit(op.multiply(x, x))

    result = SimplifyPowers().run(power(constant(2.0)))
    tvm.ir.assert_structural_equal(result.module, tidy(module_of([X], body)[0]))


@pytest.mark.parametrize(
    "exponent", [constant(0.5), constant(4.0), constant(-2.0), relax.const(np.full((1, 4), 2, np.float32)), X]
)
def test_other_exponents_stay(exponent: relax.Expr) -> None:
    before = power(exponent)
    result = SimplifyPowers().run(before)
    assert (result.sites, ops(result.module)) == (0, {"power": 1})
    tvm.ir.assert_structural_equal(result.module, tidy(before))
