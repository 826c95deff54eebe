"""What is kept of a token in each form of the state, and the attention site that reads it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tvm import relax

from .provenance import Piece, Projection
from .rekeying import Rekeying
from .rotations import Rotation
from .sites import FLOAT_BYTES, AttentionSite, FloatName, FormName, Rekeyed, Remade, Sliced


@dataclass(frozen=True)
class Latent:
    """One value of a token that its keys and values are made of."""

    key: Projection
    value: Projection
    key_piece: Piece
    value_piece: Piece
    shared: tuple[Piece, ...]
    """A key's other elements, which are the same for all heads."""
    source: relax.Var
    """The value: a 16-bit float where that is what is projected, in whatever type."""
    memory: bool = False
    """Whether it is made of an encoder's output."""

    @property
    def form(self) -> FormName:
        if self.memory:
            return "encoder_output"
        return "mla_latent" if self.shared else "x_absorbed"

    @property
    def dtype(self) -> FloatName:
        """What is kept of it."""
        name: FloatName = str(self.source.ty.dtype.dtype)  # type: ignore[assignment]
        return name

    @property
    def width(self) -> int:
        """Elements that are kept of a token."""
        return self.key.depth + sum(piece.width for piece in self.shared)


@dataclass(frozen=True)
class Keys:
    """Keys before they are turned, and the values of the same tokens."""

    rotation: Rotation
    value: Projection
    value_piece: Piece
    fine: bool
    """Whether cosines and sines take two elements each: targets may compute them in more than 16 bits."""


@dataclass(frozen=True)
class Remaking:
    """The value that keys, which may be turned, and values are projections of, to be made again."""

    key_piece: Piece
    """Before they are turned."""
    value_piece: Piece
    rotation: Rotation | None
    source: relax.Var
    """The value: a 16-bit float where that is what is projected, in whatever type."""

    @property
    def key(self) -> Projection:
        assert self.key_piece.projection is not None
        return self.key_piece.projection

    @property
    def value(self) -> Projection:
        assert self.value_piece.projection is not None
        return self.value_piece.projection

    @property
    def dtype(self) -> FloatName:
        """What is kept of it."""
        name: FloatName = str(self.source.ty.dtype.dtype)  # type: ignore[assignment]
        return name

    @property
    def kept(self) -> Remade:
        half = 0 if self.rotation is None else self.rotation.half
        return Remade(self.key.depth, half, half > 0 and self.dtype != "float32")

    @property
    def token_bytes(self) -> int:
        return self.kept.width * FLOAT_BYTES[self.dtype]


@dataclass(frozen=True)
class Values:
    """Values that keys are made of when they are read."""

    rekeying: Rekeying
    kept: Rekeyed


def sliced_site(site: AttentionSite, keys: Keys, rest: int) -> AttentionSite:
    """The attention over keys before they are turned, and `rest` other elements."""
    sliced = Sliced(site.kv_heads, site.head_dim, rest, keys.rotation.half, keys.fine)
    return replace(
        site,
        kv_heads=1,
        head_dim=sliced.width,
        value_dim=sliced.value_dim,
        kept="k_plus_r" if rest else "k_only",
        sliced=sliced,
    )


def kept_site(site: AttentionSite, latent: Latent, owner: int | None = None) -> AttentionSite:
    """The attention over the latent value: one key for all heads. `owner`: the site that keeps it."""
    return replace(
        site,
        kv_heads=1,
        head_dim=latent.width,
        value_dim=latent.key.depth,
        kv_dtype=latent.dtype,
        kept=latent.form,
        owner=owner,
    )


def remade_site(site: AttentionSite, found: Remaking) -> AttentionSite:
    """The same attention, whose keys and values are made again."""
    return replace(site, kv_dtype=found.dtype, kept="x_gemm", remade=found.kept)


def rekeyed_site(site: AttentionSite, found: Values) -> AttentionSite:
    """The same attention, whose keys are made of its values."""
    return replace(site, kept="v_only", rekeyed=found.kept)
