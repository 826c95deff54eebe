"""The page allocator of one pool: which pages belong to which sequences.

Attention reads a sequence's pages in order, and memory is read fastest in order, so runs of neighbouring
pages are preferred. A sequence is given room to grow, which others take only when nothing else is free.

Pages may be shared: sequences that begin alike hold the same full pages, which nobody writes again. A page
stays known by its contents after it was freed, until it is given to somebody else.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence

from kvc_passes.errors import PlanningError

_FREE, _HELD, _ROOM = 0, 1, 2
RECORD_BYTES = 256
"""Of the process's memory, for what is remembered of a page; 170 to 250 are seen."""
NONE = 0
"""Stands in the place of a page that a sequence no longer holds; attention does not read it."""


class Pages:
    """The pages of one sequence, in the order of its tokens. Made and changed by a `PagePool` only."""

    def __init__(self, sinks: int = 0) -> None:
        self.ids = array("i")
        """Pages by place in the sequence; NONE for those between `sinks` and `first`."""
        self.sinks = sinks
        """Pages at the beginning that are kept whatever is dropped."""
        self.first = 0
        """The first page, behind those, that is held."""
        self.room = range(0)
        """Pages behind the last one that this sequence would like to grow into."""
        self.live = True

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def held(self) -> list[int]:
        """The pages that it holds."""
        return [*self.ids[: min(self.sinks, self.first)], *self.ids[self.first :]]


class PagePool:
    """Hands out `count` pages, numbered from 0."""

    def __init__(self, count: int) -> None:
        self._state = bytearray(count)
        self._holders = array("i", bytes(4 * count))
        self._free = count
        self._next = 0
        self._known: dict[bytes, int] = {}
        self._contents: dict[int, bytes] = {}

    @property
    def count(self) -> int:
        """Pages in all."""
        return len(self._state)

    @property
    def free(self) -> int:
        """Pages that nobody holds."""
        return self._free

    @property
    def used(self) -> int:
        """Pages held by sequences."""
        return len(self._state) - self._free

    def append(self, pages: Pages, count: int, *, expected: int = 0) -> bool:
        """Give a sequence `count` more pages; False (and no change) if too few are free.

        `expected` is the number of pages, these included, by which it may still grow.
        """
        if not pages.live:
            raise PlanningError("pages were given to a sequence that has freed its own")
        if count > self._free:
            return False
        while count and pages.ids and pages.first < len(pages.ids):
            following = pages.ids[-1] + 1
            if following >= len(self._state) or self._state[following] == _HELD:
                break
            if self._state[following] == _ROOM and following not in pages.room:
                break
            self._take(pages, [following])
            count, expected = count - 1, expected - 1
        if count:
            self._place(pages, count, max(count, expected))
        return True

    def drop(self, pages: Pages, first: int) -> None:
        """Take back the pages before place `first`, but for those that are kept whatever is dropped."""
        first = min(first, len(pages.ids))
        for place in range(max(pages.first, pages.sinks), first):
            self._let_go(pages.ids[place])
            pages.ids[place] = NONE
        if first > pages.sinks:
            pages.first = max(pages.first, first)

    def release(self, pages: Pages) -> None:
        """Take all pages of a sequence back. Raises PlanningError if that was done before."""
        held = pages.held
        if not pages.live or any(self._state[page] != _HELD for page in held):
            raise PlanningError("the pages of a sequence were freed twice")
        pages.live = False
        for page in held:
            self._let_go(page)
        self._give_up_room(pages)
        pages.ids, pages.first = array("i"), 0

    def name(self, page: int, contents: bytes) -> None:
        """Remember what a page holds, if no other page is known to hold the same."""
        if self._known.setdefault(contents, page) == page:
            self._contents[page] = contents

    def known(self, contents: bytes) -> bool:
        """Whether a page holds this, in use or not."""
        return contents in self._known

    def adopt(self, pages: Pages, place: int, contents: Sequence[bytes | None]) -> None:
        """Hold known pages from `place` on, in place of what the sequence holds there.

        None stands for nothing; then nothing is held before it either, but what is always kept.
        """
        if None in contents:
            self.drop(pages, place)
        for at, key in enumerate(contents, place):
            page = NONE if key is None else self._hold_known(key)
            if at < len(pages.ids):
                self._let_go(pages.ids[at])
                pages.ids[at] = page
            else:
                pages.ids.append(page)
            if key is None:
                pages.first = at + 1

    def _hold_known(self, contents: bytes) -> int:
        page = self._known[contents]
        if not self._holders[page]:
            self._state[page] = _HELD
            self._free -= 1
        self._holders[page] += 1
        return page

    def _let_go(self, page: int) -> None:
        self._holders[page] -= 1
        if not self._holders[page]:
            self._state[page] = _FREE
            self._free += 1

    def _place(self, pages: Pages, count: int, expected: int) -> None:
        """Hold `count` pages, at best a run with room behind it, at worst whatever is free."""
        self._give_up_room(pages)
        for length in (expected, count):
            # Behind what was given last: what was freed keeps its known contents for long.
            for begin in (self._next, 0):
                start = self._state.find(bytes(length), begin)  # a run of `length` times _FREE
                if start >= 0:
                    self._take(pages, range(start, start + count))
                    pages.room = range(start + count, start + length)
                    for page in pages.room:
                        self._state[page] = _ROOM
                    self._next = start + length
                    return
        self._take(pages, self._scattered(count))

    def _scattered(self, count: int) -> list[int]:
        """`count` pages: the free ones first, then others' room from its far end."""
        found = [page for page, state in enumerate(self._state) if state == _FREE][:count]
        room = [page for page, state in enumerate(self._state) if state == _ROOM]
        missing = count - len(found)
        return found + sorted(room[len(room) - missing :])

    def _take(self, pages: Pages, ids: Iterable[int]) -> None:
        before = len(pages.ids)
        pages.ids.extend(ids)
        for page in pages.ids[before:]:
            self._state[page] = _HELD
            self._holders[page] = 1
            self._known.pop(self._contents.pop(page, b""), None)
        self._free -= len(pages.ids) - before

    def _give_up_room(self, pages: Pages) -> None:
        for page in pages.room:
            if self._state[page] == _ROOM:
                self._state[page] = _FREE
        pages.room = range(0)
