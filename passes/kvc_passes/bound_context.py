"""Choices by the length of the whole sequence: decided, for contexts in which they fall the same way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import IRModule, relax, tirx
from tvm.ir import Range
from tvm.sym import Analyzer, ProofStrength

from .base import Result
from .conditions import Choice, Unprovable
from .element import Elements
from .errors import UnsupportedModel
from .facts import Roles
from .graph import Graph, dims, graph_of, op_name, static
from .indices import LARGEST, bind_extent, bind_index, int64, replaced
from .nodes import NodeNames
from .predicates import holds, to_text
from .rebuild import rebuild

_COMPARISONS = ("equal", "not_equal", "greater", "greater_equal", "less", "less_equal")


@dataclass(frozen=True)
class BoundContext:
    """A sequence that is longer than the context for which a choice was made is not served.

    Before: a comparison of the largest position with a number, as for rotary frequencies that are others in
        long sequences: a token's keys would change when later tokens come.
    After: what the comparison says for one token; the facts have the longest sequence for which it holds.
    Needs: positions as an input, or counted from shapes.
    Refuses: a comparison that the length decides in more than one place.
    """

    roles: Roles
    names: NodeNames

    def run(self, mod: IRModule) -> Result:
        """Facts of the result: most tokens of a sequence, None for any number. Raises UnsupportedModel."""
        graph = graph_of(mod["main"])
        reader = _Lengths(graph, self.roles)
        decided: dict[relax.Var, bool] = {}
        limit: int | None = None
        for var in graph.order:
            found = reader.comparison(var)
            if found is None:
                continue
            value, most = self._decide(var, found)
            decided[var] = value
            limit = min(limit or most, most) if most is not None else limit
        if not decided:
            return Result(mod, 0)

        def place(builder: relax.BlockBuilder, var: relax.Var, value: relax.Expr) -> relax.Expr | None:
            if var not in decided:
                return None
            value = relax.const(decided[var], "bool")
            return relax.op.broadcast_to(value, relax.ShapeExpr(dims(var))) if dims(var) else value

        return Result(rebuild(mod, mod["main"].params, place), len(decided), limit)

    def _decide(self, var: relax.Var, found: _Condition) -> tuple[bool, int | None]:
        """What a condition of the length says for one token, and up to which length it provably does."""
        text = found.text
        value = holds(text, 1, 0)
        low, high = 1, LARGEST
        if holds(text, high, 0) == value:
            low = high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if holds(text, middle, 0) == value else (low, middle)
        once = low == LARGEST or found.is_between(low + 1, LARGEST, not value)
        if not (once and found.is_between(1, low, value)):
            raise UnsupportedModel(
                f"{self.names.describe(var)} compares the sequence's length with several numbers ({text})"
            )
        return value, None if low == LARGEST else low


@dataclass(frozen=True)
class _Condition:
    """A condition of the length q of a sequence, as an expression and as text."""

    q: tirx.Var
    expression: Any
    text: str

    def is_between(self, least: int, most: int, value: bool) -> bool:
        """Whether it is proved to be `value` for all lengths from `least` to `most`."""
        if isinstance(self.expression, bool):
            return self.expression == value
        analyzer = Analyzer()
        analyzer.bind(self.q, Range(int64(least), int64(most + 1)), True)
        claim = self.expression if value else tirx.Not(self.expression)
        return bool(analyzer.can_prove(claim, ProofStrength.SYMBOLIC_BOUND))


class _Lengths:
    """Values that are functions of the length of the whole sequence."""

    def __init__(self, graph: Graph, roles: Roles) -> None:
        self.graph = graph
        params = {p.name: p for p in graph.function.params}
        self.sequence = dims(params[roles.tokens])[1]
        self.past: Any = dims(params[roles.past[0]])[2] if roles.past else tirx.IntImm("int64", 0)
        inputs = (roles.attention_mask, roles.positions)
        self.data = graph.reachable_from(p for name, p in params.items() if name not in inputs)
        self.leaves: dict[relax.Var, Any] = {}
        if roles.attention_mask:
            self.leaves[params[roles.attention_mask]] = lambda index: 1
        if roles.positions:
            self.leaves[params[roles.positions]] = lambda index: index[-1] + self.past
        self.lengths: set[relax.Var] = set()

    def comparison(self, var: relax.Var) -> _Condition | None:
        """The condition of the length q that `var` is, None for anything else; maxima are noted."""
        call = self.graph.definitions[var]
        if var in self.data:
            return None
        if op_name(call) == "max" and self._is_over_tokens(call):
            self._note(var, call)
        one = op_name(call) in _COMPARISONS and all(static(d) == 1 for d in dims(var))
        return self._condition(var) if one and self.lengths & self.graph.ancestors([var]) else None

    def _condition(self, var: relax.Var) -> _Condition | None:
        try:
            element = self._elements()[0].at(var, [0] * len(dims(var)))
            return None if isinstance(element, Choice) else self._over(element)
        except Unprovable:
            return None

    def _elements(self) -> tuple[Elements, Analyzer]:
        analyzer = Analyzer()
        bind_extent(analyzer, self.sequence, 1)
        bind_extent(analyzer, self.past, 0)
        return Elements(self.graph, self.leaves, analyzer), analyzer

    def _is_over_tokens(self, call: relax.Call) -> bool:
        return "int" in str(call.ty.dtype.dtype) and any(static(d) is None for d in dims(call.args[0]))

    def _note(self, var: relax.Var, call: relax.Call) -> None:
        """The maximum over tokens of a value that does not fall is its last one."""
        elements, analyzer = self._elements()
        shape = dims(call.args[0])
        index = [0 if static(d) == 1 else bind_index(analyzer, "i", d) for d in shape]
        axes = [a for a, d in enumerate(shape) if d.same_as(self.sequence)]
        given = range(len(shape)) if call.attrs.axis is None else call.attrs.axis
        reduced = [int(a) % len(shape) for a in given]
        if len(axes) != 1 or axes[0] not in reduced:
            return
        i = index[axes[0]]
        try:
            element = elements.at(call.args[0], index)
        except Unprovable:
            return
        if not isinstance(element, tirx.Expr) or not elements.prove(replaced(element, i, i + 1) >= element):
            return
        last = elements.simplify(replaced(element, i, self.sequence - 1))
        self.leaves[var] = lambda at: last
        self.lengths.add(var)

    def _over(self, element: Any) -> _Condition:
        """Over q, the number of all tokens: sequence = q - past, where past must cancel."""
        q = tirx.Var("q", "int64")
        shifted = replaced(element, self.sequence, q - self.past)
        shifted = shifted if isinstance(element, bool) else Analyzer().simplify(shifted)
        return _Condition(q, shifted, to_text(shifted, {q: "q"}))
