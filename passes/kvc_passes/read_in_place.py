"""Queries, keys and values are read where they stand, and turned by whoever reads them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from tvm import IRModule, relax

from .base import Result
from .conditions import Unprovable
from .emitting import replaced, shape
from .graph import Graph, dims, graph_of, op_name, operands, same_shape, static
from .markers import ATTENTION
from .provenance import Piece, Provenance
from .rebuild import rebuild
from .rotations import Rotations
from .sites import AttentionSite
from .views import Angle, View, Views


@dataclass(frozen=True)
class ReadInPlace:
    """Attention and append read rows of products and norms, and turn queries and keys (RoPE) as they do.

    Before: `kvc.attention(q [1,h,n,e], k [1,g,n,e], v [1,g,n,f], site)`, each in a layout of its own.
    After: `kvc.attention(q, k, v, site, *angles)`. Operands that the site's Views have are values
        [1,n,columns] or [1,h,n,e]: those from which the graph makes q, k or v by changes of layout and a
        rotation by halves. angles: cosines and sines [1,n,..] of q, then those of k, where they are turned.
    Needs: FlattenTokens, MergeProducts before it; kernels that read so, and PageAttention behind it.
    Refuses: nothing. An operand for which that is not proved stays, and so does one that others use, too: it
        would be made all the same. Sites in other forms of the state stay, and what is made of an encoder's
        output.
    """

    sites: tuple[AttentionSite, ...]
    """All sites of the model."""

    def run(self, mod: IRModule) -> Result:
        """Facts of the result: tuple[AttentionSite, ...], all sites with their views."""
        finder = _Finder(graph_of(mod["main"]))
        found = {index: finder.views(call, self.sites[index]) for index, call in finder.attentions()}
        found = {index: seen for index, seen in found.items() if any(seen)}
        values: dict[relax.Var, relax.Expr] = {}

        def place(builder: relax.BlockBuilder, var: relax.Var, value: relax.Expr) -> relax.Expr | None:
            if op_name(value) != ATTENTION or int(value.args[4].value) not in found:
                return None
            _, *given, index = value.args
            seen = found[int(index.value)]

            def rows(source: relax.Var, columns: int | None) -> relax.Expr:
                value = replaced(source, values)
                if columns is None:
                    return value
                return builder.emit(relax.op.reshape(value, shape(1, finder.provenance.tokens, columns)))

            read = [g if s is None else rows(s.source, s.view.columns) for g, s in zip(given, seen)]
            turning = [each for s in seen if s is not None for each in zip(s.angles, s.view.angles)]
            angles = [rows(var, angle.columns) for var, angle in turning]
            return relax.op.call_pure_packed(ATTENTION, *read, index, *angles, ty_args=var.ty)

        views = {i: Views(*(None if s is None else s.view for s in seen)) for i, seen in found.items()}
        sites = tuple(replace(site, views=views.get(site.index)) for site in self.sites)
        module = rebuild(mod, mod["main"].params, place, values=values)
        return Result(module, sum(s is not None for seen in found.values() for s in seen), sites)


@dataclass(frozen=True)
class _Seen:
    """An operand that can be read where it stands."""

    source: relax.Var
    view: View
    angles: tuple[relax.Var, ...] = ()


class _Finder:
    """Finds what operands of attentions are made of."""

    def __init__(self, graph: Graph) -> None:
        self.graph, self.provenance = graph, Provenance(graph)

    def attentions(self) -> Iterator[tuple[int, relax.Call]]:
        """The attentions, with the index of their site."""
        for var in self.graph.order:
            call = self.graph.definitions[var]
            if op_name(call) == ATTENTION:
                yield int(call.args[4].value), call

    def views(self, call: relax.Call, site: AttentionSite) -> tuple[_Seen | None, ...]:
        """Of query, key and value of an attention."""
        _, query, key, value, _ = call.args
        if site.shared:
            return (None, None, None)
        given = (query, None, None) if site.mask.reach.memory else (query, key, value)
        return tuple(None if operand is None else self._seen(operand) for operand in given)

    def _seen(self, operand: relax.Expr) -> _Seen | None:
        users = self.graph.users[operand] if isinstance(operand, relax.Var) else []
        if not users or any(op_name(self.graph.definitions[user]) != ATTENTION for user in users):
            return None
        for source in self._sources(operand):
            try:
                return self._view(operand, source)
            except Unprovable:
                continue
        return None

    def _view(self, operand: relax.Var, source: relax.Var) -> _Seen:
        """How `operand` is made of a value. Raises Unprovable where that is in no way that is known."""
        pieces = self.provenance.pieces(operand, source)
        if len(pieces) == 1 and pieces[0].source == source:
            return _Seen(source, self._placed(operand, source, pieces[0], View()))
        rotation = Rotations(self.graph, self.provenance, source).read(operand, pieces)
        found = (rotation.angles.cosine, rotation.angles.sine)
        angles = [Angle(_dtype(var), self._columns(var), first) for var, first in found]
        view = View(None, 0, 0, rotation.half, *angles)
        return _Seen(source, self._placed(operand, source, rotation.key, view), tuple(v for v, _ in found))

    def _placed(self, operand: relax.Var, source: relax.Var, piece: Piece, view: View) -> View:
        """The view with the place of an operand whose elements are a piece of the source's rows."""
        if piece.stride is None:
            raise Unprovable("its elements are in another order")
        if not same_shape(dims(source), dims(operand)):
            return replace(view, columns=self._columns(source), first=piece.first, stride=piece.stride)
        if (piece.first, piece.stride) != (0, piece.width) or not view.half:
            raise Unprovable("it stands there as it is, or in another order")
        return view

    def _columns(self, value: relax.Var) -> int:
        """Elements of a token's row."""
        extents = dims(value)
        axis = next((i for i, e in enumerate(extents) if e.same_as(self.provenance.tokens)), None)
        if axis is None or any(static(e) != 1 for e in extents[:axis]):
            raise Unprovable("has no rows of tokens")
        columns = 1
        for extent in extents[axis + 1 :]:
            columns *= static(extent) or 0
        if not columns:
            raise Unprovable("has rows of unknown length")
        return columns

    def _sources(self, operand: relax.Var) -> list[relax.Var]:
        """Values of its type that all elements of an operand may be made of, the graph's first ones first."""
        behind = self._behind(operand, None)
        wanted = [v for v in self.graph.order if v in behind and _dtype(v) == _dtype(operand)]
        ends = {v for v in behind if not self._passes(v)}
        return [
            v
            for v in wanted
            if (op_name(self.graph.resolve(v)) == "astype" or not self.provenance.moves(v))
            and not (self._behind(operand, v) - {v}) & ends
        ]

    def _behind(self, operand: relax.Var, stop: relax.Var | None) -> set[relax.Var]:
        """Values that depend on tokens' ids from which an operand is made, as far as a rotation might go."""
        found: set[relax.Var] = set()
        stack = [operand]
        while stack:
            var = stack.pop()
            if var in found or var not in self.provenance.moving or var not in self.graph.definitions:
                continue
            found.add(var)
            if var != stop and self._passes(var):
                stack.extend(o for o in operands(self.graph.definitions[var]) if isinstance(o, relax.Var))
        return found

    def _passes(self, var: relax.Var) -> bool:
        """Whether a value may be a step of a rotation."""
        value = self.graph.definitions[var]
        if self.provenance.moves(var) or op_name(value) == "negative":
            return True
        if op_name(value) not in ("add", "subtract", "multiply"):
            return False
        # What has no tokens is a bias, a norm's weight or a scale.
        return all(any(extent.same_as(self.provenance.tokens) for extent in dims(o)) for o in value.args)


def _dtype(value: relax.Expr) -> str:
    """The element type of a tensor, "" for a tuple."""
    return str(value.ty.dtype.dtype) if isinstance(value.ty, relax.TensorType) else ""
