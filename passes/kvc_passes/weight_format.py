"""How the numbers of a constant matrix are stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .sites import FloatName


@dataclass(frozen=True)
class WeightFormat:
    """How the numbers of a constant matrix are stored.

    Floats stand for themselves. Codes are unsigned: the weight is (code - zero) * scale, where `block`
    consecutive inputs of one output share a scale and a zero point.
    """

    dtype: Literal["float32", "float16", "bfloat16", "uint4", "uint8"] = "float32"
    block: int = 0
    """Inputs that share a scale, for codes; the last block of a row may be shorter. 0 for floats."""
    scales: FloatName = "float32"
    zeros: bool = False
    """Whether every block has a zero point of its own; else it is 8 (uint4) or 128 (uint8)."""

    @property
    def coded(self) -> bool:
        return self.dtype in ("uint4", "uint8")


FLOAT32 = WeightFormat()


FLOAT32 = WeightFormat()
