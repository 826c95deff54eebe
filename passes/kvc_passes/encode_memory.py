"""The function that keeps an encoder's output: what cross-attention reads, written once for a request."""

from __future__ import annotations

from dataclasses import dataclass

from tvm import IRModule, relax, tirx

from .base import Result
from .flatten_tokens import ROWS
from .graph import dims, graph_of, op_name
from .kernel_sets import AttentionKernels
from .markers import ATTENTION, LATENT, Latent, attributes, tensors
from .paged_calls import PagedCalls, dtype_of
from .rebuild import drop_unused, substitute, tidy
from .sites import AttentionSite


@dataclass(frozen=True)
class EncodeMemory:
    """Rows of an encoder's output become pages of state.

    Before: `main(tokens, positions, memory [1, rows, d], weights...)` with attention as markers.
    After: `main(memory f32 [n, d], slots [n], pools..., weights...)`: keys and values of the rows, or the
        rows themselves, are appended to the pools of the cross-attentions that keep state, and returned.
    Needs: ProveMemory: rows are independent, so they can be given in parts.
    Refuses: nothing.
    """

    sites: tuple[AttentionSite, ...]
    kernels: AttentionKernels
    memory: str
    """The parameter's name."""

    def run(self, mod: IRModule) -> Result:
        function = mod["main"]
        given = next(p for p in function.params if p.name == self.memory)
        n = tirx.Var(ROWS, "int64")
        function = function.bind_symbolic_vars({dims(given)[1]: n})
        given = next(p for p in function.params if p.name == self.memory)
        graph = graph_of(function)
        calls = PagedCalls(self.sites, self.kernels)
        kept = {site.index for site in self.sites if site.mask.reach.memory and site.owner is None}
        appended = {v: found for v in graph.order if (found := _appended(graph.definitions[v]))[0] in kept}
        needed = graph.ancestors(value for _, *values in appended.values() for value in values)
        memory = relax.Var("memory", relax.TensorType((n, dims(given)[2]), "float32"))
        slots = relax.Var("slots", relax.TensorType((n,), "int32"))
        pools = [pool for index in sorted(kept) for pool in calls.pools[index]]
        weights = [p for p in function.params[2:] if p != given]
        builder = relax.BlockBuilder()
        results: list[relax.Expr] = []
        with builder.function("main", [memory, slots, *pools, *weights]):
            with builder.dataflow():
                one = relax.ShapeExpr([tirx.IntImm("int64", 1), *dims(memory)])
                rows = builder.emit(relax.op.reshape(memory, one))
                if (dtype := dtype_of(given)) != "float32":
                    rows = builder.emit(relax.op.astype(rows, dtype))
                values: dict[relax.Var, relax.Expr] = {given: rows}
                for var in graph.order:
                    if var in appended:
                        index, key, value = appended[var]
                        key, value = (substitute(x, values) for x in (key, value))
                        results += calls.append(builder, self.sites[index], key, value, slots)
                    elif var in needed:
                        result = substitute(graph.definitions[var], values)
                        values[var] = builder.emit(result, name_hint=var.name)
                returned = builder.emit_output(relax.Tuple(results))
            builder.emit_func_output(returned)
        return Result(drop_unused(tidy(builder.get()), 2 + len(pools)), len(kept))


def _appended(call: relax.Expr) -> tuple[int, relax.Expr, relax.Expr]:
    """The site of an attention, and what is kept of its tokens; (-1, ...) for any other value."""
    if op_name(call) == ATTENTION:
        return int(call.args[4].value), call.args[2], call.args[3]
    if op_name(call) == LATENT:
        x = tensors(call)[1]
        return attributes(call, Latent).site, x, x
    return -1, call, call
