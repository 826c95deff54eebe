"""Choosing the next token from logits, with numpy alone and few copies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

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

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken."""
        return self.temperature == 0 or self.top_k == 1


class Draw(NamedTuple):
    """How the next token of a row of logits is chosen."""

    params: SamplingParams
    rng: np.random.Generator


Choice = int | Error
"""A token's id, or why there is none."""


def scratch_bytes(vocab: int) -> int:
    """Most bytes that `sample` allocates for `vocab` logits: float64 sums and masks."""
    return 10 * vocab + 4096


def choose(logits: NDArray[np.float32], draws: Sequence[Draw]) -> list[Choice]:
    """The next token of each row of float32 logits [rows, vocab], as `sample` takes it."""
    found: list[Choice] = []
    for row, draw in zip(logits, draws, strict=True):
        try:
            found.append(sample(row, *draw))
        except Error as error:
            found.append(error)
    return found


def sample(logits: NDArray[np.float32], params: SamplingParams, rng: np.random.Generator) -> int:
    """The next token's id from float32 logits of shape [vocab], which are overwritten unless greedy.

    Among equal logits the lowest id wins. Raises Error if the largest logit is not a finite number.
    """
    best = int(np.argmax(logits))  # the first NaN, if there is one
    peak = logits[best]
    if not np.isfinite(peak):
        raise not_finite(peak)
    if params.greedy:
        return best
    weights = logits
    with np.errstate(over="ignore", under="ignore"):
        weights -= peak
        weights /= temperature_of(params)
        np.exp(weights, out=weights)
    if 0 < params.top_k < len(weights):
        _keep_largest(weights, params.top_k)
    if params.top_p < 1:
        _keep_largest(weights, _nucleus(weights, params.top_p))
    sums = weights.astype(np.float64)
    np.cumsum(sums, out=sums)
    choice = int(np.searchsorted(sums, rng.random() * sums[-1], side="right"))
    # Rounding can reach the sum itself: then it is the last token that has a weight.
    return choice if choice < len(sums) else int(np.searchsorted(sums, sums[-1]))


def temperature_of(params: SamplingParams) -> np.float32:
    """What logits are divided by; below 1e-6 it is greedy anyway, from 1e38 on uniform."""
    return np.float32(min(max(params.temperature, 1e-6), 1e38))


def not_finite(peak: object) -> Error:
    """What is said of a row whose largest logit is no finite number."""
    return Error(f"the model returned {peak} as the largest logit: its weights or its computation overflow")


def _keep_largest(weights: NDArray[np.float32], count: int) -> None:
    """Set all but the `count` largest weights to 0; of equal ones the lowest ids stay."""
    threshold = np.partition(weights, len(weights) - count)[len(weights) - count]
    more = count - int(np.count_nonzero(weights > threshold))
    weights[np.flatnonzero(weights == threshold)[more:]] = 0
    weights[weights < threshold] = 0


def _nucleus(weights: NDArray[np.float32], top_p: float) -> int:
    """How many of the largest weights it takes to reach the part `top_p` of their sum."""
    sums = weights.astype(np.float64)
    sums.sort()
    np.cumsum(sums, out=sums)
    dropped = int(np.searchsorted(sums, (1 - top_p) * sums[-1], side="right"))
    return max(1, len(sums) - dropped)  # 1 - 1e-17 is 1
