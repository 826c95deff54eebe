"""Operators become calls of PrimFuncs; what every layer repeats is generated once."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

from tvm import IRModule, ir, relax
from tvm.ir import GenericConst
from tvm_ffi import StructuralKey

from kvc_passes.graph import graph_of, op_name


@dataclass
class _Memory:
    """Calls that were legalized: the PrimFunc, and which operands it takes."""

    made: dict[Hashable, tuple[Any, tuple[int, ...]]] = field(default_factory=dict)

    def rule(self, default: Callable[[Any, relax.Call], relax.Expr]) -> Callable[..., relax.Expr]:
        def legalize(builder: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
            key = _key(call)
            if key in self.made:
                function, taken = self.made[key]
                return relax.op.call_tir(function, [call.args[i] for i in taken], call.ty)
            result = default(builder, call)
            if key is not None and _makes_one_tensor(result):
                places = {arg: i for i, arg in enumerate(call.args) if isinstance(arg, relax.Var)}
                operands = list(result.args[1].fields)
                if len(places) == len(operands) and all(o in places for o in operands):
                    order = tuple(places[o] for o in operands)
                    self.made[key] = (result.args[0], order)
            return result

        return legalize


def _makes_one_tensor(result: relax.Expr) -> bool:
    """Whether this is call_tir(function, tensors) -> tensor, without further arguments."""
    if op_name(result) != "call_tir" or len(result.args) != 2:
        return False
    return isinstance(result.ty_args[0], relax.TensorType)


def _key(call: relax.Call) -> Hashable | None:
    """Equal for calls that become the same PrimFunc; None for operands that are not known to allow that."""
    parts: list[Hashable] = [call.op.name, None if call.attrs is None else StructuralKey(call.attrs)]
    for arg in call.args:
        if isinstance(arg, relax.Var):
            if not isinstance(arg.ty, relax.TensorType) or arg.ty.shape is None:
                return None
            parts.append((str(arg.ty.dtype.dtype), *(str(d) for d in arg.ty.shape.values)))
        elif isinstance(arg, GenericConst):
            array = arg.value.numpy()
            if array.ndim:
                return None
            parts.append((str(array.dtype), array.tobytes()))
        else:
            parts.append(StructuralKey(arg))
    return tuple(parts)


def legalize_ops(mod: IRModule) -> IRModule:
    """TVM's LegalizeOps, with its rules remembered: layers repeat, and generating a PrimFunc takes 0.4 ms.

    All functions of `mod` must name the same symbol alike, and no two symbols alike.
    """
    memory = _Memory()
    used = {
        op_name(value)
        for function in mod.functions.values()
        if isinstance(function, relax.Function)
        for value in graph_of(function).definitions.values()
    }
    names = {f"relax.{name}" for name in used} | {f"relax.nn.{name}" for name in used}
    rules = {}
    for name in sorted(names):
        try:
            default = ir.Op.get(name).get_attr("FLegalize")
        except Exception:  # no operator of TVM's
            continue
        if default is not None:
            rules[name] = memory.rule(default)
    result: IRModule = relax.transform.LegalizeOps(rules)(mod)
    return result
