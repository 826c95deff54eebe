"""A model without a compiler: its next token is a function of the history it finds in the pages."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kvc.runtime.executor import Segment
from kvc.runtime.sampler import SamplingParams, sample
from kvc_passes.facts import AttentionSite, Bytes, MaskFact, ModelFacts, Plan, Workload


def _facts(vocab: int = 23, context: int | None = None, **changes: Any) -> ModelFacts:
    site = AttentionSite(0, "n", 2, 1, 4, 4, 0.5, None, MaskFact("causal", None, "test"), None)
    values: dict[str, Any] = {"name": "m", "vocab": vocab, "logits": vocab + 2, "context": context}
    values |= {"sites": (site,), "positions": ("p",), "parameter_bytes": {}, "nodes": 1}
    return ModelFacts(**values | changes)


def _plan(pages: int = 16, page_size: int = 4, **changes: Any) -> Plan:
    values: dict[str, Any] = {"budget": 1 << 20, "workload": (Workload(2, 32),), "target": {"kind": "llvm"}}
    values |= {"page_size": page_size, "page_bytes": 256, "pages": pages, "chunk": 8, "tile": 4}
    values |= {"max_batch": 3, "max_context": 32, "bytes": Bytes(1, 2, 3, 4, 5, 6)}
    return Plan(**values | changes)


class FakeModel:
    """Keeps tokens where an executor keeps K and V, and checks what it is given against the plan."""

    def __init__(self, plan: Plan, facts: ModelFacts) -> None:
        self.plan, self.facts = plan, facts
        self.slots: dict[int, tuple[int, int]] = {}
        self.closed = False

    def prefill(self, segments: Sequence[Segment]) -> NDArray[np.float32]:
        assert sum(len(s.tokens) for s in segments) <= self.plan.chunk
        return self._run(segments)

    def decode(self, segments: Sequence[Segment]) -> NDArray[np.float32]:
        assert all(len(s.tokens) == 1 and s.wanted for s in segments)
        return self._run(segments)

    def close(self) -> None:
        self.closed = True

    def _run(self, segments: Sequence[Segment]) -> NDArray[np.float32]:
        assert 0 < len(segments) <= self.plan.max_batch
        pages = [page for segment in segments for page in segment.pages]
        assert len(pages) == len(set(pages))
        assert all(0 <= page < self.plan.pages for page in pages)
        assert all(segment.tokens for segment in segments)
        for segment in segments:
            assert len(segment.pages) <= self.plan.table_width
            for position, token in enumerate(segment.tokens, segment.start):
                self.slots[self._slot(segment, position)] = (token, position)
        rows = [self.logits(self._history(segment)) for segment in segments if segment.wanted]
        return np.array(rows, dtype=np.float32).reshape(len(rows), self.facts.logits)

    def _slot(self, segment: Segment, position: int) -> int:
        page, offset = divmod(position, self.plan.page_size)
        return segment.pages[page] * self.plan.page_size + offset

    def _history(self, segment: Segment) -> list[int]:
        found = [self.slots[self._slot(segment, p)] for p in range(segment.start + len(segment.tokens))]
        assert [position for _, position in found] == list(range(len(found)))
        return [token for token, _ in found]

    def logits(self, history: Sequence[int]) -> NDArray[np.float32]:
        """Logits that depend on every token; the columns past the vocabulary are the largest."""
        digest = hashlib.sha256(np.array(history, dtype=np.int64).tobytes()).digest()
        rng = np.random.default_rng(int.from_bytes(digest[:8], "little"))
        row = rng.normal(size=self.facts.logits).astype(np.float32)
        row[self.facts.vocab :] = 99
        return row

    def unbatched(self, prompt: Sequence[int], params: SamplingParams, eos: frozenset[int]) -> list[int]:
        """The tokens that a request alone must get."""
        tokens, rng = list(prompt), np.random.default_rng(params.seed)
        limit = min(self.plan.max_context, self.plan.pages * self.plan.page_size)
        limit = min(limit, self.facts.context or limit)
        while len(tokens) <= limit and len(tokens) - len(prompt) < params.max_new_tokens:
            tokens.append(sample(self.logits(tokens)[: self.facts.vocab], params, rng))
            if tokens[-1] in eos and not params.ignore_eos:
                break
        return tokens[len(prompt) :]


@pytest.fixture(scope="session")
def make_facts() -> Callable[..., ModelFacts]:
    return _facts


@pytest.fixture(scope="session")
def make_plan() -> Callable[..., Plan]:
    return _plan


@pytest.fixture(scope="session")
def fake_model() -> type[FakeModel]:
    return FakeModel
