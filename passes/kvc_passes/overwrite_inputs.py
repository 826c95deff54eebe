"""Outputs in the memory of inputs that nothing reads any more."""

from __future__ import annotations

from dataclasses import dataclass

from tvm import IRModule, relax
from tvm.ir import GlobalVar

from .base import Result
from .graph import graph_of
from .loop_nests import overwritten
from .rebuild import substitute
from .rematerialize import Operations


@dataclass(frozen=True)
class OverwriteInputs:
    """An element-wise output is written over an input of its shape and type that nothing reads later.

    Before: `call_tir(kernel, [..., x, ...])`, the last read of x or of a view of it; `kernel` reads an
        element of x only to compute the output's element at the same place.
    After: `call_tir_inplace(kernel, [..., x], [last])`, the kernel without an output of its own.
    Needs: the final order (Rematerialize); kernels as TVM generates them, or marked by ProveOverwrites.
    Refuses: nothing; what is not proved about a kernel stays.

    Parameters, constants and what the function returns are never overwritten, and an output that is returned
    is not written into a temporary. That a kernel may is proved from its loops (`Kernel.overwritable`): what
    is read of an element goes into the output's element alone, so in every schedule it is read before.
    Templates promise it of a tensor that they add (`kernel_sets.MatmulKernels.overwrites`).
    """

    def run(self, mod: IRModule) -> Result:
        function = mod["main"]
        chosen = self._chosen(Operations(mod, {}, {}))
        if not chosen:
            return Result(mod, 0)
        graph = graph_of(function)
        builder = relax.BlockBuilder(
            IRModule({v: f for v, f in mod.functions_items() if v.name_hint != "main"})
        )
        kernels: dict[tuple[GlobalVar, int], GlobalVar] = {}
        values: dict[relax.Var, relax.Expr] = {}
        attrs = dict(function.attrs) if function.attrs else None
        with builder.function("main", list(function.params), attrs=attrs):
            with builder.dataflow():
                for var in graph.order:
                    value = substitute(graph.definitions[var], values)
                    if var in chosen:
                        name, place = value.args[0], chosen[var]
                        if (name, place) not in kernels:
                            kernel = overwritten(mod[name], place)
                            kernels[name, place] = builder.add_func(kernel, f"{name.name_hint}_over")
                        given = list(value.args[1].fields)
                        given.append(given.pop(place))
                        last = len(given) - 1
                        value = relax.op.call_tir_inplace(kernels[name, place], given, last, var.ty)
                    values[var] = builder.emit(value, name_hint=var.name)
                result = builder.emit_output(substitute(function.body.body, values))
            builder.emit_func_output(result)
        return Result(relax.transform.DeadCodeElimination()(builder.get()), len(chosen))

    def _chosen(self, operations: Operations) -> dict[relax.Var, int]:
        """For calls that overwrite an input, its number."""
        last: dict[relax.Var, relax.Var] = {}  # the last reader of every storage
        graph = operations.graph
        for var in operations.vars:
            for root in operations.read_storages(var):
                last[root] = var
        returned = set(operations.storages(graph.function.body.body))
        chosen = {}
        for var in operations.vars:
            if var in returned:
                continue
            for operand in operations.overwritable(var):
                (root,) = operations.storages(operand)
                if last[root] is var and root not in returned:
                    chosen[var] = list(graph.definitions[var].args[1].fields).index(operand)
                    break
        return chosen
