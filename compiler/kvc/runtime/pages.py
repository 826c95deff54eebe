"""The page allocator: which pages of the pools belong to which sequence.

Attention reads a sequence's pages in order, and memory is read fastest in order, so runs of neighbouring
pages are preferred. A sequence is given room to grow, which others take only when nothing else is free.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable

from kvc_passes.errors import PlanningError

_FREE, _HELD, _ROOM = 0, 1, 2


class Pages:
    """The pages of one sequence, in the order of its tokens. Made and changed by a `PagePool` only."""

    def __init__(self) -> None:
        self.ids = array("i")
        self.room = range(0)
        """Pages behind the last one that this sequence would like to grow into."""
        self.live = True

    def __len__(self) -> int:
        return len(self.ids)


class PagePool:
    """Hands out `count` pages, numbered from 0."""

    def __init__(self, count: int) -> None:
        self._state = bytearray(count)
        self._free = count

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

    def allocate(self, count: int, *, expected: int = 0) -> Pages | None:
        """`count` pages for a sequence that may grow to `expected`; None, unchanged, if too few are free."""
        if count > self._free:
            return None
        pages = Pages()
        self._take(pages, count, max(count, expected))
        return pages

    def append(self, pages: Pages, count: int, *, expected: int = 0) -> bool:
        """Give a sequence `count` more pages; False (and no change) if too few are free.

        `expected` is the number of pages, these included, by which it may still grow.
        """
        if not pages.live:
            raise PlanningError("pages were given to a sequence that has freed its own")
        if count > self._free:
            return False
        while count and pages.ids:
            following = pages.ids[-1] + 1
            if following >= len(self._state) or self._state[following] == _HELD:
                break
            if self._state[following] == _ROOM and following not in pages.room:
                break
            self._hold(pages, [following])
            count, expected = count - 1, expected - 1
        if count:
            self._take(pages, count, max(count, expected))
        return True

    def release(self, pages: Pages) -> None:
        """Take all pages of a sequence back. Raises PlanningError if that was done before."""
        if not pages.live or any(self._state[page] != _HELD for page in pages.ids):
            raise PlanningError("the pages of a sequence were freed twice")
        pages.live = False
        for page in pages.ids:
            self._state[page] = _FREE
        self._free += len(pages.ids)
        self._give_up_room(pages)
        pages.ids = array("i")

    def _take(self, pages: Pages, count: int, expected: int) -> None:
        """Hold `count` pages, at best a run with room behind it, at worst whatever is free."""
        self._give_up_room(pages)
        for length in (expected, count):
            start = self._state.find(bytes(length))  # the first run of `length` times _FREE
            if start >= 0:
                self._hold(pages, range(start, start + count))
                pages.room = range(start + count, start + length)
                for page in pages.room:
                    self._state[page] = _ROOM
                return
        self._hold(pages, self._scattered(count))

    def _scattered(self, count: int) -> list[int]:
        """`count` pages: the free ones first, then others' room from its far end."""
        found = [page for page, state in enumerate(self._state) if state == _FREE][:count]
        room = [page for page, state in enumerate(self._state) if state == _ROOM]
        missing = count - len(found)
        return found + sorted(room[len(room) - missing :])

    def _hold(self, pages: Pages, ids: Iterable[int]) -> None:
        before = len(pages.ids)
        pages.ids.extend(ids)
        for page in pages.ids[before:]:
            self._state[page] = _HELD
        self._free -= len(pages.ids) - before

    def _give_up_room(self, pages: Pages) -> None:
        for page in pages.room:
            if self._state[page] == _ROOM:
                self._state[page] = _FREE
        pages.room = range(0)
