"""Activations in float32, whatever 16-bit float the graph names; weights stay as they are stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import IRModule, relax
from tvm.ir import GenericConst

from .base import Result
from .graph import graph_of, op_name
from .rebuild import rebuild

NARROW = ("float16", "bfloat16")


@dataclass(frozen=True)
class ComputeInFloat32:
    """Every 16-bit float value becomes float32: for targets whose arithmetic is.

    Before: values, constants and parameters of float16 and bfloat16.
    After: values and constants are float32; a parameter keeps its type, and is cast where it is used. Rows
        that a `take` reads are cast after it. Casts to 16-bit types are gone.
    Needs: RecognizeAttention (it reads the type that keys and values are kept in).
    Refuses: nothing. Sums and products are rounded less than in the graph's own type.
    """

    def run(self, mod: IRModule) -> Result:
        function = mod["main"]
        graph = graph_of(function)
        narrow = [v for v in graph.order if _is_narrow(v)]
        params = {p for p in function.params if _is_narrow(p)}
        if not narrow and not params:
            return Result(mod, 0)
        widened: dict[Any, relax.Var] = {}

        def wide(builder: relax.BlockBuilder, operand: relax.Expr) -> relax.Expr:
            if isinstance(operand, relax.Tuple):
                return relax.Tuple([wide(builder, field) for field in operand.fields])
            if isinstance(operand, GenericConst) and _is_narrow(operand):
                return relax.const(operand.value.numpy().astype(np.float32), "float32")
            if operand not in params:
                return operand
            if operand not in widened:
                widened[operand] = builder.emit(relax.op.astype(operand, "float32"))
            return widened[operand]

        def place(builder: relax.BlockBuilder, var: relax.Var, value: relax.Expr) -> relax.Expr | None:
            if not isinstance(value, relax.Call):
                return wide(builder, value) if isinstance(value, (relax.Var, GenericConst)) else None
            name = op_name(value)
            if name == "take" and value.args[0] in params:
                return relax.op.astype(builder.emit(value), "float32")
            if name == "kvc.dequantize":
                return relax.Call(value.op, value.args, value.attrs, [_wide_type(t) for t in value.ty_args])
            args = [wide(builder, a) for a in value.args]
            if name == "astype":
                return _cast(args[0], str(value.attrs.dtype))
            remade = _remake(name, value, args)
            if remade is not None:
                return remade
            return relax.Call(value.op, args, value.attrs, [_wide_type(t) for t in value.ty_args])

        return Result(rebuild(mod, function.params, place), len(narrow))


def _is_narrow(value: Any) -> bool:
    return str(getattr(getattr(value.ty, "dtype", None), "dtype", "")) in NARROW


def _wide_type(type_: Any) -> Any:
    if isinstance(type_, relax.TensorType) and str(type_.dtype.dtype) in NARROW:
        return relax.TensorType(type_.shape, "float32")
    return type_


def _cast(value: relax.Expr, dtype: str) -> relax.Expr:
    target = "float32" if dtype in NARROW else dtype
    return value if str(value.ty.dtype.dtype) == target else relax.op.astype(value, target)


def _remake(name: str, call: relax.Call, args: list[relax.Expr]) -> relax.Expr | None:
    """Operations whose attributes name the type of the result."""
    dtype = str(getattr(call.attrs, "dtype", None) or getattr(call.attrs, "out_dtype", None) or "")
    if dtype not in NARROW:
        return None
    makers = {
        "full": lambda: relax.op.full(args[0], args[1], "float32"),
        "zeros": lambda: relax.op.zeros(args[0], "float32"),
        "ones": lambda: relax.op.ones(args[0], "float32"),
        "arange": lambda: relax.op.arange(*args[:3], "float32"),
        "matmul": lambda: relax.op.matmul(*args[:2]),
    }
    return makers[name]() if name in makers else None
