"""One attention as a site: its operands' layouts, heads, mask and bias, all proved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import numpy as np
from tvm import relax, tirx

from .conditions import Unprovable
from .element import Elements, Index
from .errors import UnsupportedModel
from .facts import Roles
from .graph import Graph, dims, op_name, operands, same_shape, static
from .indices import bind_index, int64
from .markers import SDPA
from .nodes import NodeNames
from .scores import At, ScoreReader, Symbols, Unread
from .site_masks import MaskProver
from .sites import AttentionSite

_LAYOUT = ("reshape", "permute_dims", "expand_dims", "broadcast_to", "squeeze")


_ORDERS = ((0, 1, 2, 3), (0, 2, 1, 3), (0, 1, 3, 2))
"""Where batch, heads, tokens and elements may stand in a value."""


@dataclass(frozen=True)
class Operand:
    """q, k or v: a value, where its axes batch, heads, tokens and elements are, and its factor."""

    value: relax.Var
    order: tuple[int, ...]
    scale: float = 1.0

    @property
    def shape(self) -> list[Any]:
        """Its extents as [batch, heads, tokens, elements]."""
        return [dims(self.value)[axis] for axis in self.order]


@dataclass(frozen=True)
class Match:
    """An attention in the graph: its operands and the value that a marker can replace."""

    site: AttentionSite
    query: Operand
    key: Operand
    value: Operand
    output: relax.Var
    """[batch, heads, sequence, value dim], or with batch and heads in one, or (if `transposed`) [batch,
    sequence, heads, value dim]."""
    transposed: bool
    pasts: tuple[tuple[str, relax.Var], ...] = ()
    """Names of the pasts of k and v, and the values that are concat(past, new)."""


class SiteFinder:
    """Matches the attentions of one function."""

    def __init__(
        self, graph: Graph, roles: Roles, names: NodeNames, tables: Mapping[str, np.ndarray]
    ) -> None:
        self.graph, self.roles, self.names = graph, roles, names
        self.params = {p.name: p for p in graph.function.params}
        self.batch, self.sequence = dims(self.params[roles.tokens])
        self.past = dims(self.params[roles.past[0]])[2] if roles.past else tirx.IntImm("int64", 0)
        self.rows = dims(self.params[roles.memory])[1] if roles.memory else None
        known = {roles.positions, roles.attention_mask, roles.memory_mask, *tables}
        data = graph.reachable_from(p for p in graph.function.params if p.name not in known)
        self.reader = ScoreReader(graph, self.batch, self.past, self.sequence, data, self.rows)
        self.prover = MaskProver(graph, roles, self.past, self.sequence, tables)
        self.from_tokens = graph.reachable_from([self.params[roles.tokens]])
        self._owners: dict[relax.Var, tuple[relax.Var, str]] = {}

    def attentions(self) -> list[relax.Var]:
        """Bindings of operators that are whole attentions, and of softmaxes over a number of tokens.

        A softmax over a constant number of elements, as of a router, mixes no tokens.
        """
        return [v for v in self.graph.order if self._is_attention(v)]

    def _is_attention(self, var: relax.Var) -> bool:
        call = self.graph.definitions[var]
        if op_name(call) != "softmax":
            return op_name(call) == SDPA
        return static(dims(var)[int(call.attrs.axis)]) is None

    def refuse(self, var: relax.Var, rule: str) -> NoReturn:
        """Raise `refusal`."""
        raise self.refusal(var, rule)

    def refusal(self, var: relax.Var, rule: str) -> UnsupportedModel:
        """The error that names the node of `var` and the rule that it breaks."""
        return UnsupportedModel(f"attention at {self.names.describe(var)}: {rule}")

    def match(self, softmax: relax.Var, index: int) -> Match:
        """The attention around `softmax`. Raises UnsupportedModel with the node and the rule that failed."""
        try:
            scores = self.reader.read(softmax)
        except Unread as reason:
            self.refuse(softmax, str(reason))
        heads = scores.symbols.place.heads
        query = self._operand(softmax, scores.query, "q", scores.symbols)
        keys = self._operand(softmax, scores.key, "k", scores.symbols)
        values = self._operand(softmax, scores.value, "v", scores.symbols)
        memory = self.rows is not None and same_shape([keys.shape[2]], [self.rows])
        key, value = (
            (keys, values)
            if memory
            else (self._without_past(softmax, keys, "k"), self._without_past(softmax, values, "v"))
        )
        if value.scale != 1.0:
            self.refuse(softmax, f"the values are scaled by {value.scale}")
        for name, operand in (("q", query), ("k", key), ("v", value)):
            rows = self.rows if memory and name != "q" else self.sequence
            if not same_shape([operand.shape[0], operand.shape[2]], [self.batch, rows]):
                whose = "row of the encoder's output" if rows is self.rows else "of the model's own tokens"
                self.refuse(softmax, f"{name} does not have one row for each {whose}")
        try:
            mask, slopes, bias = self.prover.memory(scores) if memory else self.prover.prove(scores)
            sinks = self.prover.sinks(scores)
        except Unprovable as error:
            what = "to show all of the encoder's output" if memory else "causal"
            self.refuse(softmax, f"its mask cannot be proved {what}: it {error}")
        output, transposed = self._output(scores.output, query)
        site = AttentionSite(
            index=index,
            node=self.names.name(softmax),
            heads=heads,
            kv_heads=self._static(softmax, key, 1, "KV heads"),
            head_dim=self._static(softmax, query, 3, "head dim"),
            value_dim=self._static(softmax, value, 3, "value dim"),
            scale=scores.scale * query.scale * key.scale,
            softcap=scores.softcap,
            mask=mask,
            rope=self._rope(query.value),
            slopes=slopes,
            bias=bias,
            sinks=sinks,
            guarded=scores.guarded,
            kv_dtype=str(key.value.ty.dtype.dtype),  # type: ignore[arg-type]
        )
        if self._static(softmax, value, 1, "value heads") != site.kv_heads:
            self.refuse(softmax, "k and v have different numbers of heads")
        own = () if memory or not self.roles.past else (keys, values)
        pasts = tuple((self._past_of(o), o.value) for o in own)
        return Match(site, query, key, value, output, transposed, pasts)

    def _static(self, softmax: relax.Var, value: Operand, axis: int, what: str) -> int:
        size = static(value.shape[axis])
        if size is None:
            self.refuse(softmax, f"the number of {what} is not a constant")
        return size

    def _operand(
        self, softmax: relax.Var, operand: tuple[relax.Expr, At], what: str, symbols: Symbols
    ) -> Operand:
        """The tensor of batch, heads or KV heads, tokens and elements behind one operand of a product.

        Walks back through layout changes and constant factors, and keeps the deepest value for which the
        operand's element of head h is proved to be the value's element [b, h // group, t, d].
        """
        value, at = operand
        found: Operand | None = None
        current, scale = self.reader.scaled(value)
        reason = "its layout is not [batch, heads, tokens, head dim]"
        while isinstance(current, relax.Var):
            orders = _ORDERS if found is None else _ORDERS[:1]
            for order in orders if len(dims(current)) == 4 else ():
                candidate = Operand(current, order, scale)
                refused = self._same_heads(value, at, candidate, symbols)
                if refused is None:
                    found = candidate
                    break
                reason = refused if order == _ORDERS[0] else reason
            call = self.graph.resolve(current)
            if op_name(call) not in _LAYOUT:
                break
            current, factor = self.reader.scaled(call.args[0])
            scale *= factor
        if found is None:
            self.refuse(softmax, f"{what}: {reason}")
        return found

    def _same_heads(self, operand: relax.Expr, at: At, source: Operand, symbols: Symbols) -> str | None:
        """None when the operand of head h is source[b, h // group, t, d], else why not."""
        heads, kv_heads = symbols.place.heads, static(source.shape[1])
        if not kv_heads or heads % kv_heads:
            return f"{kv_heads} heads do not divide the {heads} query heads"
        analyzer, b, h = symbols.analyzer, symbols.b, symbols.place.head
        t, d = (bind_index(analyzer, name, source.shape[axis]) for name, axis in (("t", 2), ("d", 3)))
        seen: list[Any] = []

        def record(index: Index) -> int:
            seen.append(list(index))
            return 0

        elements = Elements(self.graph, {source.value: record}, analyzer)
        index = at(t, d)
        if len(index) != len(dims(operand)):
            return "its rank is not that of the scores"
        try:
            elements.at(operand, [0 if static(x) == 1 else i for i, x in zip(index, dims(operand))])
        except Unprovable as error:
            return str(error)
        wanted = [b, tirx.floordiv(h, int64(heads // kv_heads)), t, d]
        axes = zip([seen[0][a] for a in source.order], wanted, source.shape) if seen else []
        if seen and all(static(dim) == 1 or elements.prove(tirx.EQ(int64(x), y)) for x, y, dim in axes):
            return None
        return f"its heads are not the {kv_heads} KV heads each repeated {heads // kv_heads} times in order"

    def _without_past(self, softmax: relax.Var, operand: Operand, what: str) -> Operand:
        """The new tokens' part of concat(past, new)."""
        call = self.graph.resolve(operand.value)
        if not self.roles.past:
            return operand
        parts = operands(call) if op_name(call) == "concat" else []
        past = {self.params[name] for name in self.roles.past}
        before = self._past_behind(parts[0]) if len(parts) == 2 else None
        if before not in past or int(call.attrs.axis) % 4 != operand.order[2]:
            raise self.refusal(softmax, f"{what} is not concat(past, new) along the token axis")
        owner = self._owners.setdefault(before, (softmax, what))
        if owner != (softmax, what):
            other = f"{owner[1]} at {self.names.describe(owner[0])}"
            raise self.refusal(softmax, f"{what} and {other} read the same past; pages keep each one's own")
        return replace(operand, value=parts[1])

    def _past_of(self, operand: Operand) -> str:
        """The name of the past that a value begins with."""
        return str(self._past_behind(operands(self.graph.resolve(operand.value))[0]).name)

    def _past_behind(self, value: relax.Expr) -> relax.Expr:
        """The input behind a past; one whose head size is not known is given its size by a reshape."""
        call = self.graph.resolve(value)
        sized = op_name(call) == "reshape" and static(dims(call.args[0])[-1]) is None
        return self.graph.alias(call.args[0] if sized else value)

    def _output(self, output: relax.Var, query: Operand) -> tuple[relax.Var, bool]:
        """What the marker, whose result is of the queries' type, stands for; whether tokens come first."""
        users = self.graph.users[output]
        if len(users) == 1:
            call = self.graph.definitions[users[0]]
            if op_name(call) == "astype" and call.attrs.dtype == query.value.ty.dtype.dtype:
                return self._output(users[0], query)
            if op_name(call) == "reshape" and same_shape(dims(users[0])[:-1], query.shape[:3]):
                return self._output(users[0], query)
            if op_name(call) == "permute_dims" and [int(a) for a in call.attrs.axes or ()] == [0, 2, 1, 3]:
                return users[0], True
        return output, False

    def _rope(self, query: relax.Var) -> str | None:
        """How a query is turned by its position: rotate_half when q = x * cos + concat(-x2, x1) * sin."""
        call = self.graph.resolve(query)
        for product in (self.graph.resolve(a) for a in call.args) if op_name(call) == "add" else ():
            for factor in (
                (self.graph.resolve(a) for a in product.args) if op_name(product) == "multiply" else ()
            ):
                first = operands(factor)[0] if op_name(factor) == "concat" else None
                if first is not None and op_name(self.graph.resolve(first)) == "negative":
                    return "rotate_half"
        return "rotary" if self._is_turned(query) else None

    def _is_turned(self, query: relax.Var) -> bool:
        """Whether an angle, or a table's row for the position, enters behind the last product."""
        stack, seen = [query], set[relax.Var]()
        while stack:
            var = stack.pop()
            if var in seen or var not in self.graph.definitions:
                continue
            seen.add(var)
            call = self.graph.definitions[var]
            if var not in self.from_tokens:
                behind = (op_name(self.graph.definitions.get(v, v)) for v in self.graph.ancestors([var]))
                if any(d.same_as(self.sequence) for d in dims(var)) and {"cos", "sin", "take"} & set(behind):
                    return True
            elif op_name(call) != "matmul":
                stack.extend(o for o in operands(call) if isinstance(o, relax.Var))
        return False
