"""Logits only for the rows that are asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import IRModule, relax, tirx

from .base import Result
from .graph import Graph, dims, graph_of, op_name, operands
from .indices import replaced
from .markers import ATTENTIONS
from .rebuild import insert_params, rebuild, substitute


@dataclass(frozen=True)
class SelectRows:
    """Everything that no attention reads is computed for the asked rows alone.

    Before: `main(tokens [n], positions [n], ...) -> logits [1, n, V]`.
    After: `main(tokens [n], positions [n], rows i32 [r], ...) -> logits [1, r, V]`; the last layer's output
        projection, its feed-forward part and the language-model head work on r rows.
    Needs: FlattenTokens (one token axis, proved token-wise).
    Refuses: nothing.
    """

    def run(self, mod: IRModule) -> Result:
        function = mod["main"]
        graph = graph_of(function)
        (n,) = dims(function.params[0])
        r = tirx.Var("r", "int64")
        rows = relax.Var("rows", relax.TensorType((r,), "int32"))
        markers = [v for v in graph.order if op_name(graph.definitions[v]) in ATTENTIONS]
        needed = graph.ancestors(o for v in markers for o in operands(graph.definitions[v])) | set(markers)
        output = function.body.body
        values: dict[relax.Var, relax.Expr] = {}
        moved = self._movable(graph, needed, n)

        def place(builder: relax.BlockBuilder, var: relax.Var, value: relax.Expr) -> relax.Expr | None:
            if var not in moved:
                return None
            picked: dict[relax.Var, relax.Expr] = {}
            for operand in operands(graph.definitions[var]):
                if isinstance(operand, relax.Var) and operand not in moved:
                    picked[operand] = self._pick(builder, values.get(operand, operand), rows, n)
                elif isinstance(operand, relax.Var):
                    picked[operand] = values[operand]
            return _with_rows(substitute(graph.definitions[var], picked), n, r)

        module = rebuild(
            mod, insert_params(function, "positions", [rows]), place, values=values, output=output
        )
        return Result(relax.transform.EliminateCommonSubexpr()(module), len(moved))

    def _movable(self, graph: Graph, needed: set[relax.Var], n: Any) -> set[relax.Var]:
        """What can be computed for some rows alone: its other operands have tokens as axes of their own."""
        moved: set[relax.Var] = set()
        for var in (v for v in graph.order if v not in needed):
            given = operands(graph.definitions[var])
            fixed = [o for o in given if isinstance(o, relax.Var) and o not in moved]
            if all(_is(d, n) or not _mentions(d, n) for o in fixed for d in dims(o)):
                moved.add(var)
        return moved

    def _pick(self, builder: relax.BlockBuilder, value: relax.Expr, rows: relax.Var, n: Any) -> relax.Expr:
        """The asked rows of a value with a token axis, other values as they are."""
        axes = [axis for axis, d in enumerate(dims(value)) if _is(d, n)]
        if not axes:
            return value
        return builder.emit(relax.op.take(value, rows, axis=axes[0], mode="clip"))


def _with_rows(value: relax.Expr, n: Any, r: Any) -> relax.Expr:
    """Shapes inside a call (of reshape, broadcast_to, full, a marker) with r tokens instead of n."""
    if not isinstance(value, relax.Call):
        return value
    args = [
        relax.ShapeExpr([replaced(d, n, r) for d in a.values]) if isinstance(a, relax.ShapeExpr) else a
        for a in value.args
    ]
    types = [
        relax.TensorType([replaced(d, n, r) for d in t.shape.values], t.dtype)
        if isinstance(t, relax.TensorType) and t.shape is not None
        else t
        for t in value.ty_args
    ]
    return relax.Call(value.op, args, value.attrs, types)


def _mentions(dim: Any, symbol: Any) -> bool:
    return not replaced(dim, symbol, 0).same_as(dim)


def _is(dim: Any, symbol: Any) -> bool:
    return isinstance(dim, tirx.Var) and bool(dim.same_as(symbol))
