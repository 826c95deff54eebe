"""Attention over what keys and values are projections of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tvm import IRModule, relax, tirx

from .base import Result
from .emitting import head_columns, indices, replaced, shape, shared_columns
from .graph import dims, graph_of, op_name
from .kept_sites import Latent as Kept
from .kept_sites import kept_site
from .markers import ATTENTION, LATENT, HeadProduct, Latent, marker
from .own_query import own_query
from .provenance import Piece
from .rebuild import rebuild
from .sites import AttentionSite
from .state_forms import Forms


@dataclass(frozen=True)
class AbsorbProjections:
    """Keys and values that are projections of one value are never made; attention is over the value itself.

    q_h . (x W_K + b_K)_h = (q_h W_K^T) . x + a number that is the same for all keys, which a softmax cancels;
    and sum p (x W_V + b_V)_h = (sum p x) W_V + b_V. (DeepSeek-V2, arXiv 2405.04434, calls this absorption.)

    Before: `kvc.attention(q [1,h,n,e], k [1,g,n,e], v [1,g,n,f], site)`, k and v projections of x [1,n,d] but
        for elements that all heads share, r of them.
    After: `kvc.latent_attention(q, x' [1,1,n,d+r], W_K, W_V, site)`, x' beginning with x. A query that was a
        part of the same product as k or v has a product of its own.
    Needs: FlattenTokens; forms that are legal for the sites.
    Refuses: nothing; raises Illegal for a site whose form is not legal.
    """

    sites: tuple[AttentionSite, ...]
    """All sites of the model, as recognized."""
    absorbed: frozenset[int]
    """Sites to change."""

    def run(self, mod: IRModule) -> Result:
        """Facts of the result: tuple[AttentionSite, ...], all sites as they are now."""
        graph = graph_of(mod["main"])
        forms = Forms(graph)
        latents = {
            index: forms.latent(call, self.sites[index])
            for index, call in forms.markers().items()
            if index in self.absorbed
        }
        sites = self._kept(latents)
        values: dict[relax.Var, relax.Expr] = {}

        def place(builder: relax.BlockBuilder, var: relax.Var, value: relax.Expr) -> relax.Expr | None:
            if op_name(value) != ATTENTION or int(value.args[4].value) not in latents:
                return None
            old = graph.definitions[var]
            latent, site = latents[int(value.args[4].value)], self.sites[int(value.args[4].value)]
            query = own_query(builder, forms, old.args[1], {latent.key.product, latent.value.product}, values)
            given = value.args[1] if query is None else query
            return _attention(builder, given, latent, site, dims(old.args[2])[2], values)

        module = rebuild(mod, mod["main"].params, place, values=values)
        return Result(module, len(latents), sites)

    def _kept(self, latents: dict[int, Kept]) -> tuple[AttentionSite, ...]:
        """All sites as they are now; what several read of an encoder's output, the first of them keeps."""
        owners: dict[relax.Var, int] = {}
        sites = []
        for site in self.sites:
            latent = latents.get(site.index)
            if latent is None:
                sites.append(site)
                continue
            owner = owners.setdefault(latent.source, site.index) if latent.memory else site.index
            sites.append(kept_site(site, latent, None if owner == site.index else owner))
        return tuple(sites)


def _attention(
    builder: relax.BlockBuilder,
    query: relax.Expr,
    latent: Kept,
    site: AttentionSite,
    rows: tirx.Var,
    values: dict[relax.Var, relax.Expr],
) -> relax.Expr:
    """The attention of a site over the latent value of `rows` tokens, [1, n, heads, f]."""
    n = dims(query)[2]
    dtype, heads, depth = str(query.ty.dtype.dtype), site.heads, latent.key.depth

    def typed(value: relax.Expr) -> relax.Expr:
        same = str(value.ty.dtype.dtype) == dtype
        return value if same else builder.emit(relax.op.astype(value, dtype))

    def attributes(piece: Piece, absorbed: bool) -> HeadProduct:
        return HeadProduct(heads, site.group, piece.width, piece.first, piece.stride or 0, absorbed)

    def asked(piece: Piece) -> relax.Expr:
        if piece.width == site.head_dim:
            return query
        return builder.emit(
            relax.op.strided_slice(query, [3], [piece.low], [piece.high], assume_inbound=True)
        )

    def joined(parts: Sequence[relax.Expr]) -> relax.Expr:
        return parts[0] if len(parts) == 1 else builder.emit(relax.op.concat(list(parts), axis=3))

    x = builder.emit(relax.op.reshape(replaced(latent.source, values), shape(1, 1, rows, depth)))
    shared = [shared_columns(builder, replaced(piece.source, values), piece, rows) for piece in latent.shared]
    key = joined([typed(part) for part in (x, *shared)])
    q = joined([asked(piece) for piece in (latent.key_piece, *latent.shared)])
    attrs = Latent(site.index, attributes(latent.key_piece, True), attributes(latent.value_piece, False))
    weights = [replaced(projection.weight, values) for projection in (latent.key, latent.value)]
    out = relax.TensorType(shape(1, n, heads, latent.value_piece.width), dtype)
    result = builder.emit(marker(LATENT, [q, key, *weights], attrs, out))
    if latent.value.bias is None:
        return result
    columns = head_columns(latent.value_piece, heads, site.group)
    bias = builder.emit(
        relax.op.take(replaced(latent.value.bias, values), indices(columns), axis=0, mode="clip")
    )
    bias = builder.emit(relax.op.reshape(typed(bias), shape(1, 1, heads, latent.value_piece.width)))
    return relax.op.add(result, bias)
