"""Values alone are kept; keys that are the same numbers, but for factors and a rotation, are made of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from tvm import IRModule, relax

from .base import Result
from .emitting import angles, indices, replaced, shape
from .graph import dims, graph_of, op_name, static
from .kept_sites import Values, rekeyed_site
from .markers import ATTENTION, REKEYED
from .rebuild import rebuild
from .rekeying import Factor
from .sites import AttentionSite
from .state_forms import Forms


@dataclass(frozen=True)
class KeepValues:
    """The values of a token are kept, and its position's cosines and sines.

    Before: `kvc.attention(q [1,h,n,e], k [1,g,n,e], v [1,g,n,e], site)`, k being v times factors of its
        elements, then turned by its position (RoPE) or not.
    After: `kvc.rekeyed_attention(q, row [1,1,n,w], *factors [g*e], site)`, row being the values of all heads,
        cosines and sines; the factors are an operand where there are some. Keys are not computed any more.
    Needs: FlattenTokens; the form legal for the sites.
    Refuses: nothing; raises Illegal for a site whose form is not legal.
    """

    sites: tuple[AttentionSite, ...]
    """All sites of the model."""
    chosen: frozenset[int]
    """Sites to change."""
    tables: Mapping[str, np.ndarray] = field(default_factory=dict, hash=False)
    """Numbers of parameters, which may be frequencies of rotations."""

    def run(self, mod: IRModule) -> Result:
        """Facts of the result: tuple[AttentionSite, ...], all sites as they are now."""
        forms = Forms(graph_of(mod["main"]), tables=self.tables)
        found = {i: forms.values(c, self.sites[i]) for i, c in forms.markers().items() if i in self.chosen}
        sites = tuple(rekeyed_site(s, found[s.index]) if s.index in found else s for s in self.sites)
        values: dict[relax.Var, relax.Expr] = {}

        def place(builder: relax.BlockBuilder, var: relax.Var, value: relax.Expr) -> relax.Expr | None:
            if op_name(value) != ATTENTION or int(value.args[4].value) not in found:
                return None
            index = int(value.args[4].value)
            query, _, kept = value.args[1:4]
            operands = [query, _row(builder, kept, found[index], values)]
            if found[index].kept.scaled:
                operands.append(_factors(builder, found[index], values))
            return relax.op.call_pure_packed(REKEYED, *operands, relax.prim_value(index), ty_args=var.ty)

        return Result(rebuild(mod, mod["main"].params, place, values=values), len(found), sites)


def _row(
    builder: relax.BlockBuilder, value: relax.Expr, found: Values, values: dict[relax.Var, relax.Expr]
) -> relax.Expr:
    """What is kept of every token, [1, 1, n, width], in the type of the values [1, heads, n, elements]."""
    n, dtype, kept = dims(value)[2], str(value.ty.dtype.dtype), found.kept
    value = builder.emit(relax.op.permute_dims(value, [0, 2, 1, 3]))
    row = builder.emit(relax.op.reshape(value, shape(1, 1, n, kept.values)))
    if found.rekeying.angles is None:
        return row
    turned = angles(builder, found.rekeying.angles, n, dtype, values, fine=kept.fine)
    return builder.emit(relax.op.concat([row, *turned], axis=3))


def _factors(builder: relax.BlockBuilder, found: Values, values: dict[relax.Var, relax.Expr]) -> relax.Expr:
    """What values are multiplied with to be keys, float32 [heads * elements]."""
    kept = found.kept
    product: relax.Expr = relax.const(np.full(kept.values, found.rekeying.number, np.float32))
    for factor in found.rekeying.factors:
        source = replaced(factor.source, values)
        size = int(np.prod([static(d) or 0 for d in dims(source)]))
        flat = builder.emit(relax.op.reshape(source, shape(size)))
        picked = builder.emit(
            relax.op.take(flat, indices(_places(factor, kept.count, kept.dim)), axis=0, mode="clip")
        )
        if str(picked.ty.dtype.dtype) != "float32":
            picked = builder.emit(relax.op.astype(picked, "float32"))
        product = builder.emit(relax.op.multiply(product, picked))
    return product


def _places(factor: Factor, heads: int, width: int) -> np.ndarray:
    """Where the factors of all elements stand in their source, head by head."""
    lines = np.arange(heads)[:, None] * factor.stride + np.arange(width) * factor.step
    return (factor.first + lines).reshape(-1).astype(np.int64)
