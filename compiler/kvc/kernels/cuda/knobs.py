"""What of a CUDA kernel is a matter of speed alone: parameters that tuning chooses, for an architecture.

0 means: what the tables of products.py and attention.py say. Results differ by rounding at most. The fields
stand in the order of those tables' rows.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Protocol

from kvc_passes.weight_format import WeightFormat

from ..knobs import AttentionTimes

if TYPE_CHECKING:
    from ..attention import AttentionShape


@dataclass(frozen=True)
class Product:
    """y = x w^T (+ bias) (+ residual), x and y of `dtype`, y of float32 if `flat`: logits.

    Attributes:
        most: rows of x that a variant of it is meant for at most, 0 for any number.
    """

    columns: int
    depth: int
    format: WeightFormat
    bias: bool
    residual: bool
    flat: bool
    dtype: str
    most: int


BY_THREADS, BY_ENGINE = 1, 2
"""Asynchronous copies of pointers, or boxes by the copy engine of sm_90 (kvc.kernels.cuda.boxes)."""


@dataclass(frozen=True)
class ProductKnobs:
    """Attributes:
    rows, columns: of y that a program computes.
    depth: inputs of a step.
    warps: of a program.
    stages: steps whose operands are under way at once.
    copy: how operands get into shared memory, BY_THREADS or BY_ENGINE, where that can copy them.
    """

    rows: int = 0
    columns: int = 0
    depth: int = 0
    warps: int = 0
    stages: int = 0
    copy: int = 0


@dataclass(frozen=True)
class PrefillKnobs:
    """Attributes:
    rows: most rows of a block, tokens times heads of a group.
    keys: of a block.
    warps, stages: as of products.
    tile: query tokens of a program's tile; one for all layers and architectures of an artifact.
    copy: as of products, of the blocks that every row sees whole.
    """

    rows: int = 0
    keys: int = 0
    warps: int = 0
    stages: int = 0
    tile: int = 0
    copy: int = 0


@dataclass(frozen=True)
class DecodeKnobs:
    """Attributes:
    keys: of a block.
    warps, stages: as of products.
    splits: shares of the keys of a sequence that is alone; the same for all architectures of an artifact.
    """

    keys: int = 0
    warps: int = 0
    stages: int = 0
    splits: int = 0


PRODUCT, PREFILL, DECODE = ProductKnobs(), PrefillKnobs(), DecodeKnobs()
"""As the tables say."""


class Knobs(Protocol):
    """Where kernels get their parameters from. Architectures are numbers such as 90."""

    def product(self, arch: int, product: Product) -> ProductKnobs: ...

    def prefill(self, arch: int, shape: AttentionShape, tile: int) -> PrefillKnobs:
        """Of attention for which tiles of `tile` tokens are usual."""

    def decode(self, arch: int, shape: AttentionShape, splits: int) -> DecodeKnobs:
        """Of attention for which `splits` shares are usual."""

    def attention_times(self, arch: int, shape: AttentionShape) -> AttentionTimes:
        """What was measured of it: (query tokens, keys of a sequence, seconds), of prefill and of decode."""


class Defaults:
    """Parameters as the tables say."""

    def product(self, arch: int, product: Product) -> ProductKnobs:
        return PRODUCT

    def prefill(self, arch: int, shape: AttentionShape, tile: int) -> PrefillKnobs:
        return PREFILL

    def decode(self, arch: int, shape: AttentionShape, splits: int) -> DecodeKnobs:
        return DECODE

    def attention_times(self, arch: int, shape: AttentionShape) -> AttentionTimes:
        return (), ()


DEFAULTS = Defaults()


def chosen(knobs: ProductKnobs | PrefillKnobs | DecodeKnobs, row: tuple[int, ...]) -> tuple[int, ...]:
    """A row of a table with what is tuned in place of its numbers."""
    return tuple(own or usual for own, usual in zip(astuple(knobs), row))
