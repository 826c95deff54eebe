"""A model without a compiler: its next token is a function of the history it finds in the pages.

Every group of layers sees of it what its reach allows, as the layers of a compiled model do.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kvc.runtime.executor import Segment
from kvc.runtime.sampler import Choice, Draw, SamplingParams, choose, sample
from kvc_passes.facts import ModelFacts
from kvc_passes.plans import Bytes, Plan, StateGroup, Workload
from kvc_passes.sites import AttentionSite, MaskFact, Reach


def _facts(vocab: int = 23, context: int | None = None, **changes: Any) -> ModelFacts:
    site = AttentionSite(0, "n", 2, 1, 4, 4, 0.5, None, MaskFact("causal", None, "test"), None)
    values: dict[str, Any] = {"name": "m", "vocab": vocab, "logits": vocab + 2, "context": context}
    values |= {"sites": (site,), "positions": ("p",), "parameter_bytes": {}, "nodes": 1}
    return ModelFacts(**values | changes)


def _plan(pages: int = 16, page_size: int = 4, **changes: Any) -> Plan:
    values: dict[str, Any] = {"budget": 1 << 20, "workload": (Workload(2, 32),), "target": {"kind": "llvm"}}
    values |= {"page_size": page_size, "chunk": 8, "tile": 4}
    values |= {"max_batch": 3, "max_context": 32, "bytes": Bytes(1, 2, 3, 4, 5, 6)}
    values |= {"groups": (StateGroup((0,), Reach(), "test", 256, pages),)}
    values |= changes
    for group in values["groups"]:
        if group.pages < group.reach.most_pages(page_size, 1 << 30, 1):
            values["max_context"] = min(values["max_context"], group.pages * page_size)
    return Plan(**values)


def visible(reach: Reach, query: int) -> list[int]:
    """The positions that a query sees, from the definition of each mask."""
    keys = range(query + 1)
    if reach.window is not None:
        return [k for k in keys if k < reach.sinks or k > query - reach.window]
    if reach.chunk is not None:
        return [k for k in keys if k // reach.chunk == query // reach.chunk]
    return list(keys)


class FakeModel:
    """Keeps tokens where an executor keeps K and V, and checks what it is given against the plan."""

    def __init__(self, plan: Plan, facts: ModelFacts) -> None:
        self.plan, self.facts = plan, facts
        self.slots: list[dict[int, tuple[int, int]]] = [{} for _ in plan.groups]
        self.calls: list[int] = []
        """Tokens of every prefill call."""
        self.closed = False

    def prefill(self, segments: Sequence[Segment], *, take: bool = True) -> NDArray[np.float32]:
        self.calls.append(sum(len(s.tokens) for s in segments))
        assert self.calls[-1] <= self.plan.chunk
        return self._run(segments)

    def decode(self, segments: Sequence[Segment], *, take: bool = True) -> NDArray[np.float32]:
        assert all(len(s.tokens) == 1 and s.wanted for s in segments)
        return self._run(segments)

    def choose(self, draws: Sequence[Draw]) -> list[Choice]:
        return choose(self._rows[:, : self.facts.vocab], draws)

    def close(self) -> None:
        self.closed = True

    def _run(self, segments: Sequence[Segment]) -> NDArray[np.float32]:
        assert 0 < len(segments) <= self.plan.max_batch
        assert all(segment.tokens for segment in segments)
        for segment in segments:
            end = segment.start + len(segment.tokens)
            assert len(segment.pages) == len(self.plan.groups)
            for slots, group, pages in zip(self.slots, self.plan.groups, segment.pages):
                assert len(pages) <= self.plan.table_width
                assert all(0 <= page < group.pages for page in pages)
                for position, token in zip(range(segment.start, end), segment.tokens):
                    slots[self._slot(pages, position)] = (token, position)
        # All keys are written before any is read: what a sequence wrote, no other may have written over.
        rows = [self.logits(self._history(segment)) for segment in segments]
        wanted = [row for row, segment in zip(rows, segments) if segment.wanted]
        self._rows = np.array(wanted, dtype=np.float32).reshape(len(wanted), self.facts.logits)
        return self._rows

    def _slot(self, pages: Sequence[int], position: int) -> int:
        page, offset = divmod(position, self.plan.page_size)
        return pages[page] * self.plan.page_size + offset

    def _history(self, segment: Segment) -> list[tuple[int, ...]]:
        """What the last token of a segment sees in each group; that of the others is only looked at."""
        seen: list[tuple[int, ...]] = []
        for query in range(segment.start, segment.start + len(segment.tokens)):
            seen = []
            for slots, group, pages in zip(self.slots, self.plan.groups, segment.pages):
                positions = visible(group.reach, query)
                found = [slots[self._slot(pages, position)] for position in positions]
                assert [position for _, position in found] == positions
                seen.append(tuple(token for token, _ in found))
        return seen

    def logits(self, history: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Logits that depend on every token that is seen; the columns past the vocabulary are the largest."""
        digest = hashlib.sha256(repr([list(map(int, seen)) for seen in history]).encode()).digest()
        rng = np.random.default_rng(int.from_bytes(digest[:8], "little"))
        row = rng.normal(size=self.facts.logits).astype(np.float32)
        row[self.facts.vocab :] = 99
        return row

    def unbatched(self, prompt: Sequence[int], params: SamplingParams, eos: frozenset[int]) -> list[int]:
        """The tokens that a request alone must get."""
        tokens, rng = list(prompt), np.random.default_rng(params.seed)
        limit = min(self.plan.max_context, self.facts.context or self.plan.max_context)
        while len(tokens) <= limit and len(tokens) - len(prompt) < params.max_new_tokens:
            reaches = [group.reach for group in self.plan.groups]
            seen = [[tokens[k] for k in visible(reach, len(tokens) - 1)] for reach in reaches]
            tokens.append(sample(self.logits(seen)[: self.facts.vocab], params, rng))
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
