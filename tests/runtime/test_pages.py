"""The page allocator against a naive reference: who holds which page, what it holds, how many are free."""

from __future__ import annotations

import hashlib
import tracemalloc

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from kvc.runtime.pages import RECORD_BYTES, PagePool, Pages
from kvc_passes.errors import PlanningError


class Reference:
    """Sequences as dictionaries from places to pages, and the contents that were written there."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.sequences: dict[Pages, dict[int, int]] = {}
        self.written: dict[int, bytes] = {}
        """What the last holder of a page wrote, if it was told."""

    @property
    def held(self) -> set[int]:
        return {page for places in self.sequences.values() for page in places.values()}

    def took(self, pages: Pages, places: range) -> None:
        """The allocator gave fresh pages: nobody may hold them, and what they held is gone."""
        fresh = [pages.ids[place] for place in places]
        assert not self.held & set(fresh)
        assert len(set(fresh)) == len(fresh)
        self.sequences[pages] |= dict(zip(places, fresh))
        for page in fresh:
            self.written.pop(page, None)


class PoolMachine(RuleBasedStateMachine):
    """Allocate, append, fork (adopt), slide (drop) and free."""

    held = Bundle("held")

    @initialize(count=st.integers(1, 24))
    def start(self, count: int) -> None:
        self.pool, self.reference = PagePool(count), Reference(count)

    @rule(target=held, sinks=st.integers(0, 2))
    def open(self, sinks: int) -> Pages:
        pages = Pages(sinks)
        self.reference.sequences[pages] = {}
        return pages

    @rule(pages=held, count=st.integers(0, 8), expected=st.integers(0, 16))
    def append(self, pages: Pages, count: int, expected: int) -> None:
        fits = count <= self.pool.free
        before = len(pages)
        assert self.pool.append(pages, count, expected=expected) == fits
        assert len(pages) == before + (count if fits else 0)
        self.reference.took(pages, range(before, len(pages)))

    @rule(pages=held, label=st.binary(min_size=1, max_size=1))
    def write(self, pages: Pages, label: bytes) -> None:
        """Name what the sequence's held pages hold, as if all of them were full."""
        for place, page in self.reference.sequences[pages].items():
            if page not in self.reference.written:
                name = label + bytes([place])
                self.reference.written[page] = name
                self.pool.name(page, name)

    @rule(
        target=held, label=st.binary(min_size=1, max_size=1), gap=st.integers(0, 3), sinks=st.integers(0, 2)
    )
    def fork(self, label: bytes, gap: int, sinks: int) -> Pages:
        """A new sequence begins with the pages that are known under a label, perhaps not all of them."""
        known = 0
        while self.pool.known(label + bytes([known])):
            known += 1
        pages = self.open(sinks)
        needed = [place < sinks or place >= sinks + gap for place in range(known)]
        names = [label + bytes([place]) if need else None for place, need in enumerate(needed)]
        free = self.pool.free
        self.pool.adopt(pages, 0, names)
        taken = {place: pages.ids[place] for place, need in enumerate(needed) if need}
        for place, page in taken.items():
            assert self.reference.written[page] == label + bytes([place])
        revived = set(taken.values()) - self.reference.held
        assert self.pool.free == free - len(revived)
        self.reference.sequences[pages] = taken
        return pages

    @rule(pages=held, place=st.integers(0, 3), label=st.binary(min_size=1, max_size=1))
    def replace(self, pages: Pages, place: int, label: bytes) -> None:
        """A sequence goes on with a known page in the place of its own, or behind its own."""
        places = self.reference.sequences[pages]
        at = len(pages) - place
        if at < 0 or (at < len(pages) and at not in places) or not self.pool.known(label + bytes([at])):
            return
        self.pool.adopt(pages, at, [label + bytes([at])])
        places[at] = pages.ids[at]
        assert self.reference.written[places[at]] == label + bytes([at])

    @rule(pages=held, first=st.integers(0, 12))
    def slide(self, pages: Pages, first: int) -> None:
        self.pool.drop(pages, first)
        places = self.reference.sequences[pages]
        for place in [p for p in places if pages.sinks <= p < first]:
            del places[place]

    @rule(pages=consumes(held))
    def free(self, pages: Pages) -> None:
        self.pool.release(pages)
        del self.reference.sequences[pages]
        with pytest.raises(PlanningError, match="freed twice"):
            self.pool.release(pages)
        with pytest.raises(PlanningError, match="has freed its own"):
            self.pool.append(pages, 1)

    @invariant()
    def both_agree(self) -> None:
        if not hasattr(self, "reference"):
            return
        held = self.reference.held
        assert self.pool.used == len(held)
        assert self.pool.free == self.pool.count - len(held)
        assert all(0 <= page < self.pool.count for page in held)
        for pages, places in self.reference.sequences.items():
            assert sorted(pages.held) == sorted(places.values())
            assert {place: pages.ids[place] for place in places} == places


PoolMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestPool = PoolMachine.TestCase


def _sequence(pool: PagePool, count: int, expected: int = 0) -> Pages:
    pages = Pages()
    assert pool.append(pages, count, expected=expected)
    return pages


def test_sequences_that_grow_in_turn_stay_contiguous() -> None:
    pool = PagePool(32)
    sequences = [_sequence(pool, 2, 8) for _ in range(4)]
    for grown in range(2, 8):
        for pages in sequences:
            assert pool.append(pages, 1, expected=8 - grown)
    for pages in sequences:
        assert list(pages.ids) == list(range(pages.ids[0], pages.ids[0] + 8))
    assert pool.free == 0


def test_room_is_given_away_when_nothing_else_is_free() -> None:
    pool = PagePool(8)
    first, second = _sequence(pool, 2, 8), _sequence(pool, 6)
    assert sorted([*first.ids, *second.ids]) == list(range(8))
    assert not pool.append(first, 1)
    pool.release(second)
    assert pool.append(first, 6)
    assert list(first.ids) == list(range(8))


def test_a_freed_page_is_known_until_it_is_given_away() -> None:
    pool = PagePool(2)
    first = _sequence(pool, 1)
    pool.name(first.ids[0], b"a")
    pool.release(first)
    assert pool.known(b"a")
    second = Pages()
    pool.adopt(second, 0, [b"a"])
    assert pool.used == 1
    pool.release(second)
    _sequence(pool, 2)
    assert not pool.known(b"a")


def test_others_pages_are_taken_before_those_that_were_freed_last() -> None:
    pool = PagePool(8)
    first = _sequence(pool, 3)
    pool.name(first.ids[0], b"a")
    pool.release(first)
    _sequence(pool, 4)
    assert pool.known(b"a")


def test_what_is_remembered_of_pages_is_what_the_plan_counts() -> None:
    """A pool whose pages are all known by what they hold."""
    count = 20_000
    tracemalloc.start()
    try:
        pool, pages = PagePool(count), Pages()
        pool.append(pages, count)
        for page in pages.ids:
            pool.name(page, hashlib.blake2b(page.to_bytes(4), digest_size=16).digest())
        assert 100 < tracemalloc.get_traced_memory()[1] / count < RECORD_BYTES
    finally:
        tracemalloc.stop()
