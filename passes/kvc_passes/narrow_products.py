"""Products of 16-bit floats are taken of 16-bit floats, where their sums are float32 anyway."""

from __future__ import annotations

from dataclasses import dataclass

from tvm import IRModule, relax

from .base import Result
from .graph import Graph, dims, graph_of, op_name
from .rebuild import rebuild

_NARROW = ("float16", "bfloat16")


@dataclass(frozen=True)
class NarrowProducts:
    """Products whose operands are 16-bit floats that were widened read the 16-bit floats themselves.

    Before: `astype(matmul(astype(x, float32), w), t)` with x of the 16-bit type t, and w [depth, columns] a
        value of type t that was widened, perhaps transposed; a widened bias of type t may be added between.
    After: `matmul(x, w)` of type t; the bias is added to it.
    Needs: a target whose kernels sum the products of 16-bit floats in float32, and round once. PackMatmuls
        after it puts the bias into the kernel, before the rounding.
    Refuses: nothing; other products stay.
    """

    def run(self, mod: IRModule) -> Result:
        graph = graph_of(mod["main"])
        values: dict[relax.Var, relax.Expr] = {}
        found = {var: match for var in graph.order if (match := _match(graph, var)) is not None}

        def place(builder: relax.BlockBuilder, var: relax.Var, value: relax.Expr) -> relax.Expr | None:
            if var not in found:
                return None
            match = found[var]
            weight = _narrowed(builder, graph, match.weight, values)
            product = relax.op.matmul(values.get(match.x, match.x), weight)
            if match.bias is None:
                return product
            bias = values.get(match.bias, match.bias)
            return relax.op.add(builder.emit(product, name_hint=var.name), bias)

        return Result(rebuild(mod, mod["main"].params, place, values=values), len(found))


@dataclass(frozen=True)
class _Match:
    x: relax.Var
    weight: relax.Expr
    bias: relax.Var | None


def _match(graph: Graph, var: relax.Var) -> _Match | None:
    dtype = _dtype(var)
    cast = graph.definitions[var]
    if op_name(cast) != "astype" or dtype not in _NARROW:
        return None
    inner, bias = cast.args[0], None
    call = graph.resolve(inner)
    if op_name(call) == "add":
        sides = [(call.args[i], graph.resolve(call.args[i]), call.args[1 - i]) for i in (0, 1)]
        side = next((s for s in sides if op_name(s[1]) == "matmul"), None)
        if side is None or len(graph.users[graph.alias(side[0])]) != 1:
            return None
        bias = _widened(graph, side[2], dtype)
        if bias is None or len(dims(bias)) != 1:
            return None
        call = side[1]
    if op_name(call) != "matmul" or len(graph.users[graph.alias(inner)]) != 1:
        return None
    x = _widened(graph, call.args[0], dtype)
    if x is None or len(dims(call.args[1])) != 2 or not _can_narrow(graph, call.args[1], dtype):
        return None
    return _Match(x, call.args[1], bias)


def _widened(graph: Graph, value: relax.Expr, dtype: str) -> relax.Var | None:
    """The value of type `dtype` behind a cast to float32."""
    call = graph.resolve(value)
    if op_name(call) != "astype" or _dtype(call.args[0]) != dtype:
        return None
    inner = call.args[0]
    return inner if isinstance(inner, relax.Var) else None


def _can_narrow(graph: Graph, value: relax.Expr, dtype: str) -> bool:
    if _widened(graph, value, dtype) is not None:
        return True
    call = graph.resolve(value)
    return op_name(call) == "permute_dims" and _can_narrow(graph, call.args[0], dtype)


def _narrowed(
    builder: relax.BlockBuilder, graph: Graph, value: relax.Expr, values: dict[relax.Var, relax.Expr]
) -> relax.Expr:
    """A widened weight without the cast."""
    call = graph.resolve(value)
    if op_name(call) == "astype":
        return values.get(call.args[0], call.args[0])
    inner = _narrowed(builder, graph, call.args[0], values)
    if not isinstance(inner, relax.Var):
        inner = builder.emit(inner)
    return builder.emit(relax.op.permute_dims(inner, call.attrs.axes))


def _dtype(value: relax.Expr) -> str:
    return str(getattr(getattr(value.ty, "dtype", None), "dtype", ""))
