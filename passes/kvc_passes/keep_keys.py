"""Keys alone are kept, as they are before they are turned; values are made from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tvm import IRModule, relax, tirx

from .base import Result
from .emitting import angles, head_columns, indices, replaced, shape
from .graph import dims, graph_of, op_name
from .kept_sites import Keys, sliced_site
from .markers import ATTENTION, HEAD_PRODUCT, HeadProduct, marker
from .provenance import Piece, Projection
from .rebuild import rebuild
from .sites import AttentionSite
from .state_forms import Forms
from .weights import Source, weight_of


@dataclass(frozen=True)
class KeyWeights:
    """Which weights take the place of a layer's W_V, and what they are made of.

    With K = x W_K + b_K and the `rest` directions U of x that W_K is weakest in: x W_V is [K - b_K, x U] M.
    """

    index: int
    key: Source
    value: Source
    key_piece: tuple[int, int, int, int]
    """First column, stride, heads and width of the keys in their product."""
    value_piece: tuple[int, int, int, int]
    key_bias: str
    value_bias: str
    """Parameters, "" for none."""
    rest: int

    @property
    def names(self) -> tuple[str, str, str]:
        """Parameters that the pass adds: M [keys + rest, values], U [depth, rest], b_V - b_K M [values].

        They are float32: where directions of the keys cancel, the rounding of these would show, too.
        """
        return (f"layer_{self.index}_values", f"layer_{self.index}_rest", f"layer_{self.index}_bias")


@dataclass(frozen=True)
class KeepKeys:
    """Attention whose values are its keys, before they are turned by their positions.

    Before: `kvc.attention(q [1,h,n,e], k [1,g,n,e], v [1,g,n,f], site)`; k a projection of x that is turned
        (RoPE), v one of the same x, and W_K of full rank.
    After: `kvc.head_product(kvc.attention(q, row [1,1,n,w], row, site), M) + bias`, row the keys of all heads
        before they are turned, x U, and cosines and sines. New parameters: KeyWeights.names.
        A product that holds the values, too, stays as it is.
    Needs: FlattenTokens; the form legal for the sites.
    Refuses: nothing; raises Illegal for a site whose form is not legal.
    """

    sites: tuple[AttentionSite, ...]
    """All sites of the model."""
    rest: Mapping[int, int] = field(hash=False)
    """For sites to change, how many directions of x are kept beside the keys."""

    def run(self, mod: IRModule) -> Result:
        """Facts of the result: all sites as they are now, and the KeyWeights."""
        function = mod["main"]
        graph = graph_of(function)
        forms = Forms(graph)
        found = {i: forms.keys(c, self.sites[i]) for i, c in forms.markers().items() if i in self.rest}
        sites = tuple(
            sliced_site(s, found[s.index], self.rest[s.index]) if s.index in found else s for s in self.sites
        )
        weights = self.weights(forms, found)
        added = {w.index: self._parameters(w, found[w.index]) for w in weights}
        values: dict[relax.Var, relax.Expr] = {}

        def place(builder: relax.BlockBuilder, var: relax.Var, value: relax.Expr) -> relax.Expr | None:
            if op_name(value) != ATTENTION or int(value.args[4].value) not in found:
                return None
            index = int(value.args[4].value)
            row = _row(builder, found[index], sites[index], added[index], forms.provenance.tokens, values)
            return _attention(builder, value.args[1], row, sites[index], self.sites[index], added[index])

        params = [*function.params, *(p for new in added.values() for p in new.values())]
        module = rebuild(mod, params, place, values=values)
        return Result(module, len(found), (sites, weights))

    def weights(self, forms: Forms, found: Mapping[int, Keys]) -> tuple[KeyWeights, ...]:
        """What the values of these sites are made of."""
        return tuple(self._weights(forms, index, keys) for index, keys in found.items())

    def _weights(self, forms: Forms, index: int, keys: Keys) -> KeyWeights:
        site, k, v = self.sites[index], keys.rotation.projection, keys.value

        def source(projection: Projection) -> Source:
            weight = weight_of(forms.graph, projection.weight)
            assert weight is not None
            return weight.sources[0]

        def piece(p: Piece) -> tuple[int, int, int, int]:
            return (p.first, p.stride or 0, site.kv_heads, p.width)

        return KeyWeights(
            index,
            source(k),
            source(v),
            piece(keys.rotation.key),
            piece(keys.value_piece),
            _name(k.bias),
            _name(v.bias),
            self.rest[index],
        )

    def _parameters(self, weights: KeyWeights, keys: Keys) -> dict[str, relax.Var]:
        site, rest = self.sites[weights.index], weights.rest
        kept, values = site.kv_heads * site.head_dim + rest, site.kv_heads * site.value_dim
        shapes = {"values": [kept, values]}
        if rest:
            shapes["rest"] = [keys.value.depth, rest]
        if weights.key_bias or weights.value_bias:
            shapes["bias"] = [values]
        names = dict(zip(("values", "rest", "bias"), weights.names))
        return {
            kind: relax.Var(names[kind], relax.TensorType(extents, "float32"))
            for kind, extents in shapes.items()
        }


def _name(bias: relax.Expr | None) -> str:
    return bias.name if isinstance(bias, relax.Var) else ""


def _row(
    builder: relax.BlockBuilder,
    keys: Keys,
    site: AttentionSite,
    added: Mapping[str, relax.Var],
    n: tirx.Var,
    values: dict[relax.Var, relax.Expr],
) -> relax.Expr:
    """What is kept of every token, [1, 1, n, width], in float32 or the type of the keys."""
    assert site.sliced is not None
    piece = keys.rotation.key
    source = replaced(piece.source, values)
    dtype = str(source.ty.dtype.dtype)

    def typed(value: relax.Expr) -> relax.Expr:
        same = str(value.ty.dtype.dtype) == dtype
        return value if same else builder.emit(relax.op.astype(value, dtype))

    columns = head_columns(piece, site.sliced.count, 1)
    last = len(dims(source)) - 1
    own = builder.emit(relax.op.take(source, indices(columns), axis=last, mode="clip"))
    parts = [builder.emit(relax.op.reshape(own, shape(1, 1, n, len(columns))))]
    if "rest" in added:
        x = replaced(keys.value.x, values)
        x = builder.emit(relax.op.reshape(x, shape(1, n, keys.value.depth)))
        weak: relax.Expr = added["rest"]
        if weak.ty.dtype.dtype != x.ty.dtype.dtype:
            weak = builder.emit(relax.op.astype(weak, x.ty.dtype.dtype))
        rest = builder.emit(relax.op.matmul(x, weak))
        parts.append(typed(builder.emit(relax.op.reshape(rest, shape(1, 1, n, site.sliced.rest)))))
    kept = angles(builder, keys.rotation.angles, n, dtype, values, fine=site.sliced.fine)
    return builder.emit(relax.op.concat([*parts, *kept], axis=3))


def _attention(
    builder: relax.BlockBuilder,
    query: relax.Expr,
    row: relax.Expr,
    site: AttentionSite,
    before: AttentionSite,
    added: Mapping[str, relax.Var],
) -> relax.Expr:
    """The attention over rows, [1, n, heads, f]; in float32 as far as the values are made."""
    _, heads, n, _ = dims(query)
    dtype, width = str(query.ty.dtype.dtype), before.value_dim
    if str(row.ty.dtype.dtype) != dtype:
        row = builder.emit(relax.op.astype(row, dtype))
    mixed = relax.TensorType(shape(1, n, heads, site.value_dim), "float32")
    call = relax.op.call_pure_packed(ATTENTION, query, row, row, relax.prim_value(site.index), ty_args=mixed)
    attrs = HeadProduct(site.heads, before.group, width, 0, width)
    out = relax.TensorType(shape(1, n, heads, width), "float32")
    result = marker(HEAD_PRODUCT, [builder.emit(call), added["values"]], attrs, out)
    if "bias" in added:
        result = relax.op.add(builder.emit(result), _bias(builder, added["bias"], site, before))
    return result if dtype == "float32" else relax.op.astype(builder.emit(result), dtype)


def _bias(
    builder: relax.BlockBuilder, bias: relax.Var, site: AttentionSite, before: AttentionSite
) -> relax.Expr:
    """The values' bias of every query head, [1, 1, heads, f]."""
    width = before.value_dim
    columns = head_columns(Piece(0, width, bias, 0, width), site.heads, before.group)
    taken = builder.emit(relax.op.take(bias, indices(columns), axis=0, mode="clip"))
    return builder.emit(relax.op.reshape(taken, shape(1, 1, site.heads, width)))
