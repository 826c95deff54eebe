"""Which operators compute half-precision tensors in float32: those that sum, and whose sums TVM rounds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tvm import relax
from tvm.relax import op

from kvc_passes.spelled_out import dtype_of

if TYPE_CHECKING:
    from .graph_importer import Importer

_HALF = ("float16", "bfloat16")
_SUMMING = frozenset(
    [
        *("Conv", "Einsum", "Gemm", "LogSoftmax", "MatMul", "Mean", "Softmax", "Sum"),
        *(
            "ReduceL1",
            "ReduceL2",
            "ReduceLogSum",
            "ReduceLogSumExp",
            "ReduceMean",
            "ReduceSum",
            "ReduceSumSquare",
        ),
    ]
)


def narrow(operator: str, inputs: Sequence[Any]) -> str | None:
    """The half-precision type of a summing operator's inputs, None if it has none."""
    if operator not in _SUMMING:
        return None
    return next((d for d in map(_dtype, inputs) if d in _HALF), None)


def widened(importer: Importer, value: Any) -> Any:
    """A half-precision tensor as float32, anything else as it is."""
    return importer.emit(op.astype(value, "float32")) if _dtype(value) in _HALF else value


def _dtype(value: Any) -> str | None:
    is_tensor = isinstance(value, relax.Expr) and isinstance(value.ty, relax.TensorType)
    return dtype_of(value) if is_tensor else None
