"""Products of one value with several weights become one product with all of them."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from tvm import IRModule, relax

from .base import Result
from .graph import Graph, dims, graph_of, op_name, operands, static
from .rebuild import rebuild, substitute
from .weight_format import WeightFormat
from .weights import weight_of


@dataclass(frozen=True)
class MergeProducts:
    """Query, key and value, or gate and up, in one product: x is read once, threads meet once.

    Before: `matmul(x, a)`, `matmul(x, b)` with weights a [depth, m] and b [depth, n] of one format
        (parameters, dequantized or cast, perhaps transposed) that are used nowhere else.
    After: `y = matmul(x, concat((a, b), axis=1))`, and slices of y along its last axis.
    Needs: FlattenTokens before it, and PackMatmuls after it, which stores the concatenated weight.
        `multiple` is the number of columns that its kernels handle at once: no weight begins in the middle.
    Refuses: nothing; weights whose columns are no multiple stay on their own, and so do products of an
        encoder's output, which all layers read: together they would be as large as what all layers keep.
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
                weights = [_again(builder, graph, graph.definitions[v].args[1]) for v in group]
                weight = builder.emit(relax.op.concat(weights, axis=1))
                merged[group[0]] = builder.emit(relax.op.matmul(value.args[0], weight), name_hint=var.name)
            begin = sum(_columns(v) for v in group[: group.index(var)])
            axis = len(dims(var)) - 1
            return relax.op.strided_slice(
                merged[group[0]], [axis], [begin], [begin + _columns(var)], [1], assume_inbound=True
            )

        module = rebuild(mod, mod["main"].params, place, values=values)
        return Result(module, len(groups))

    def _groups(self, graph: Graph) -> dict[tuple[relax.Expr, WeightFormat], list[relax.Var]]:
        """Products by the value on their left and the format on their right, in order."""
        groups: dict[tuple[relax.Expr, WeightFormat], list[relax.Var]] = defaultdict(list)
        own = graph.reachable_from(graph.function.params[:1])
        for var in graph.order:
            call = graph.definitions[var]
            if op_name(call) == "matmul" and call.args[0] in own:
                format = self._fits(graph, call)
                if format is not None:
                    groups[graph.alias(call.args[0]), format].append(var)
        return groups

    def _fits(self, graph: Graph, call: relax.Call) -> WeightFormat | None:
        """The format of a weight that can stand beside others, None for what cannot."""
        rows = dims(call.args[0])
        flat = len(rows) == 2 or (len(rows) == 3 and static(rows[0]) == 1)
        weight = weight_of(graph, call.args[1]) if flat else None
        if weight is None or len(weight.sources) != 1 or weight.columns % self.multiple:
            return None
        behind = graph.ancestors([call.args[1]])
        once = all(len(graph.users[v]) == 1 for v in behind)
        return weight.format if once else None


def _again(builder: relax.BlockBuilder, graph: Graph, value: relax.Expr) -> relax.Expr:
    """A weight computed from its parameters once more: it may be defined behind where it is needed now."""
    if value not in graph.definitions:
        return value
    call = graph.definitions[value]
    needed = {o: _again(builder, graph, o) for o in operands(call) if isinstance(o, relax.Var)}
    return builder.emit(substitute(call, needed))


def _columns(product: relax.Var) -> int:
    return int(dims(product)[-1].value)
