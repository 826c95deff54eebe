"""What of a kernel is a matter of speed alone: parameters that tuning chooses.

0 means: what the template derives from the shape and the CPU. Results differ by rounding at most, where sums
are taken in another order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from kvc_passes.weight_format import WeightFormat

if TYPE_CHECKING:
    from .attention import AttentionShape


@dataclass(frozen=True)
class FewRows:
    """A product with at most as many rows as a register tile has: every weight is read once.

    Attributes:
        accumulators: vectors that are summed up independently, so that no sum waits for the one before.
        ahead: inputs that weights are prefetched ahead of their use, 0 for no prefetch.
    """

    accumulators: int = 8
    ahead: int = 0


@dataclass(frozen=True)
class ManyRows:
    """A product with more rows.

    Attributes:
        rows: rows of a register tile.
        depth: most inputs between two visits of a tile of outputs.
        row_bytes: bytes of x that stay in cache while the weights pass.
        groups: parts that the weights are split into among threads; the rows are split among the rest.
    """

    rows: int = 0
    depth: int = 1024
    row_bytes: int = 448 * 1024
    groups: int = 0


@dataclass(frozen=True)
class ProductKnobs:
    few: FewRows = FewRows()
    many: ManyRows = ManyRows()


PRODUCT = ProductKnobs()


@dataclass(frozen=True)
class PrefillKnobs:
    """Attention of many tokens a sequence.

    Attributes:
        tile: query tokens of a task.
        keys: keys of a block, whose scores are kept between the two products.
    """

    tile: int = 0
    keys: int = 256


@dataclass(frozen=True)
class DecodeKnobs:
    """Attention of one token a sequence.

    Attributes:
        splits: shares that a sequence's keys are split into.
        keys: keys of a block, whose scores are kept between the two products.
        ahead: pages that are fetched ahead of their use, 0 for none.
    """

    splits: int = 0
    keys: int = 128
    ahead: int = 0


DECODE = DecodeKnobs()


AttentionTimes = tuple[Sequence[tuple[int, int, float]], Sequence[tuple[int, int, float]]]


class Knobs(Protocol):
    """Where kernels get their parameters from."""

    def product(self, columns: int, depth: int, format: WeightFormat) -> ProductKnobs: ...

    def prefill(self, shape: AttentionShape) -> PrefillKnobs: ...

    def decode(self, shape: AttentionShape) -> DecodeKnobs: ...

    def attention_times(self, shape: AttentionShape) -> AttentionTimes:
        """What was measured of it: (query tokens, keys of a sequence, seconds), of prefill and of decode."""


class Defaults:
    """Parameters as the templates derive them."""

    def product(self, columns: int, depth: int, format: WeightFormat) -> ProductKnobs:
        return PRODUCT

    def prefill(self, shape: AttentionShape) -> PrefillKnobs:
        return PrefillKnobs()

    def decode(self, shape: AttentionShape) -> DecodeKnobs:
        return DECODE

    def attention_times(self, shape: AttentionShape) -> AttentionTimes:
        return (), ()


DEFAULTS = Defaults()
