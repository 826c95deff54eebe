"""FuseRows: a reduction of rows and what is around it is one primitive function; the numbers stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from tvm import IRModule, relax
from tvm.relax import op

from kvc_passes.fuse_rows import FuseRows
from support import Compiled, floats, module_of, ops, param, symbol

N = symbol("n")
X, Y, W = param("x", [1, N, 32]), param("y", [1, N, 32]), param("w", [32])
HALF_W = param("half", [32], "float16")
Emit = Callable[[relax.Expr], relax.Var]


def f32(value: float) -> relax.Expr:
    return relax.const(value, "float32")


def rms(emit: Emit, x: relax.Expr, w: relax.Expr) -> relax.Var:
    mean = emit(op.mean(emit(op.multiply(x, x)), -1, keepdims=True))
    return emit(op.multiply(emit(op.multiply(x, emit(op.rsqrt(emit(op.add(mean, f32(1e-5))))))), w))


def rms_norm(emit: Emit) -> relax.Expr:
    return rms(emit, X, W)


def rms_norm_in_float16(emit: Emit) -> relax.Expr:
    """As graphs of 16-bit floats have it, the weight widened, too."""
    wide = emit(op.astype(emit(op.astype(X, "float16")), "float32"))
    y = emit(op.astype(rms(emit, wide, emit(op.astype(HALF_W, "float32"))), "float16"))
    return emit(op.astype(y, "float32"))


def layer_norm(emit: Emit) -> relax.Expr:
    centred = emit(op.subtract(X, emit(op.mean(X, -1, keepdims=True))))
    variance = emit(op.mean(emit(op.multiply(centred, centred)), -1, keepdims=True))
    return emit(op.multiply(emit(op.divide(centred, emit(op.sqrt(emit(op.add(variance, f32(1e-5))))))), W))


def softmax(emit: Emit) -> relax.Expr:
    e = emit(op.exp(emit(op.subtract(X, emit(op.max(X, -1, keepdims=True))))))
    return emit(op.divide(e, emit(op.sum(e, -1, keepdims=True))))


def residual_before(emit: Emit) -> relax.Expr:
    """The sum is used by the norm alone, so that it is part of the group."""
    return rms(emit, emit(op.add(X, Y)), W)


def residual_used_again(emit: Emit) -> relax.Expr:
    """The sum goes on beside the norm: it stays outside."""
    total = emit(op.add(X, Y))
    return emit(
        op.matmul(emit(op.add(total, rms(emit, total, W))), relax.const(np.eye(32, dtype=np.float32)))
    )


def a_constant_row(emit: Emit) -> relax.Expr:
    return rms(emit, X, relax.const(np.linspace(0, 1, 32, dtype=np.float32)))


FUSED = [
    rms_norm,
    rms_norm_in_float16,
    layer_norm,
    softmax,
    residual_before,
    residual_used_again,
    a_constant_row,
]


def build(body: Callable[[Emit], relax.Expr]) -> IRModule:
    return module_of([X, Y, W, HALF_W], lambda emit, *_: body(emit))[0]


def compute(mod: IRModule, length: int) -> np.ndarray:
    """Primitive functions become kernels, as where the pass is used."""
    mod = relax.transform.LegalizeOps()(mod)
    for step in (
        relax.transform.AnnotateTIROpPattern(),
        relax.transform.FuseOps(),
        relax.transform.FuseTIR(),
    ):
        mod = step(mod)
    arrays = [floats(1, length, 32, seed=i) for i in (0, 1)] + [floats(32, seed=2)]
    return Compiled(mod)(*arrays, arrays[2].astype(np.float16))[0]


@pytest.mark.parametrize("body", FUSED, ids=[b.__name__ for b in FUSED])
def test_one_function_computes_the_same(body: Callable[[Emit], relax.Expr]) -> None:
    module = build(body)
    result = FuseRows().run(module)
    assert result.sites == 1
    assert not {"mean", "sum", "max"} & set(ops(result.module))
    fused = [f for f in result.module.functions.values() if isinstance(f, relax.Function)]
    assert sum(bool(f.attrs.get("Primitive", False)) for f in fused) == 1
    for length in (1, 7):
        # Float32 sums of 32 numbers of order 1, and in float16 one unit in the last place.
        limit = 2e-3 if body is rms_norm_in_float16 else 2e-6
        np.testing.assert_allclose(
            compute(result.module, length), compute(module, length), rtol=0, atol=limit
        )


def alone(emit: Emit) -> relax.Expr:
    """A mean that is all there is; nothing could be with it."""
    return emit(op.matmul(emit(op.mean(X, -1, keepdims=True)), relax.const(np.ones((1, 4), np.float32))))


def of_another_axis(emit: Emit) -> relax.Expr:
    return emit(op.add(emit(op.mean(X, 0, keepdims=True)), f32(1.0)))


def without_its_axis(emit: Emit) -> relax.Expr:
    return emit(op.add(emit(op.mean(X, -1)), f32(1.0)))


@pytest.mark.parametrize("body", [alone, of_another_axis, without_its_axis])
def test_other_reductions_stay(body: Callable[[Emit], relax.Expr]) -> None:
    result = FuseRows().run(build(body))
    assert result.sites == 0
    assert ops(result.module)["mean"] == 1


def test_what_two_results_leave_is_made_smaller() -> None:
    """The mean is wanted, too: only what is one result can be a kernel."""

    def body(emit: Emit, *_: Any) -> Any:
        mean = emit(op.mean(X, -1, keepdims=True))
        return [emit(op.subtract(X, mean)), mean]

    module, _ = module_of([X, Y, W, HALF_W], body)
    assert FuseRows().run(module).sites == 0
