"""Converters of activations and products that ONNX Runtime's optimizer writes, and of new ones of ai.onnx."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from tvm import relax
from tvm.relax import op

from kvc_passes.spelled_out import dtype_of

if TYPE_CHECKING:
    from .importer import Importer


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
    "Swish": _swish(1.0),
    "com.microsoft::BiasGelu": _bias_gelu,
    "com.microsoft::FastGelu": _fast_gelu,
    "com.microsoft::FusedMatMul": _fused_matmul,
    "com.microsoft::Gelu": _gelu,
    "com.microsoft::QuickGelu": _swish(1.702),
}
