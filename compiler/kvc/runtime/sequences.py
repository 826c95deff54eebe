"""A model's calls on whole sequences: their pages are taken before each call, and given back once unseen."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kvc.runtime.encoder import Inputs
from kvc.runtime.executor import Segment
from kvc.runtime.sampler import Choice, Draw
from kvc.runtime.state import Kept, State
from kvc_passes.errors import PlanningError
from kvc_passes.facts import ModelFacts
from kvc_passes.plans import Plan


class Model(Protocol):
    """What is needed of an Executor."""

    @property
    def plan(self) -> Plan: ...
    @property
    def facts(self) -> ModelFacts: ...
    def prefill(self, segments: Sequence[Segment], *, take: bool = True) -> NDArray[np.float32]: ...
    def decode(self, segments: Sequence[Segment], *, take: bool = True) -> NDArray[np.float32]: ...
    def choose(self, draws: Sequence[Draw]) -> list[Choice]: ...
    def encode(self, memory: NDArray[np.float32], pages: Sequence[int]) -> None: ...
    def run_encoder(self, inputs: Inputs) -> NDArray[np.float32]: ...
    def close(self) -> None: ...


class Sequences:
    """Sequences in the pools of a model. Arguments as for State."""

    def __init__(
        self, model: Model, *, share: bool = True, shuffle: np.random.Generator | None = None
    ) -> None:
        self.model = model
        self.state = State(model.plan, share=share, shuffle=shuffle)

    def open(self, tokens: Sequence[int], memory: NDArray[np.float32] | None = None) -> Kept:
        """A sequence of these tokens, of which nothing is computed, and its encoder output [rows, d]."""
        return self.state.open(tokens, memory=memory)

    def prefill(
        self, parts: Sequence[tuple[Kept, int]], *, ends: bool = False, take: bool = True
    ) -> NDArray[np.float32]:
        """Compute the next tokens of sequences, so many of each.

        Returns the logits after the last of them, float32 [sequences, facts.logits], a view that the next
        call overwrites; with `ends` only of sequences that are then computed to their end; `take`
        as of Executor.prefill. Raises PlanningError if there is not enough room.
        """
        self._encode(kept for kept, _ in parts)
        segments = [
            self.state.segment(kept, count, wanted=not ends or kept.length + count == len(kept.tokens))
            for kept, count in parts
        ]
        logits = self.model.prefill(segments, take=take)
        for kept, count in parts:
            self.state.advance(kept, count)
        return logits

    def decode(self, sequences: Sequence[Kept], *, take: bool = True) -> NDArray[np.float32]:
        """Compute the next token of each sequence; logits as for `prefill`."""
        self._encode(sequences)
        logits = self.model.decode([self.state.segment(kept, 1) for kept in sequences], take=take)
        for kept in sequences:
            self.state.advance(kept, 1)
        return logits

    def _encode(self, sequences: Iterable[Kept]) -> None:
        """Keep the encoder outputs that are not in their pages yet."""
        for kept in sequences:
            if kept.memory is not None and not kept.encoded:
                if not self.state.hold_memory(kept):
                    raise PlanningError(f"{len(kept.memory)} rows do not fit the pages that are free")
                self.model.encode(kept.memory, self.state.memory_pages(kept))
                kept.encoded = True

    def close(self, *sequences: Kept) -> None:
        """Give the pages of sequences back."""
        for kept in sequences:
            self.state.close(kept)
