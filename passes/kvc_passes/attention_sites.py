"""Reading one attention out of the graph around its softmax, and proving its parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

from tvm import relax, tirx
from tvm.sym import Analyzer

from .conditions import Unprovable
from .element import Elements, Index
from .errors import UnsupportedModel
from .facts import AttentionSite, MaskFact, Roles
from .graph import Graph, dims, op_name, operands, same_shape, scalar, static
from .indices import bind_extent, bind_index, int64
from .masks import HIDDEN, prove_mask
from .nodes import NodeNames


@dataclass(frozen=True)
class Match:
    """An attention in the graph: its operands and the value that a marker can replace."""

    site: AttentionSite
    query: relax.Var
    key: relax.Var
    value: relax.Var
    output: relax.Var
    """Either [batch, heads, sequence, value dim] or, if `transposed`, [batch, sequence, heads, value dim]."""
    transposed: bool


class SiteFinder:
    """Matches the attentions of one function."""

    def __init__(self, graph: Graph, roles: Roles, names: NodeNames) -> None:
        self.graph, self.roles, self.names = graph, roles, names
        self.params = {p.name: p for p in graph.function.params}
        self.batch, self.sequence = dims(self.params[roles.tokens])
        self.past = dims(self.params[roles.past[0]])[2] if roles.past else tirx.IntImm("int64", 0)
        positions_and_mask = {
            self.params.get(roles.positions or ""),
            self.params.get(roles.attention_mask or ""),
        }
        self.data = graph.reachable_from(p for p in graph.function.params if p not in positions_and_mask)
        """Everything that depends on token ids, weights or the past: never a mask."""
        self._proved: dict[Any, MaskFact] = {}
        self._owners: dict[relax.Var, tuple[relax.Var, str]] = {}

    def softmaxes(self) -> list[relax.Var]:
        """Bindings of softmax over scores that depend on data."""
        return [v for v in self.graph.order if op_name(self.graph.definitions[v]) == "softmax"]

    def refuse(self, var: relax.Var, rule: str) -> NoReturn:
        """Raise `refusal`."""
        raise self.refusal(var, rule)

    def refusal(self, var: relax.Var, rule: str) -> UnsupportedModel:
        """The error that names the node of `var` and the rule that it breaks."""
        return UnsupportedModel(f"attention at {self.names.describe(var)}: {rule}")

    def match(self, softmax: relax.Var, index: int) -> Match:
        """The attention around `softmax`. Raises UnsupportedModel with the node and the rule that failed."""
        call = self.graph.definitions[softmax]
        if int(call.attrs.axis) % len(dims(softmax)) != len(dims(softmax)) - 1 or len(dims(softmax)) != 4:
            self.refuse(softmax, "expected a softmax over the last axis of scores [batch, heads, query, key]")
        scores, masks = self._masks(call.args[0])
        scores, softcap, scale = self._softcap(scores)
        product = self.graph.resolve(scores)
        if op_name(product) != "matmul":
            self.refuse(
                softmax,
                f"expected scores from a matrix product of q and k, found {op_name(product) or 'an input'}",
            )
        heads = static(dims(softmax)[1])
        if heads is None:
            self.refuse(softmax, "the number of heads is not a constant")
        query, q_scale = self._operand(softmax, product.args[0], "q", heads, swapped=False)
        key, k_scale = self._operand(softmax, product.args[1], "k", heads, swapped=True)
        output, weighted = self._weighted_sum(softmax)
        value, v_scale = self._operand(softmax, weighted.args[1], "v", heads, swapped=False)
        if v_scale != 1.0:
            self.refuse(softmax, f"the values are scaled by {v_scale}")
        key, value = self._without_past(softmax, key, "k"), self._without_past(softmax, value, "v")
        for name, operand in (("q", query), ("k", key), ("v", value)):
            if not same_shape([dims(operand)[0], dims(operand)[2]], [self.batch, self.sequence]):
                self.refuse(softmax, f"{name} does not have one row for each of the model's own tokens")
        output, transposed = self._output(output)
        site = AttentionSite(
            index=index,
            node=self.names.name(softmax),
            heads=heads,
            kv_heads=self._static(softmax, key, 1, "KV heads"),
            head_dim=self._static(softmax, query, 3, "head dim"),
            value_dim=self._static(softmax, value, 3, "value dim"),
            scale=scale * q_scale * k_scale,
            softcap=softcap,
            mask=self._mask(softmax, masks, heads),
            rope=self._rope(query),
        )
        if self._static(softmax, value, 1, "value heads") != site.kv_heads:
            self.refuse(softmax, "k and v have different numbers of heads")
        return Match(site, query, key, value, output, transposed)

    def _static(self, softmax: relax.Var, value: relax.Var, axis: int, what: str) -> int:
        size = static(dims(value)[axis])
        if size is None:
            self.refuse(softmax, f"the number of {what} is not a constant")
        return size

    def _is_mask(self, value: relax.Expr) -> bool:
        return not (isinstance(value, relax.Var) and value in self.data)

    def _masks(self, value: relax.Expr) -> tuple[relax.Expr, list[tuple[relax.Expr, str]]]:
        """Peel masks off the scores: added, or chosen by a condition."""
        masks: list[tuple[relax.Expr, str]] = []
        while True:
            call = self.graph.resolve(value)
            name = op_name(call)
            if name == "add" and scalar(call.args[1], self.graph) is None and self._is_mask(call.args[1]):
                masks.append((call.args[1], "add"))
                value = call.args[0]
            elif name == "add" and scalar(call.args[0], self.graph) is None and self._is_mask(call.args[0]):
                masks.append((call.args[0], "add"))
                value = call.args[1]
            elif name == "where" and self._is_mask(call.args[0]) and self._hides(call.args[2]):
                masks.append((call.args[0], "keep"))
                value = call.args[1]
            elif name == "where" and self._is_mask(call.args[0]) and self._hides(call.args[1]):
                masks.append((call.args[0], "drop"))
                value = call.args[2]
            elif name == "astype":
                value = call.args[0]
            else:
                return value, masks

    def _hides(self, value: relax.Expr) -> bool:
        """Whether a score is replaced by a constant that leaves it no weight."""
        constant = scalar(value, self.graph)
        return constant is not None and constant <= HIDDEN

    def _scaled(self, value: relax.Expr) -> tuple[relax.Expr, float]:
        """Peel multiplications and divisions by constants."""
        scale = 1.0
        while True:
            call = self.graph.resolve(value)
            name = op_name(call)
            right = scalar(call.args[1], self.graph) if name in ("multiply", "divide") else None
            left = scalar(call.args[0], self.graph) if name == "multiply" else None
            if right is not None:
                scale, value = scale * right if name == "multiply" else scale / right, call.args[0]
            elif left is not None:
                scale, value = scale * left, call.args[1]
            elif name == "astype" and "float" in str(call.attrs.dtype):
                value = call.args[0]
            else:
                return value, scale

    def _softcap(self, value: relax.Expr) -> tuple[relax.Expr, float | None, float]:
        """cap * tanh(scores * scale / cap), or scores * scale."""
        inner, outer = self._scaled(value)
        call = self.graph.resolve(inner)
        if op_name(call) != "tanh":
            return inner, None, outer
        inner, scale = self._scaled(call.args[0])
        return inner, outer, scale * outer

    def _operand(
        self, softmax: relax.Var, value: relax.Expr, what: str, heads: int, swapped: bool
    ) -> tuple[relax.Var, float]:
        """The tensor [batch, heads or KV heads, tokens, dim] behind one operand of a product, and its scale.

        Walks back through layout changes and constant factors, and keeps the deepest value for which the
        operand's element [b, h, t, d] is proved to be the value's element [b, h // group, t, d].
        """
        found: tuple[relax.Var, float] | None = None
        current, scale = self._scaled(value)
        reason = "its layout is not [batch, heads, tokens, head dim]"
        while isinstance(current, relax.Var):
            if len(dims(current)) == 4:
                refused = self._same_heads(value, current, heads, swapped)
                if refused is None:
                    found = current, scale
                else:
                    reason = refused
            call = self.graph.resolve(current)
            if op_name(call) not in ("reshape", "permute_dims", "expand_dims", "broadcast_to", "squeeze"):
                break
            current, factor = self._scaled(call.args[0])
            scale *= factor
        if found is None:
            self.refuse(softmax, f"{what}: {reason}")
        return found

    def _same_heads(self, operand: relax.Expr, source: relax.Var, heads: int, swapped: bool) -> str | None:
        """None when operand[b, h, t, d] (keys: [b, h, d, t]) is source[b, h // group, t, d], else why not."""
        kv_heads = static(dims(source)[1])
        if not kv_heads or heads % kv_heads or len(dims(operand)) != 4:
            return f"{kv_heads} heads do not divide the {heads} query heads"
        analyzer = self._analyzer()
        b, h = bind_index(analyzer, "b", self.batch), bind_index(analyzer, "h", tirx.IntImm("int64", heads))
        t, d = bind_index(analyzer, "t", dims(source)[2]), bind_index(analyzer, "d", dims(source)[3])
        seen: list[Any] = []

        def record(index: Index) -> int:
            seen.append(list(index))
            return 0

        elements = Elements(self.graph, {source: record}, analyzer)
        try:
            elements.at(operand, [b, h, d, t] if swapped else [b, h, t, d])
        except Unprovable as error:
            return str(error)
        wanted = [b, tirx.floordiv(h, tirx.IntImm("int64", heads // kv_heads)), t, d]
        axes = zip(seen[0], wanted, dims(source)) if seen else []
        if seen and all(static(dim) == 1 or elements.prove(tirx.EQ(int64(x), y)) for x, y, dim in axes):
            return None
        return f"its heads are not the {kv_heads} KV heads each repeated {heads // kv_heads} times in order"

    def _analyzer(self) -> Analyzer:
        analyzer = Analyzer()
        for extent, least in ((self.batch, 1), (self.sequence, 1), (self.past, 0)):
            bind_extent(analyzer, extent, least)
        return analyzer

    def _mask(self, softmax: relax.Var, masks: list[tuple[relax.Expr, str]], heads: int) -> MaskFact:
        if not masks:
            self.refuse(
                softmax, "it has no mask: every token sees every other; a decoder's attention is causal"
            )
        key = (heads, str(dims(softmax)), *((self.graph.alias(m), use) for m, use in masks))
        if key in self._proved:
            return self._proved[key]
        analyzer = self._analyzer()
        b = bind_index(analyzer, "b", self.batch)
        h = bind_index(analyzer, "h", tirx.IntImm("int64", heads))
        i = bind_index(analyzer, "query", self.sequence)
        j = bind_index(analyzer, "key", dims(softmax)[3])
        leaves: dict[relax.Var, Any] = {}
        if self.roles.attention_mask:  # the runtime has no padding: every token in the mask is real
            leaves[self.params[self.roles.attention_mask]] = lambda index: 1
        if self.roles.positions:
            leaves[self.params[self.roles.positions]] = lambda index: index[-1] + self.past
        try:
            self._proved[key] = prove_mask(
                Elements(self.graph, leaves, analyzer), masks, i, j, [b, h, i, j], i + self.past
            )
        except Unprovable as error:
            self.refuse(softmax, f"its mask cannot be proved causal: it {error}")
        return self._proved[key]

    def _weighted_sum(self, softmax: relax.Var) -> tuple[relax.Var, relax.Call]:
        """The product with v: follows casts and the guard where(isnan(p), 0, p)."""
        var = softmax
        for _ in range(6):
            users = [u for u in self.graph.users[var] if op_name(self.graph.definitions[u]) != "isnan"]
            if len(users) != 1:
                break
            call = self.graph.definitions[users[0]]
            if op_name(call) == "matmul" and self.graph.alias(call.args[0]) == var:
                return users[0], call
            if not (op_name(call) in ("astype", "") or self._is_nan_guard(call, var)):
                break
            var = users[0]
        raise self.refusal(softmax, "expected one product of the softmax with the values")

    def _is_nan_guard(self, call: relax.Expr, var: relax.Var) -> bool:
        """where(isnan(p), 0, p): rows that see no key; a causal row sees itself."""
        if op_name(call) != "where":
            return False
        condition, zero, kept = call.args
        test = self.graph.resolve(condition)
        guards = op_name(test) == "isnan" and self.graph.alias(test.args[0]) == var
        return guards and scalar(zero, self.graph) == 0 and self.graph.alias(kept) == var

    def _without_past(self, softmax: relax.Var, value: relax.Var, what: str) -> relax.Var:
        """The new tokens' part of concat(past, new)."""
        call = self.graph.resolve(value)
        if not self.roles.past:
            return value
        parts = operands(call) if op_name(call) == "concat" else []
        past = {self.params[name] for name in self.roles.past}
        if len(parts) != 2 or self.graph.alias(parts[0]) not in past or int(call.attrs.axis) % 4 != 2:
            raise self.refusal(softmax, f"{what} is not concat(past, new) along the token axis")
        owner = self._owners.setdefault(self.graph.alias(parts[0]), (softmax, what))
        if owner != (softmax, what):
            other = f"{owner[1]} at {self.names.describe(owner[0])}"
            raise self.refusal(softmax, f"{what} and {other} read the same past; pages keep each one's own")
        return parts[1]

    def _output(self, output: relax.Var) -> tuple[relax.Var, bool]:
        users = self.graph.users[output]
        if len(users) == 1:
            call = self.graph.definitions[users[0]]
            if op_name(call) == "permute_dims" and [int(a) for a in call.attrs.axes] == [0, 2, 1, 3]:
                return users[0], True
        return output, False

    def _rope(self, query: relax.Var) -> str | None:
        """rotate_half when q = x * cos + concat(-x2, x1) * sin."""
        call = self.graph.resolve(query)
        for product in (self.graph.resolve(a) for a in call.args) if op_name(call) == "add" else ():
            for factor in (
                (self.graph.resolve(a) for a in product.args) if op_name(product) == "multiply" else ()
            ):
                first = operands(factor)[0] if op_name(factor) == "concat" else None
                if first is not None and op_name(self.graph.resolve(first)) == "negative":
                    return "rotate_half"
        return None
