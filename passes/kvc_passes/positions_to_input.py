"""The tokens' positions become an input, so that tokens of many sequences can stand side by side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import IRModule, relax, tirx
from tvm.sym import Analyzer

from .base import Result
from .conditions import Unprovable
from .element import Elements
from .errors import UnsupportedModel
from .facts import Roles
from .graph import Graph, dims, graph_of, numbers, op_name, static
from .indices import bind_extent, bind_index, int64, replaced
from .nodes import NodeNames
from .rebuild import drop_params, rebuild


@dataclass(frozen=True)
class PositionsToInput:
    """Every value that is proved to be the tokens' positions, or a constant more, is computed from one input.

    Before: positions come from arange(0, sequence), arange(past, past + sequence), a position_ids input,
        or a cumulative sum over the attention mask; a constant may be added.
    After: `main(tokens [batch, sequence], positions [sequence], weights...)`, no attention mask, no past.
    Needs: RecognizeAttention (masks count over keys; they are gone after it).
    Refuses: a count over tokens that is not the position; other uses of the attention mask or the past.
    """

    roles: Roles
    names: NodeNames

    def run(self, mod: IRModule) -> Result:
        """Facts of the result: names of ONNX nodes or inputs that are positions. Raises UnsupportedModel."""
        function = mod["main"]
        params = {p.name: p for p in function.params}
        sequence = dims(params[self.roles.tokens])[1]
        positions = relax.Var("positions", relax.TensorType((sequence,), "int64"))
        sources = self._sources(graph_of(function), params, sequence)

        def shaped(var: relax.Var, offset: int = 0) -> relax.Expr:
            extents = [sequence if d.same_as(sequence) else 1 for d in dims(var)]
            value = relax.op.reshape(positions, relax.ShapeExpr([int64(d) for d in extents]))
            value = relax.op.add(value, relax.const(offset, "int64")) if offset else value
            dtype = var.ty.dtype.dtype
            value = value if dtype == "int64" else relax.op.astype(value, dtype)
            return relax.op.broadcast_to(value, relax.ShapeExpr(dims(var)))

        def place(builder: relax.BlockBuilder, var: relax.Var, value: relax.Expr) -> relax.Expr | None:
            return shaped(var, sources[var]) if var in sources else None

        given = params.get(self.roles.positions or "")
        values = {} if given is None else {given: shaped(given)}
        old = [function.params[0], positions, *function.params[1:]]
        module = rebuild(mod, old, place, values=values)
        gone = {self.roles.attention_mask, self.roles.positions, self.roles.memory_mask, *self.roles.past}
        past = dims(params[self.roles.past[0]])[2] if self.roles.past else None
        self._check(graph_of(module["main"]), gone, past)
        names = tuple(self.names.name(v) for v in sources) + ((given.name,) if given is not None else ())
        return Result(drop_params(module, gone), len(names), names)

    def _sources(self, graph: Graph, params: dict[str, relax.Var], sequence: Any) -> dict[relax.Var, int]:
        """Integer values proved to hold, for token i, past + i + a constant; with the constant."""
        past = dims(params[self.roles.past[0]])[2] if self.roles.past else tirx.IntImm("int64", 0)
        data = graph.reachable_from(
            p for name, p in params.items() if name not in (self.roles.attention_mask, self.roles.positions)
        )
        leaves: dict[relax.Var, Any] = {}
        if self.roles.attention_mask:
            leaves[params[self.roles.attention_mask]] = lambda index: 1
        if self.roles.positions:
            leaves[params[self.roles.positions]] = lambda index: index[-1] + past
        found = {}
        for var in graph.order:
            axes = [axis for axis, d in enumerate(dims(var)) if d.same_as(sequence)]
            if var in data or len(axes) != 1 or "int" not in str(getattr(var.ty.dtype, "dtype", "")):
                continue
            analyzer = Analyzer()
            bind_extent(analyzer, dims(var)[axes[0]], 1)
            bind_extent(analyzer, past, 0)
            index = [
                0 if static(d) == 1 else bind_index(analyzer, f"i{axis}", d)
                for axis, d in enumerate(dims(var))
            ]
            elements = Elements(graph, leaves, analyzer)
            try:
                element = elements.at(var, index)
            except Unprovable:
                continue
            if isinstance(element, tirx.Expr):
                offset = elements.simplify(element - (index[axes[0]] + past))
                if isinstance(offset, int):
                    found[var] = offset
        return found

    def _check(self, graph: Graph, gone: set[str | None], past: Any) -> None:
        for param in graph.function.params:
            if param.name in gone and graph.users[param]:
                user = self.names.describe(graph.users[param][0])
                raise UnsupportedModel(
                    f"{user} uses the input '{param.name}' for something other than an attention mask, "
                    "a past or token positions; kvc cannot serve it from pages"
                )
        for var in graph.order:
            if op_name(graph.definitions[var]) == "arange" and any(static(d) is None for d in dims(var)):
                raise UnsupportedModel(
                    f"{self.names.describe(var)} counts over tokens, but is not proved to be their positions"
                )
            if isinstance(past, tirx.Var) and _mentions(graph.definitions[var], var, past):
                raise UnsupportedModel(
                    f"{self.names.describe(var)} depends on the length of the past; only attention may"
                )


def _mentions(value: relax.Expr, var: relax.Var, symbol: tirx.Var) -> bool:
    """Whether a value's numbers or dimensions depend on a symbol."""
    return any(not replaced(d, symbol, 0).same_as(d) for d in [*numbers(value), *dims(var)])
