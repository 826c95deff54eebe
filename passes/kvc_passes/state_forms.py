"""Which forms an attention's state may be kept in, proved from what its keys and values are made of."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from typing import Final

import numpy as np
from tvm import relax

from .conditions import Unprovable
from .facts import StateForm
from .graph import Graph, op_name
from .kept_sites import Keys, Latent, Remaking, Values, sliced_site
from .markers import ATTENTION
from .nodes import NodeNames
from .provenance import Piece, Projection, Provenance
from .rekeying import rekeying
from .rotations import Rotation, Rotations
from .sites import CODES, FLOAT_BYTES, AttentionSite, FloatName, FormName, Rekeyed
from .weights import weight_of

ABSORBED: Final[tuple[FormName, ...]] = ("x_absorbed", "mla_latent", "encoder_output")
KEYS: Final[tuple[FormName, ...]] = ("k_only", "k_plus_r")
LAST: Final[FormName] = "x_gemm"
"""What is chosen only where no other form fits: a decode step makes all keys and values again."""
VALUES: Final[FormName] = "v_only"
EXACT: Final[tuple[FormName, ...]] = (*ABSORBED, VALUES)
"""Forms whose legality does not depend on the rounding of weights, and that are no last resort."""
OF_TOKENS: Final[tuple[FormName, ...]] = ("x_absorbed", "mla_latent", VALUES, *KEYS, LAST)
"""Forms of what attention over the model's own tokens keeps, other than K and V."""
UNJUDGED: Final = "the rounding of its weights was not measured"
UNASKED: Final = "it changes results beyond rounding, and was not allowed"


class Illegal(Exception):
    """Why a form is not legal, in words."""


