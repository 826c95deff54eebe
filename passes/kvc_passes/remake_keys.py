"""Keys and values are made again, from what both are projections of, when attention reads them."""

from __future__ import annotations

from dataclasses import dataclass

from tvm import IRModule, relax

from .base import Result
from .emitting import angles, head_columns, indices, replaced, shape
from .graph import dims, graph_of, op_name
from .kept_sites import Remaking, remade_site
from .markers import ATTENTION, REMADE, HeadProduct, Latent, marker
from .own_query import own_query
from .provenance import Piece, Projection
from .rebuild import rebuild
from .sites import AttentionSite
from .state_forms import Forms


@dataclass(frozen=True)
class RemakeKeys:
    """The value that keys and values are projections of is kept, and its position's cosines and sines.

    Before: `kvc.attention(q [1,h,n,e], k [1,g,n,e], v [1,g,n,f], site)`, k and v projections of one value
        x [1,n,d]; k may be turned by its position (RoPE).
    After: `kvc.remade_attention(q, row [1,1,n,w], W_K, W_V, *biases, site)`, row being x, cosines and sines.
        Keys and values are not computed any more; a query that was a part of the same product has a product
        of its own, unless it was changed otherwise than by a rotation: then that product stays as it is.
    Needs: FlattenTokens; the form legal for the sites.
    Refuses: nothing; raises Illegal for a site whose form is not legal.
    """

    sites: tuple[AttentionSite, ...]
    """All sites of the model."""
    chosen: frozenset[int]
    """Sites to change."""

    def run(self, mod: IRModule) -> Result:
        """Facts of the result: tuple[AttentionSite, ...], all sites as they are now."""
        graph = graph_of(mod["main"])
        forms = Forms(graph)
        found = {i: forms.remaking(c, self.sites[i]) for i, c in forms.markers().items() if i in self.chosen}
        sites = tuple(remade_site(s, found[s.index]) if s.index in found else s for s in self.sites)
        values: dict[relax.Var, relax.Expr] = {}

        def place(builder: relax.BlockBuilder, var: relax.Var, value: relax.Expr) -> relax.Expr | None:
            if op_name(value) != ATTENTION or int(value.args[4].value) not in found:
                return None
            remaking = found[int(value.args[4].value)]
            products = {remaking.key.product, remaking.value.product}
            query = own_query(builder, forms, graph.definitions[var].args[1], products, values)
            site = sites[int(value.args[4].value)]
            return _attention(builder, value.args[1] if query is None else query, remaking, site, values)

        module = rebuild(mod, mod["main"].params, place, values=values)
        return Result(module, len(found), sites)


def _attention(
    builder: relax.BlockBuilder,
    query: relax.Expr,
    found: Remaking,
    site: AttentionSite,
    values: dict[relax.Var, relax.Expr],
) -> relax.Expr:
    """The attention of a site, [1, n, heads, f]."""
    n, dtype, kept = dims(query)[2], str(query.ty.dtype.dtype), found.kept

    def typed(value: relax.Expr) -> relax.Expr:
        same = str(value.ty.dtype.dtype) == dtype
        return value if same else builder.emit(relax.op.astype(value, dtype))

    def bias(projection: Projection, piece: Piece) -> list[relax.Expr]:
        if projection.bias is None:
            return []
        columns = indices(head_columns(piece, site.kv_heads, 1))
        given = replaced(projection.bias, values)
        return [typed(builder.emit(relax.op.take(given, columns, axis=0, mode="clip")))]

    def attributes(piece: Piece) -> HeadProduct:
        return HeadProduct(site.heads, site.group, piece.width, piece.first, piece.stride or 0)

    row = typed(builder.emit(relax.op.reshape(replaced(found.source, values), shape(1, 1, n, kept.depth))))
    if found.rotation is not None:
        turned = angles(builder, found.rotation.angles, n, dtype, values, fine=kept.fine)
        row = builder.emit(relax.op.concat([row, *turned], axis=3))
    pairs = ((found.key, found.key_piece), (found.value, found.value_piece))
    weights = [replaced(projection.weight, values) for projection, _ in pairs]
    biases = [bias(*pair) for pair in pairs]
    key, value = (attributes(piece) for _, piece in pairs)
    attrs = Latent(site.index, key, value, (bool(biases[0]), bool(biases[1])))
    out = relax.TensorType(shape(1, n, site.heads, site.value_dim), dtype)
    return marker(REMADE, [query, row, *weights, *biases[0], *biases[1]], attrs, out)
