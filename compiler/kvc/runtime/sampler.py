"""Choosing the next token from logits, with numpy alone and few copies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvc_passes.errors import Error, InputError


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are chosen and when it ends. Raises InputError on impossible values."""

    temperature: float = 0.0
    """0 always takes the most likely token (greedy)."""
    top_k: int = 0
    """Choose among this many most likely tokens; 0: among all."""
    top_p: float = 1.0
    """Choose among the fewest most likely tokens whose probabilities reach this sum."""
    seed: int | None = None
    """The same seed gives the same tokens, whatever other requests run. None: other tokens each time."""
    max_new_tokens: int = 128
    stop_tokens: tuple[int, ...] = ()
    """Token ids that end the request, besides the model's own end-of-text tokens."""
    stop: tuple[str, ...] = ()
    """Texts that end the request; they are not part of its text."""
    ignore_eos: bool = False
    """Go on after the model's end-of-text tokens (for measurements)."""

    def __post_init__(self) -> None:
        # `not (x >= y)` also refuses NaN
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"temperature is {self.temperature}: give 0 (greedy) or a positive number")
        if self.top_k < 0:
            raise InputError(f"top_k is {self.top_k}: give 0 (all tokens) or a positive number")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}: give a number above 0 and at most 1")
        if self.seed is not None and self.seed < 0:
            raise InputError(f"seed is {self.seed}: give 0 or a positive number")
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {self.max_new_tokens}: give at least 1")
        if isinstance(self.stop, str) or not all(self.stop):
            raise InputError("stop must be a sequence of texts, none of them empty")


def scratch_bytes(vocab: int) -> int:
    """Most bytes that `sample` allocates for `vocab` logits: order or masks, and the sums in float64."""
    return 24 * vocab + 4096


def sample(logits: NDArray[np.float32], params: SamplingParams, rng: np.random.Generator) -> int:
    """The next token's id from float32 logits of shape [vocab], which are overwritten unless greedy.

    Among equal logits the lowest id wins. Raises Error if the largest logit is not a finite number.
    """
    best = int(np.argmax(logits))  # the first NaN, if there is one
    peak = logits[best]
    if not np.isfinite(peak):
        raise Error(
            f"the model returned {peak} as the largest logit: its weights or its computation overflow"
        )
    if params.temperature == 0 or params.top_k == 1:
        return best
    logits -= peak
    logits /= np.float32(max(params.temperature, 1e-6))  # below this it is greedy anyway
    candidates: NDArray[Any] | None = None
    if 0 < params.top_k < len(logits):
        candidates = _largest(logits, params.top_k)
        logits = logits[candidates]
    np.exp(logits, out=logits)
    if params.top_p < 1:
        order = np.argsort(-logits, kind="stable")
        sums = np.cumsum(logits[order], dtype=np.float64)
        count = int(np.searchsorted(sums, params.top_p * sums[-1])) + 1
        order = order[:count]
        candidates = order if candidates is None else candidates[order]
        sums = sums[:count]
    else:
        sums = np.cumsum(logits, dtype=np.float64)
    choice = min(int(np.searchsorted(sums, rng.random() * sums[-1], side="right")), len(sums) - 1)
    return choice if candidates is None else int(candidates[choice])


def _largest(logits: NDArray[np.float32], count: int) -> NDArray[np.intp]:
    """Ids of the `count` largest logits, ascending; of equal ones the lowest ids."""
    threshold = np.partition(logits, len(logits) - count)[len(logits) - count]
    above = np.flatnonzero(logits > threshold)
    equal = np.flatnonzero(logits == threshold)[: count - len(above)]
    return np.sort(np.concatenate([above, equal]))
