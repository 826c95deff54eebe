"""Choosing tokens where the logits are: what a GPU is told of each row, and what comes back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from kvc.runtime.host_memory import Shapes
from kvc.runtime.sampler import Choice, Draw, not_finite, temperature_of

BLOCK: Final = 4096
"""Logits of which one program finds the largest."""
WORDS: Final = 4
"""64-bit words that say how a row is drawn: the temperature as bits of a float32, 0 for the largest logit;
how many tokens top-k leaves, 0 for all; what top-p drops, and the random number, both as parts of 2^64."""
CHOSEN: Final = 2
"""32-bit words that come back: the token, and the bits of the largest logit."""


def blocks_of(vocab: int) -> int:
    """Blocks of a row."""
    return -(-vocab // BLOCK)


def choice_shapes(rows: int, vocab: int) -> Shapes:
    """Dtype and shape of what the function `choose` takes beside logits, for at most `rows` rows."""
    return {
        "parts": ("int64", (rows, blocks_of(vocab))),
        "draws": ("int64", (rows, WORDS)),
        "chosen": ("int32", (rows, CHOSEN)),
    }


def write_draws(words: NDArray[np.int64], draws: Sequence[Draw]) -> None:
    """Say for each row of `words` [rows, WORDS] how it is drawn; takes a number from the generators of those
    that are not greedy, as `sampler.sample` does."""
    unsigned = words.view(np.uint64)
    for row, (params, rng) in zip(unsigned, draws, strict=True):
        if params.greedy:
            row[:] = 0
            continue
        row[0] = temperature_of(params).view(np.uint32)
        row[1] = min(params.top_k, np.iinfo(np.int32).max)
        row[2] = min(int((1 - params.top_p) * 2.0**64), 2**64 - 1)
        row[3] = int(rng.random() * 2.0**64)  # of which 53 bits are random


def read_choices(chosen: NDArray[np.int32]) -> list[Choice]:
    """The tokens in `chosen` [rows, CHOSEN]; an error for rows whose largest logit is no finite number."""
    tokens, peaks = chosen[:, 0].tolist(), chosen[:, 1].copy().view(np.float32)
    finite: Any = np.isfinite(peaks)
    return [token if good else not_finite(peak) for token, good, peak in zip(tokens, finite, peaks)]
