"""Runs a compiled model and ONNX Runtime on the same tokens, and says how far the logits are apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from tools.onnx_graph import Graph, Logits

from kvc.artifact import Artifact
from kvc.runtime.executor import Executor
from kvc.runtime.sequences import Sequences

PROMPTS: Final = (1, 17, 61)
CHUNKS: Final = (1, 7, 13, 3, 17, 14)
RAGGED: Final = (37, 3, 16, 29)
DECODED: Final = 4


@dataclass(frozen=True)
class Compared:
    """One kind of call."""

    name: str
    error: float
    """Largest absolute difference of a logit; NaN if there was one."""


class Comparison:
    """An artifact and the graphs that it must agree with."""

    def __init__(self, artifact: Artifact, seed: int = 0) -> None:
        self.executor = Executor(artifact)
        self.random = np.random.default_rng(seed)
        self.sequences = Sequences(self.executor, share=False, shuffle=self.random)

    def close(self) -> None:
        self.executor.close()

    def against(self, graph: Graph, padded: bool) -> Iterator[Compared]:
        """Prompts, chunks, decoding and ragged batches; `padded`: also left-padded batches."""
        for length in PROMPTS:
            tokens = self._tokens(length)
            kept = self.sequences.open(tokens)
            got = self.sequences.prefill([(kept, length)])
            self.sequences.close(kept)
            yield Compared(f"prompt of {length}", _error([(got[0], graph.logits(tokens)[-1])]))
        yield self._chunks(graph)
        sequences = [self._tokens(n + DECODED) for n in RAGGED]
        rows = self._ragged(sequences)
        alone = [graph.logits(tokens) for tokens in sequences]
        expected = [logits[-DECODED - 1 :] for logits in alone]
        yield Compared("ragged batch", _error(_pairs(rows, expected)))
        if padded:
            rows = self._ragged(sequences)
            expected = [np.stack(x) for x in graph.left_padded(sequences, DECODED)]
            yield Compared("left-padded batch", _error(_pairs(rows, expected)))

    def _tokens(self, length: int) -> list[int]:
        return [int(x) for x in self.random.integers(0, self.executor.facts.vocab, length)]

    def _chunks(self, graph: Graph) -> Compared:
        """A prompt in pieces, then single tokens."""
        tokens = self._tokens(sum(CHUNKS) + DECODED)
        expected = graph.logits(tokens)
        kept, pairs = self.sequences.open(tokens), []
        for count in CHUNKS:
            got = self.sequences.prefill([(kept, count)])
            pairs.append((got[0].copy(), expected[kept.length - 1]))
        while kept.length < len(tokens):
            got = self.sequences.decode([kept])
            pairs.append((got[0].copy(), expected[kept.length - 1]))
        self.sequences.close(kept)
        return Compared("chunks, then decode", _error(pairs))

    def _ragged(self, sequences: Sequence[Sequence[int]]) -> list[list[Logits]]:
        """Prompts of unlike lengths in one call, then decoding together."""
        lengths = [len(tokens) - DECODED for tokens in sequences]
        kept = [self.sequences.open(tokens) for tokens in sequences]
        halves = [max(1, n // 2) for n in lengths]
        self.sequences.prefill(list(zip(kept, halves)))
        rest = [(each, n - h) for each, h, n in zip(kept, halves, lengths) if n > h]
        rows = [[row.copy()] for row in self.sequences.prefill(rest)]
        for _ in range(DECODED):
            for row, new in zip(rows, self.sequences.decode(kept)):
                row.append(new.copy())
        self.sequences.close(*kept)
        return rows


def _pairs(rows: Sequence[Sequence[Logits]], expected: Sequence[Any]) -> list[tuple[Logits, Logits]]:
    return [(got, right) for a, b in zip(rows, expected) for got, right in zip(a, b)]


def _error(pairs: Sequence[tuple[Logits, Logits]]) -> float:
    return float(np.max([np.abs(got.astype(np.float64) - right).max() for got, right in pairs]))