class Forms:
    """The forms of the attentions of a flattened graph."""

    def __init__(
        self,
        graph: Graph,
        names: NodeNames = NodeNames(),  # noqa: B008  it is frozen
        tables: Mapping[str, np.ndarray] = {},
        allowed: Container[FormName] = (),
    ) -> None:
        """tables: numbers of parameters, which may be frequencies of rotations. allowed: forms of CODES."""
        self.graph, self.names, self.tables, self.allowed = graph, names, tables, allowed
        self.provenance = Provenance(graph)
        self._owners: dict[relax.Var, int] = {}
        self._rotations: dict[relax.Expr, Rotation | str] = {}

    def markers(self) -> dict[int, relax.Call]:
        """The attentions by the index of their site."""
        calls = [self.graph.definitions[v] for v in self.graph.order]
        return {int(c.args[4].value): c for c in calls if op_name(c) == ATTENTION}

    def of(self, marker: relax.Call, site: AttentionSite) -> tuple[StateForm, ...]:
        """All forms of a site, the legal ones first as they are to be preferred."""
        plain = StateForm("paged_kv", site.token_bytes(), f"K and V of {site.kv_heads} heads")
        codes = tuple(self._codes_form(site, name) for name in CODES)
        if site.mask.reach.memory:
            others = _illegal(OF_TOKENS, "it reads an encoder's output")
            return plain, self._memory_form(marker, site), *codes, *others
        others = _illegal(("encoder_output",), "it reads the model's own tokens")
        latents, keys = self._latent_forms(marker, site), self._key_forms(marker, site)
        values, last = self._values_form(marker, site), self._remade_form(marker, site)
        return plain, *latents, values, *keys, last, *codes, *others

    def _codes_form(self, site: AttentionSite, name: FormName) -> StateForm:
        size = replace(site, stored=CODES[name]).token_bytes()
        if name == "kv-int4" and (site.head_dim % 2 or site.value_dim % 2):
            odd = f"heads have {site.head_dim} and {site.value_dim} elements, and two codes share a byte"
            return StateForm(name, 0, odd, False)
        if size >= site.token_bytes():
            large = f"codes and scales, {size} bytes, are no smaller than keys and values"
            return StateForm(name, size, large, False)
        if name not in self.allowed:
            return StateForm(name, size, f"--allow {name} would permit it: {UNASKED}", False)
        return StateForm(name, size, "K and V in codes, as it is allowed")

    def _memory_form(self, marker: relax.Call, site: AttentionSite) -> StateForm:
        try:
            latent = self.latent(marker, site)
        except Illegal as reason:
            return StateForm("encoder_output", 0, str(reason), False)
        owner = self._owners.setdefault(latent.source, site.index)
        if owner != site.index:
            return StateForm("encoder_output", 0, f"layer {owner} keeps it")
        kept = f"{latent.width} elements that K and V of all layers are projections of, once for those layers"
        return StateForm("encoder_output", latent.width * FLOAT_BYTES[latent.dtype], kept)

    def _key_forms(self, marker: relax.Call, site: AttentionSite) -> tuple[StateForm, ...]:
        """Forms that the rounding of the real weights decides about."""
        try:
            kept = sliced_site(site, self.keys(marker, site), 0)
        except Illegal as reason:
            return _illegal(KEYS, str(reason))
        detail = f"{kept.head_dim} elements: K before it is turned, its cosines and sines"
        return tuple(StateForm(name, kept.token_bytes(), f"{detail}; {UNJUDGED}", False) for name in KEYS)

    def _latent_forms(self, marker: relax.Call, site: AttentionSite) -> tuple[StateForm, ...]:
        try:
            latent = self.latent(marker, site)
        except Illegal as reason:
            return _illegal(("x_absorbed", "mla_latent"), str(reason))
        kept = f"{latent.width} elements that K and V are projections of"
        other: FormName = "x_absorbed" if latent.shared else "mla_latent"
        why = "keys have elements that are no projection" if latent.shared else "keys are projections alone"
        found = StateForm(latent.form, latent.width * FLOAT_BYTES[latent.dtype], kept)
        return found, StateForm(other, 0, why, False)

    def _values_form(self, marker: relax.Call, site: AttentionSite) -> StateForm:
        try:
            kept = self.values(marker, site).kept
        except Illegal as reason:
            return StateForm(VALUES, 0, str(reason), False)
        angles = ", its cosines and sines" if kept.pairs else ""
        detail = f"{kept.width} elements: V{angles}; K is made of them"
        return StateForm(VALUES, kept.width * FLOAT_BYTES[site.kv_dtype], detail)

    def values(self, marker: relax.Call, site: AttentionSite) -> Values:
        """Values that keys can be made of. Raises Illegal with the reason."""
        _, key, value, _ = marker.args[1:]
        if site.head_dim != site.value_dim:
            raise Illegal(f"K has {site.head_dim} elements a head, V {site.value_dim}")
        try:
            found = rekeying(self.provenance, key, value, self.tables)
        except Unprovable as reason:
            raise Illegal(f"K {reason}") from None
        fine = found.pairs > 0 and site.kv_dtype != "float32"
        kept = Rekeyed(site.kv_heads, site.head_dim, found.half, found.pairs, fine, found.scaled)
        self._check_smaller(kept.width, site.kv_dtype, site)
        return Values(found, kept)

    def keys(self, marker: relax.Call, site: AttentionSite) -> Keys:
        """Keys that are turned, and from which values can be made again. Raises Illegal with the reason."""
        key, key_pieces, value_piece, v = self._parts(marker, site)
        kept = site.kv_heads * site.head_dim
        if kept < v.depth:  # before the rotation is read, which takes long
            raise Illegal(f"K has {kept} elements, fewer than the {v.depth} that V is a projection of")
        rotation = self._rotation(key, key_pieces)
        k = rotation.projection
        self._check_weights(k, v)
        if site.sinks is not None and (k.bias is not None or v.bias is not None):
            raise Illegal("K or V has a bias, and with a learned score the weights do not sum to 1")
        for bias in (k.bias, v.bias):
            if bias is not None and bias not in self.graph.function.params:
                raise Illegal("a bias of K or V is no parameter of the file")
        return Keys(rotation, v, value_piece, fine=site.kv_dtype != "float32")

    def _parts(
        self, marker: relax.Call, site: AttentionSite
    ) -> tuple[relax.Expr, tuple[Piece, ...], Piece, Projection]:
        """K and its pieces, and V, which has to be one projection. Raises Illegal with the reason."""
        _, key, value, _ = marker.args[1:]
        key_pieces, value_pieces = self._pieces(key, "K"), self._pieces(value, "V")
        v = value_pieces[0].projection
        if len(value_pieces) != 1 or v is None:
            raise Illegal("V is not one projection of one value")
        return key, key_pieces, value_pieces[0], v

    def _rotation(self, key: relax.Expr, pieces: tuple[Piece, ...]) -> Rotation:
        """How keys are turned, read once. Raises Illegal with the reason."""
        if key not in self._rotations:
            try:
                self._rotations[key] = Rotations(self.graph, self.provenance).read(key, pieces)
            except Unprovable as reason:
                self._rotations[key] = f"K {reason}"
        found = self._rotations[key]
        if isinstance(found, str):
            raise Illegal(found)
        return found

    def _remade_form(self, marker: relax.Call, site: AttentionSite) -> StateForm:
        try:
            found = self.remaking(marker, site)
        except Illegal as reason:
            return StateForm(LAST, 0, str(reason), False)
        angles = ", its cosines and sines" if found.rotation is not None else ""
        detail = f"{found.kept.width} elements: what K and V are projections of{angles}; they are made again"
        return StateForm(LAST, found.token_bytes, detail)

    def remaking(self, marker: relax.Call, site: AttentionSite) -> Remaking:
        """What keys and values can be made from again. Raises Illegal with the reason."""
        key, key_pieces, value_piece, v = self._parts(marker, site)
        source, piece, rotation = self._narrowest(v.x), key_pieces[0], None
        found = Remaking(value_piece, value_piece, None, source)
        self._check_smaller(
            found.kept.width, found.dtype, site
        )  # before the rotation is read, which takes long
        if len(key_pieces) != 1 or piece.projection is None:
            rotation = self._rotation(key, key_pieces)
            piece = rotation.key
        found = replace(found, key_piece=piece, rotation=rotation)
        self._check_weights(found.key, v)
        self._check_smaller(found.kept.width, found.dtype, site)
        return found

    def _check_smaller(self, width: int, dtype: FloatName, site: AttentionSite) -> None:
        size = width * FLOAT_BYTES[dtype]
        if size >= site.token_bytes():
            what = f"{width} elements of {dtype}, {size} bytes"
            raise Illegal(f"{what}, are no smaller than keys and values, {site.token_bytes()} bytes")

    def _check_weights(self, k: Projection, v: Projection) -> None:
        if k.x != v.x:
            raise Illegal("K and V are projections of two values")
        for name, projection in (("K", k), ("V", v)):
            weight = weight_of(self.graph, projection.weight)
            if weight is None or len(weight.sources) != 1:
                raise Illegal(f"the weight of {name} is no parameter of the file")
            if weight.format.coded:
                raise Illegal(f"the weight of {name} is stored in codes, whose blocks run the other way")

    def latent(self, marker: relax.Call, site: AttentionSite) -> Latent:
        """The value that keys and values are projections of. Raises Illegal with the reason."""
        _, key, value, _ = marker.args[1:]
        key_pieces, value_pieces = self._pieces(key, "K"), self._pieces(value, "V")
        of_key = [p for p in key_pieces if p.projection is not None]
        shared = tuple(p for p in key_pieces if p.projection is None)
        for piece in shared:
            if not piece.shared:
                raise Illegal(
                    f"K is no projection: {self.names.describe(piece.source)} comes between"
                    + (" (its position turns it)" if site.rope else "")
                )
        if len(of_key) != 1 or len(value_pieces) != 1 or value_pieces[0].projection is None:
            raise Illegal(f"{'V' if len(of_key) == 1 else 'K'} is not one projection of one value")
        k, v = of_key[0].projection, value_pieces[0].projection
        assert k is not None
        self._check_weights(k, v)
        if k.bias is not None and (site.softcap is not None or site.sinks is not None):
            raise Illegal("K has a bias, which a softcap or a learned score does not cancel")
        if v.bias is not None and site.sinks is not None:
            raise Illegal("V has a bias, and with a learned score the weights do not sum to 1")
        memory = site.mask.reach.memory
        if memory and shared:
            raise Illegal("K has elements that are no projection")
        return Latent(k, v, of_key[0], value_pieces[0], shared, self._narrowest(k.x), memory)

    def _pieces(self, operand: relax.Expr, name: str) -> tuple[Piece, ...]:
        try:
            return self.provenance.pieces(operand)
        except Unprovable as reason:
            raise Illegal(f"{name} {reason}") from None

    def _narrowest(self, x: relax.Var) -> relax.Var:
        """The 16-bit float that was widened to `x`, if it was."""
        call = self.graph.resolve(x)
        if op_name(call) == "astype" and isinstance(call.args[0], relax.Var):
            inner = call.args[0]
            if FLOAT_BYTES.get(str(inner.ty.dtype.dtype), 8) < FLOAT_BYTES[str(x.ty.dtype.dtype)]:
                return self.provenance.origin(inner)
        return x


def _illegal(names: Sequence[FormName], reason: str) -> tuple[StateForm, ...]:
    return tuple(StateForm(name, 0, reason, False) for name in names)
