"""What a random decoder is made of, drawn part by part; some have one deliberate fault."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

MASKS = ("causal", "window", "chunk", "first and window", "windows of heads", "alibi")
FAULTS = (
    "no mask",
    "the next key",
    "the window ahead",
    "softmax over queries",
    "mean over tokens",
    "rolled tokens",
    "running sum",
    "count of tokens",
    "row by length",
    "mask after the softmax",
    "one key hidden by half",
    "keys rolled",
    "head of the last token",
)


@dataclass(frozen=True)
class Spec:
    """What a decoder is made of."""

    seed: int
    blocks: int
    kv_heads: int
    group: int
    head_dim: int
    value_dim: int
    hidden: int
    mask: tuple[str, ...]
    window: int
    by_choice: bool
    """Masks choose between the score and a constant; else they are added."""
    distance: bool
    """Masks compare query - key with numbers; else keys with queries."""
    scale: str
    softcap: float | None
    positions: str
    norm: str
    activation: str
    parallel: bool
    tied: bool
    bias: bool
    sinks: bool
    transposed_first: bool
    fault: str | None

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group


@st.composite
def specs(draw: st.DrawFn, faults: tuple[str | None, ...]) -> Spec:
    pick: Any = lambda *values: draw(st.sampled_from(values))  # noqa: E731
    blocks, head_dim = pick(1, 2), pick(4, 6, 8, 10, 12, 16, 20)
    mask = tuple(pick(*MASKS) for _ in range(blocks))
    return Spec(
        seed=draw(st.integers(0, 2**16)),
        blocks=blocks,
        kv_heads=pick(1, 2, 3),
        group=pick(1, 2, 3),
        head_dim=head_dim,
        value_dim=pick(head_dim, head_dim, 6, 14),
        hidden=pick(12, 16, 20, 24, 36),
        mask=mask,
        window=pick(1, 2, 5, 8, 16, 17),
        by_choice=pick(False, True),
        distance=pick(False, True),
        scale=pick("scores", "divided", "query", "key", "both", "none"),
        softcap=pick(None, None, 2.0, 30.0),
        positions=pick("none", "learned", "halves", "pairs"),
        norm=pick("layer", "spelled layer", "rms", "none"),
        activation=pick("relu", "gelu", "silu", "gated", "tanh"),
        parallel=pick(False, True),
        tied=pick(False, True),
        bias=pick(False, True),
        sinks=pick(False, False, True) and "alibi" not in mask,
        transposed_first=pick(False, True),
        fault=pick(*faults),
    )
