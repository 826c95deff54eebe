"""Products of one value with several weights become one product with all of them."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from tvm import IRModule, relax

from .base import Result
from .graph import Graph, dims, graph_of, op_name, static
from .rebuild import rebuild


@dataclass(frozen=True)
class MergeProducts:
    """Query, key and value, or gate and up, in one product: x is read once, threads meet once.

    Before: `matmul(x, a)`, `matmul(x, b)` with weights a [depth, m] and b [depth, n], parameters or their
        transposes, used nowhere else.
    After: `y = matmul(x, concat((a, b), axis=1))`, and slices of y along its last axis.
    Needs: FlattenTokens before it, and PackMatmuls after it, which stores the concatenated weight.
        `multiple` is the number of columns that its kernels handle at once: no weight begins in the middle.
    Refuses: nothing; weights whose columns are no multiple stay on their own.
    """

    multiple: int

    def run(self, mod: IRModule) -> Result:
        graph = graph_of(mod["main"])
        groups = [group for group in self._groups(graph).values() if len(group) > 1]
        leader = {var: group for group in groups for var in group}
        merged: dict[relax.Var, relax.Var] = {}
        values: dict[relax.Var, relax.Expr] = {}

        def place(builder: relax.BlockBuilder, var: relax.Var, value: relax.Expr) -> relax.Expr | None:
            if var not in leader:
                return None
            group = leader[var]
            if group[0] not in merged:
                weights = [builder.emit(_weight(graph, v)) for v in group]
                weight = builder.emit(relax.op.concat(weights, axis=1))
                merged[group[0]] = builder.emit(relax.op.matmul(value.args[0], weight), name_hint=var.name)
            begin = sum(_columns(v) for v in group[: group.index(var)])
            axis = len(dims(var)) - 1
            return relax.op.strided_slice(
                merged[group[0]], [axis], [begin], [begin + _columns(var)], [1], assume_inbound=True
            )

        module = rebuild(mod, mod["main"].params, place, values=values)
        return Result(module, len(groups))

    def _groups(self, graph: Graph) -> dict[relax.Expr, list[relax.Var]]:
        """Products by the value on their left, in order."""
        groups: dict[relax.Expr, list[relax.Var]] = defaultdict(list)
        for var in graph.order:
            call = graph.definitions[var]
            if op_name(call) == "matmul" and isinstance(call.args[0], relax.Var) and self._fits(graph, call):
                groups[graph.alias(call.args[0])].append(var)
        return groups

    def _fits(self, graph: Graph, call: relax.Call) -> bool:
        weight = graph.alias(call.args[1])
        uses = graph.users[weight]
        swap = graph.resolve(weight)
        if op_name(swap) == "permute_dims":
            weight = graph.alias(swap.args[0])
            uses = uses + graph.users[weight]
        once = len(uses) == (2 if op_name(swap) == "permute_dims" else 1)
        columns = static(dims(call.args[1])[-1]) if len(dims(call.args[1])) == 2 else None
        rows = dims(call.args[0])
        flat = len(rows) == 2 or (len(rows) == 3 and static(rows[0]) == 1)
        fits = columns is not None and columns % self.multiple == 0
        return once and flat and fits and weight in graph.function.params


def _weight(graph: Graph, product: relax.Var) -> relax.Expr:
    """The weight as [depth, columns], written from parameters alone."""
    value = graph.resolve(graph.definitions[product].args[1])
    if op_name(value) == "permute_dims":
        return relax.op.permute_dims(graph.alias(value.args[0]))
    return graph.alias(graph.definitions[product].args[1])


def _columns(product: relax.Var) -> int:
    return int(dims(product)[-1].value)
