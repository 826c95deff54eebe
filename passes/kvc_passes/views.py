"""How kernels read queries, keys and values from what a graph has of them, and turn them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Angle:
    """Cosines or sines in a tensor [1, n, columns] of `dtype`: a token's in its row, from `first` on."""

    dtype: str
    columns: int
    first: int


@dataclass(frozen=True)
class View:
    """How an operand [1, heads, n, elements] of an attention is read from a tensor.

    The tensor is [1, n, columns], and element d of head h of a token is element first + h * stride + d of its
    row; without columns it is the operand's own shape. If `half`, elements are turned by whoever reads them,
    as sites.Sliced says, with the cosines and sines of the token.
    """

    columns: int | None = None
    first: int = 0
    stride: int = 0
    half: int = 0
    cosine: Angle | None = None
    sine: Angle | None = None

    @property
    def angles(self) -> tuple[Angle, ...]:
        """The cosines and sines, if there are."""
        return tuple(angle for angle in (self.cosine, self.sine) if angle is not None)


@dataclass(frozen=True)
class Views:
    """How an attention reads what it is given; None: as a tensor [1, heads, n, elements]."""

    query: View | None = None
    key: View | None = None
    value: View | None = None
