"""Find every attention in an imported graph, prove what it computes, and put one marker call in its place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tvm import IRModule, relax

from .attention_sites import Match, Operand, SiteFinder
from .base import Result
from .errors import UnsupportedModel
from .facts import Roles
from .graph import Graph, graph_of
from .markers import ATTENTION
from .nodes import NodeNames
from .rebuild import rebuild


@dataclass(frozen=True)
class RecognizeAttention:
    """One marker a site: `kvc.attention(q, k, v, site)`.

    Before: `softmax(cap(scale * q @ k^T) + mask) @ v` spelled out in any order of scales, layouts and casts,
        or as a marker `kvc.sdpa`; k and v may be concatenated with a past.
    After: `call_pure_packed("kvc.attention", q [b,h,s,e], k [b,g,s,e], v [b,g,s,f], site)` -> [b,s,h,f] with
        the new keys and values only; the function returns the logits alone.
    Needs: the importer's binding names; inputs in the roles of `roles`.
    Refuses: a softmax that is no attention, heads that are not repeated in order (GQA), a mask that lets a
        token see later ones or has no predicate, a bias that is not linear in the key's position, a past that
        is not concatenated before the new keys, an output in a past's place that is not it and the new keys.
    """

    roles: Roles
    names: NodeNames
    tables: Mapping[str, np.ndarray] = field(default_factory=dict, compare=False)
    """The numbers of small parameters, for masks, biases and learned scores that are made of them."""

    def run(self, mod: IRModule) -> Result:
        """Facts of the result: tuple[AttentionSite, ...]. Raises UnsupportedModel."""
        function = mod["main"]
        finder = SiteFinder(graph_of(function), self.roles, self.names, self.tables)
        matches = [finder.match(var, i) for i, var in enumerate(finder.attentions())]
        if not matches:
            raise UnsupportedModel(
                "the model has no attention: no softmax over scores was found; it is no decoder"
            )
        self._check_presents(graph_of(function), matches)
        by_output = {m.output: m for m in matches}
        output = graph_of(function).resolve(function.body.body)
        logits = output.fields[0] if isinstance(output, relax.Tuple) else function.body.body
        remap: dict[relax.Var, relax.Expr] = {}

        def place(builder: relax.BlockBuilder, var: relax.Var, value: relax.Expr) -> relax.Expr | None:
            match = by_output.get(var)
            return None if match is None else _marker(builder, match, remap)

        module = rebuild(mod, function.params, place, values=remap, output=logits)
        return Result(module, len(matches), tuple(m.site for m in matches))

    def _check_presents(self, graph: Graph, matches: Sequence[Match]) -> None:
        """What comes out in the place of a past is what attention reads: it goes in with the next call."""
        output = graph.resolve(graph.function.body.body)
        presents = list(output.fields)[1:] if isinstance(output, relax.Tuple) else []
        if len(presents) != len(self.roles.past):
            return
        read = {past: whole for m in matches for past, whole in m.pasts}
        for name, present in zip(self.roles.past, presents):
            if name in read and graph.alias(present) != graph.alias(read[name]):
                raise UnsupportedModel(
                    f"the output in the place of the past '{name}' is not what attention reads: the past and "
                    "what is new"
                )


def _marker(builder: relax.BlockBuilder, match: Match, values: dict[relax.Var, relax.Expr]) -> relax.Expr:
    batch, heads, sequence, _ = match.query.shape
    dtype = match.query.value.ty.dtype.dtype
    operands = (match.query, match.key, match.value)
    query, key, value = (_typed(builder, _in_order(builder, o, values), dtype) for o in operands)
    out = relax.TensorType((batch, sequence, heads, match.site.value_dim), dtype)
    index = relax.prim_value(match.site.index)
    marker = relax.op.call_pure_packed(ATTENTION, query, key, value, index, ty_args=out)
    result = builder.emit(marker)
    if not match.transposed:
        result = builder.emit(relax.op.permute_dims(result, [0, 2, 1, 3]))
        if len(match.output.ty.shape.values) != 4:
            result = builder.emit(relax.op.reshape(result, match.output.ty.shape))
    return _typed(builder, result, match.output.ty.dtype.dtype)


def _typed(builder: relax.BlockBuilder, value: relax.Var, dtype: Any) -> relax.Var:
    """A value in a type. Graphs may have weights, values and outputs in float32 beside narrower queries."""
    same = value.ty.dtype.dtype == dtype
    return value if same else builder.emit(relax.op.astype(value, str(dtype)))


def _in_order(
    builder: relax.BlockBuilder, operand: Operand, values: dict[relax.Var, relax.Expr]
) -> relax.Expr:
    """An operand as [batch, heads, tokens, elements]."""
    value = values.get(operand.value, operand.value)
    if operand.order == (0, 1, 2, 3):
        return value
    return builder.emit(relax.op.permute_dims(value, list(operand.order)))
