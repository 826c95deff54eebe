"""What the scheduler keeps of a request, and tells of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from kvc.runtime.encoder import Inputs
from kvc.runtime.sampler import SamplingParams
from kvc.runtime.state import Kept

FinishReason = Literal["stop", "length", "context", "cancelled"]
"""A stop token or text; max_new_tokens; the longest context; cancel()."""


@dataclass(eq=False)
class Request:
    """One request and its state. `tokens` is the prompt followed by the tokens chosen so far."""

    id: int
    tokens: list[int]
    prompt_length: int
    params: SamplingParams
    stop_tokens: frozenset[int]
    stopped: Callable[[int], bool]
    """Called with each chosen token; True ends the request (a stop text was completed)."""
    rng: np.random.Generator
    memory: NDArray[Any] | None = None
    """The encoder's output [rows, d] as it was given; float32 once it has had its turn."""
    inputs: Inputs | None = None
    """The encoder's inputs, until that was made."""
    kept: Kept | None = None
    """Its pages, while it runs."""
    names: list[bytes] = field(default_factory=list)
    """Of its full pages; see Kept."""
    finish_reason: FinishReason | None = None
    cancelled: bool = False
    arrived: float = field(default_factory=time.perf_counter)
    started: float | None = None
    first_token: float | None = None
    finished: float | None = None

    @property
    def generated(self) -> list[int]:
        """The tokens chosen so far."""
        return self.tokens[self.prompt_length :]

    @property
    def computed(self) -> int:
        """Tokens whose K and V are in the pages."""
        return self.kept.length if self.kept else 0

    @property
    def longest(self) -> int:
        """Tokens that it may have when it ends."""
        return self.prompt_length + self.params.max_new_tokens

    @property
    def decodes(self) -> bool:
        """Whether only its newest token is not computed."""
        return self.computed == len(self.tokens) - 1 >= self.prompt_length


@dataclass(frozen=True)
class Update:
    """What a step did to one request: it chose `token`, it ended, or both."""

    request: Request
    token: int | None
    finish_reason: FinishReason | None


@dataclass
class Counters:
    """Running totals over all calls."""

    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    preemptions: int = 0
    shared_tokens: int = 0
    """Tokens that were not computed since other requests had computed them."""
