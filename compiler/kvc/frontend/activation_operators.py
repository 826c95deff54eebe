"""Converters of activations and products that ONNX Runtime's optimizer writes, and of new ones of ai.onnx."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from tvm import relax
from tvm.relax import op

from kvc_passes.spelled_out import dtype_of

if TYPE_CHECKING:
    from .graph_importer import Importer


def _gelu(importer: Importer, inputs: Sequence[Any], attrs: dict[str, Any]) -> relax.Expr:
    x = importer.tensor(inputs[0])
    approximate = attrs.get("approximate", b"none") in (b"tanh", "tanh")
    return op.nn.gelu_tanh(x) if approximate else op.nn.gelu(x)


def _bias_gelu(importer: Importer, inputs: Sequence[Any], attrs: dict[str, Any]) -> relax.Expr:
    return op.nn.gelu(_with_bias(importer, inputs))


def _fast_gelu(importer: Importer, inputs: Sequence[Any], attrs: dict[str, Any]) -> relax.Expr:
    return op.nn.gelu_tanh(_with_bias(importer, inputs))


def _with_bias(importer: Importer, inputs: Sequence[Any]) -> relax.Expr:
    x = importer.tensor(inputs[0])
    return x if inputs[1] is None else importer.emit(op.add(x, importer.tensor(inputs[1])))


def _swish(default: float) -> Callable[[Importer, Sequence[Any], dict[str, Any]], relax.Expr]:
    def convert(importer: Importer, inputs: Sequence[Any], attrs: dict[str, Any]) -> relax.Expr:
        x = importer.tensor(inputs[0])
        alpha = attrs.get("alpha", default)
        inner = x if alpha == 1 else importer.emit(op.multiply(x, relax.const(alpha, dtype_of(x))))
        return op.multiply(x, importer.emit(op.sigmoid(inner)))

    return convert


def _swiglu(importer: Importer, inputs: Sequence[Any], attrs: dict[str, Any]) -> relax.Expr:
    gate = importer.emit(_swish(1.0)(importer, inputs, attrs))
    return op.multiply(gate, importer.tensor(inputs[1]))


def _mish(importer: Importer, inputs: Sequence[Any], attrs: dict[str, Any]) -> relax.Expr:
    """x tanh(log(1 + e^x)) as x n / (n + 2) with n = e^x (e^x + 2), which keeps its digits below zero."""
    emit, x = importer.emit, importer.tensor(inputs[0])
    dtype = dtype_of(x)
    two = relax.const(2.0, dtype)
    power = emit(op.exp(emit(op.minimum(x, relax.const(20.0, dtype)))))  # from there on, the factor is 1
    n = emit(op.multiply(power, emit(op.add(power, two))))
    return op.multiply(x, emit(op.divide(n, emit(op.add(n, two)))))


def _softplus(importer: Importer, inputs: Sequence[Any], attrs: dict[str, Any]) -> relax.Expr:
    """log(1 + e^x) as max(x, 0) + log(1 + w) with w = e^-|x|; the rounding of 1 + w is divided out."""
    emit, x = importer.emit, importer.tensor(inputs[0])
    one, zero = (relax.const(float(v), dtype_of(x)) for v in (1, 0))
    w = emit(op.exp(emit(op.negative(emit(op.abs(x))))))
    rounded = emit(op.add(one, w))
    excess = emit(op.subtract(rounded, one))
    some = emit(op.greater(excess, zero))
    divisor = emit(op.where(some, excess, one))
    logarithm = emit(op.multiply(emit(op.log(rounded)), emit(op.divide(w, divisor))))
    return op.add(emit(op.maximum(x, zero)), emit(op.where(some, logarithm, w)))


def _fused_matmul(importer: Importer, inputs: Sequence[Any], attrs: dict[str, Any]) -> relax.Expr:
    if attrs.get("transBatchA", 0) or attrs.get("transBatchB", 0):
        raise ValueError("it transposes the batch (transBatchA, transBatchB)")
    left, right = (
        _transposed(importer, importer.tensor(x)) if attrs.get(name, 0) else importer.tensor(x)
        for x, name in zip(inputs, ("transA", "transB"))
    )
    product = op.matmul(left, right)
    alpha = attrs.get("alpha", 1.0)
    if alpha == 1.0:
        return product
    return op.multiply(importer.emit(product), relax.const(alpha, dtype_of(left)))


def _transposed(importer: Importer, x: relax.Expr) -> relax.Expr:
    rank = len(importer.shape(x))
    if rank < 2:
        return x
    return importer.emit(op.permute_dims(x, [*range(rank - 2), rank - 1, rank - 2]))


CONVERTERS: dict[str, Callable[[Any, Sequence[Any], dict[str, Any]], Any]] = {
    "Gelu": _gelu,
    "Mish": _mish,
    "Softplus": _softplus,
    "SwiGLU": _swiglu,
    "Swish": _swish(1.0),
    "com.microsoft::BiasGelu": _bias_gelu,
    "com.microsoft::FastGelu": _fast_gelu,
    "com.microsoft::FusedMatMul": _fused_matmul,
    "com.microsoft::Gelu": _gelu,
    "com.microsoft::QuickGelu": _swish(1.702),
}
