"""The page allocator against a model of it: every page has at most one owner, counts are exact."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from kvc.runtime.pages import PagePool, Pages
from kvc_passes.errors import PlanningError


class PoolMachine(RuleBasedStateMachine):
    held = Bundle("held")

    @initialize(count=st.integers(1, 24))
    def start(self, count: int) -> None:
        self.pool = PagePool(count)
        self.model: dict[Pages, list[int]] = {}

    @rule(target=held, count=st.integers(0, 8), expected=st.integers(0, 16))
    def allocate(self, count: int, expected: int) -> Pages | None:
        fits = count <= self.pool.free
        pages = self.pool.allocate(count, expected=expected)
        assert (pages is not None) == fits
        if pages is not None:
            assert len(pages) == count
            self.model[pages] = list(pages.ids)
        return pages

    @rule(pages=held, count=st.integers(0, 5), expected=st.integers(0, 8))
    def append(self, pages: Pages | None, count: int, expected: int) -> None:
        if pages is None:
            return
        fits = count <= self.pool.free
        assert self.pool.append(pages, count, expected=expected) == fits
        before = self.model[pages]
        assert list(pages.ids[: len(before)]) == before
        assert len(pages) == len(before) + (count if fits else 0)
        self.model[pages] = list(pages.ids)

    @rule(pages=consumes(held))
    def release(self, pages: Pages | None) -> None:
        if pages is not None:
            self.pool.release(pages)
            del self.model[pages]
            with pytest.raises(PlanningError, match="freed twice"):
                self.pool.release(pages)
            with pytest.raises(PlanningError, match="has freed its own"):
                self.pool.append(pages, 1)

    @invariant()
    def every_page_has_one_owner(self) -> None:
        if not hasattr(self, "model"):
            return
        owned = [page for ids in self.model.values() for page in ids]
        assert len(owned) == len(set(owned)) == self.pool.used
        assert all(0 <= page < self.pool.count for page in owned)
        assert self.pool.free == self.pool.count - len(owned)
        assert [list(pages.ids) for pages in self.model] == list(self.model.values())


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestPool = PoolMachine.TestCase


def test_sequences_that_grow_in_turn_stay_contiguous() -> None:
    pool = PagePool(32)
    sequences = [pool.allocate(2, expected=8) for _ in range(4)]
    for grown in range(2, 8):
        for pages in sequences:
            assert pages is not None
            assert pool.append(pages, 1, expected=8 - grown)
    for pages in sequences:
        assert pages is not None
        assert list(pages.ids) == list(range(pages.ids[0], pages.ids[0] + 8))
    assert pool.free == 0


def test_room_is_given_away_when_nothing_else_is_free() -> None:
    pool = PagePool(8)
    first = pool.allocate(2, expected=8)
    second = pool.allocate(6)
    assert first is not None
    assert second is not None
    assert sorted([*first.ids, *second.ids]) == list(range(8))
    assert not pool.append(first, 1)
    pool.release(second)
    assert pool.append(first, 6)
    assert list(first.ids) == list(range(8))
