"""The premise of serving: outside attention, no token sees another."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tvm import IRModule, relax, tirx
from tvm.sym import Analyzer

from .base import Result
from .conditions import Unprovable
from .errors import UnsupportedModel
from .facts import Roles
from .graph import Graph, dims, graph_of, numbers, op_name, operands, static
from .indices import replaced
from .markers import ATTENTION
from .nodes import NodeNames
from .operations import ELEMENTWISE, NORMS, REDUCTIONS
from .regroup import regroup

_UNIFORM = frozenset(["broadcast_to", "full", "ones", "zeros"])
"""Operations that may make a token axis: all of its entries are equal."""


_PLACED = ELEMENTWISE | REDUCTIONS | NORMS | {"broadcast_to", "concat", "matmul", "split", "strided_slice"}
"""Operations whose result has its token axes where the operands have them, counted from the last."""


class Mixes(Exception):
    """Why an operation mixes tokens."""


@dataclass(frozen=True)
class ProveTokenwise:
    """Prove, operation by operation, that only attention mixes the tokens; changes nothing.

    Before and after: `main(tokens [batch, sequence], ...)` with attention as markers.
    Needs: RecognizeAttention, since a plain attention mixes tokens.
    Refuses: an operation that reduces, slices, concatenates, reorders or contracts the batch or the token
        axis, pairs tokens with tokens, reads the sequence length as a number, or is not known to keep
        tokens apart; values for every token that come from neither tokens nor positions, such as the first
        rows of a table.
    """

    roles: Roles
    names: NodeNames

    def run(self, mod: IRModule) -> Result:
        """Facts of the result: the number of operations proved. Raises UnsupportedModel."""
        graph = graph_of(mod["main"])
        tokens = next(p for p in graph.function.params if p.name == self.roles.tokens)
        axes = TokenAxes([d for d in dims(tokens) if isinstance(d, tirx.Var)])
        for var in graph.order:
            try:
                axes.check(graph, var)
            except Mixes as reason:
                raise UnsupportedModel(
                    f"{self.names.describe(var)} {reason}; only attention may mix tokens"
                ) from None
        return Result(mod, 0, len(graph.order))


class TokenAxes:
    """Which axes of a value run over tokens: those whose extent depends on batch or sequence."""

    def __init__(self, symbols: list[tirx.Var]) -> None:
        self.symbols = symbols
        self.analyzer = Analyzer()
        self.outer: dict[relax.Expr, dict[int, int]] = {}
        """Elements that stand before the tokens in an axis that has both, where there are any: an axis of
        extent 4 * sequence may be 4 times all tokens, or each token 4 times."""

    def of(self, value: relax.Expr) -> list[int]:
        return [axis for axis, dim in enumerate(dims(value)) if self.depends(dim)]

    def forbid(self, what: str, over: set[int], value: relax.Expr) -> None:
        """Raise unless none of the axes `over` of a value runs over tokens."""
        wrong = sorted(over & set(self.of(value)))
        if wrong:
            raise Mixes(f"{what} (axis {wrong[0]} of {len(dims(value))})")

    def depends(self, dim: Any) -> bool:
        if isinstance(dim, tirx.Var):
            return any(dim.same_as(s) for s in self.symbols)
        return any(self.depends(getattr(dim, name)) for name in ("a", "b") if hasattr(dim, name))

    def check(self, graph: Graph, var: relax.Var) -> None:
        call = graph.definitions[var]
        name = op_name(call)
        if not name or name == ATTENTION:
            return
        sequence = self.symbols[-1]
        if sum(_mentions(dim, sequence) for dim in dims(var)) > 1:
            raise Mixes("pairs every token with every token")
        inputs = [o for o in operands(call) if self.of(o)]
        if name == "shape_to_tensor" and any(self.depends(d) for d in graph.resolve(call.args[0]).values):
            raise Mixes("reads the number of tokens as a value")
        if not inputs:
            if self.of(var) and name not in _UNIFORM:
                raise Mixes("makes a value for every token out of neither the tokens nor their positions")
        elif name == "reshape":
            self.regrouped(var, call)
        else:
            self._ruled(var, call, name, inputs)
        if any(self.depends(number) for number in numbers(call)):
            raise Mixes("reads the number of tokens as a value")

    def _ruled(self, var: relax.Var, call: relax.Call, name: str, inputs: list[relax.Expr]) -> None:
        rule = _RULES.get(name)
        if rule is None:
            raise Mixes(f"is of the operation {name}, which is not known to keep tokens apart")
        rule(self, call, inputs)
        if any(self.outer.get(o) for o in inputs):
            self._carry(var, call, name, inputs)

    def _carry(self, var: relax.Var, call: relax.Call, name: str, inputs: list[relax.Expr]) -> None:
        """Note what stands before the tokens in a result's axes, where it does in an operand's."""
        if name == "permute_dims" and call.attrs.axes is not None:
            before = self.outer[inputs[0]]
            found = {i: before[int(a)] for i, a in enumerate(call.attrs.axes) if int(a) in before}
        elif name in _PLACED and not (name in REDUCTIONS and not call.attrs.keepdims):
            found = {}
            for axis in self.of(var):
                kinds = {
                    self.outer.get(o, {}).get(axis - len(dims(var)) + len(dims(o)), 1)
                    for o in inputs
                    if axis - len(dims(var)) + len(dims(o)) in self.of(o)
                }
                if len(kinds) > 1:
                    raise Mixes("pairs tokens with tokens in another order")
                found[axis] = kinds.pop() if kinds else 1
        else:
            raise Mixes("takes an axis in which tokens stand behind another axis")
        self.outer[var] = {axis: count for axis, count in found.items() if count != 1}

    def regrouped(self, var: relax.Var, call: relax.Call) -> None:
        """A reshape: tokens keep their order, and what stands before all of them stays there."""
        source, target = dims(call.args[0]), dims(call)
        before = self.outer.get(call.args[0], {})
        found: dict[int, int] = {}
        try:
            groups = regroup(self.analyzer, source, target)
        except Unprovable as reason:
            raise Mixes(str(reason)) from None
        for low, high, first, last in groups:
            given = self._standing(source[low:high], {a - low: n for a, n in before.items()})
            if given is None:
                continue
            wanted = [a for a in range(first, last) if self.depends(target[a])]
            if not wanted:
                raise Mixes("merges the token axis with another axis")
            between = [a for a in range(wanted[0], wanted[-1]) if static(target[a]) not in (None, 1)]
            outside, behind = _count(target[first : wanted[0]]), _count(target[wanted[-1] + 1 : last])
            inside = self._elements(source[low:high]) // given
            if between or given % outside or inside % behind:
                raise Mixes("merges the token axis with another axis")
            if given != outside:
                found[wanted[0]] = given // outside
        self.outer[var] = found

    def _standing(self, group: Sequence[Any], before: Mapping[int, int]) -> int | None:
        """How many elements stand before the tokens of a group of axes; None for a group without tokens."""
        tokens = [a for a, d in enumerate(group) if self.depends(d)]
        if not tokens:
            return None
        inside = [a for a in range(tokens[0], tokens[-1]) if static(group[a]) not in (None, 1)]
        if inside or any(before.get(a, 1) != 1 for a in tokens[1:]):
            raise Mixes("merges the token axis with another axis")
        return _count(group[: tokens[0]]) * before.get(tokens[0], 1)

    def _elements(self, group: Sequence[Any]) -> int:
        """Elements of a group of axes for one token."""
        total: Any = 1
        for dim in group:
            total = total * dim
        for symbol in self.symbols:
            total = replaced(total, symbol, 1)
        return int(static(self.analyzer.simplify(total)) or 1)


def _count(extents: Sequence[Any]) -> int:
    return math.prod(static(d) or 1 for d in extents)


def _mentions(dim: Any, symbol: tirx.Var) -> bool:
    if isinstance(dim, tirx.Var):
        return bool(dim.same_as(symbol))
    return any(_mentions(getattr(dim, name), symbol) for name in ("a", "b") if hasattr(dim, name))


def _aligned(axes: TokenAxes, call: relax.Call, inputs: list[relax.Expr]) -> None:
    rank = len(dims(call))
    places = {axis - len(dims(o)) + rank for o in inputs for axis in axes.of(o)}
    if not places <= set(axes.of(call)):
        raise Mixes("combines the token axis with another axis")


def _reduced(axes: TokenAxes, call: relax.Call, inputs: list[relax.Expr]) -> None:
    rank = len(dims(call.args[0]))
    axis = call.attrs.axis
    over = (
        range(rank)
        if axis is None
        else [int(a) % rank for a in (axis if hasattr(axis, "__iter__") else [axis])]
    )
    axes.forbid("reduces over the tokens", set(over), call.args[0])


def _normalized(axes: TokenAxes, call: relax.Call, inputs: list[relax.Expr]) -> None:
    rank = len(dims(call.args[0]))
    over = getattr(call.attrs, "axes", None)
    over = [call.attrs.axis] if over is None else over
    axes.forbid("normalizes over the tokens", {int(a) % rank for a in over}, call.args[0])


def _product(axes: TokenAxes, call: relax.Call, inputs: list[relax.Expr]) -> None:
    left, right = call.args[:2]
    axes.forbid("sums over the tokens", {len(dims(left)) - 1}, left)
    axes.forbid("sums over the tokens", {max(len(dims(right)) - 2, 0)}, right)
    if len(dims(right)) - 1 in axes.of(right) and len(dims(left)) - 2 in axes.of(left):
        raise Mixes("pairs every token with every token")
    _aligned(axes, call, [left, right])


def _along(what: str) -> Callable[[TokenAxes, relax.Call, list[relax.Expr]], None]:
    def rule(axes: TokenAxes, call: relax.Call, inputs: list[relax.Expr]) -> None:
        for value in inputs:
            axes.forbid(f"{what} along the tokens", {int(call.attrs.axis) % len(dims(value))}, value)

    return rule


def _sliced(axes: TokenAxes, call: relax.Call, inputs: list[relax.Expr]) -> None:
    over = {int(static(a) or 0) % len(dims(call)) for a in call.args[1].fields}
    axes.forbid("slices the tokens", over, call.args[0])


def _taken(axes: TokenAxes, call: relax.Call, inputs: list[relax.Expr]) -> None:
    data = call.args[0]
    axis = 0 if call.attrs.axis is None else int(call.attrs.axis) % len(dims(data))
    axes.forbid("picks tokens by index", {axis}, data)
    if axes.of(data) and axes.of(call.args[1]):
        raise Mixes("pairs every token with every token")


def _kept(axes: TokenAxes, call: relax.Call, inputs: list[relax.Expr]) -> None:
    """Moves or adds axes without mixing them."""


_RULES: dict[str, Callable[[TokenAxes, relax.Call, list[relax.Expr]], None]] = {
    **dict.fromkeys(ELEMENTWISE, _aligned),
    **dict.fromkeys(REDUCTIONS, _reduced),
    **dict.fromkeys(NORMS, _normalized),
    "broadcast_to": _aligned,
    "concat": _along("concatenates"),
    "expand_dims": _kept,
    "matmul": _product,
    "permute_dims": _kept,
    "split": _along("splits"),
    "squeeze": _kept,
    "strided_slice": _sliced,
    "take": _taken,
}
