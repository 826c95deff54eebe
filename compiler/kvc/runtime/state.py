"""What sequences keep between calls: pages of every group of attention layers, held as long as they are seen.

A group's layers see the same keys. Where they see a window or a chunk of them only, pages that no later token
can see go back to the group's pool. Sequences that begin with the same tokens share their full pages.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvc.runtime.executor import Segment
from kvc.runtime.pages import PagePool, Pages
from kvc_passes.errors import PlanningError
from kvc_passes.plans import Plan, StateGroup


@dataclass(eq=False)
class Kept:
    """The state of one sequence. Made and changed by `State` only."""

    tokens: Sequence[int]
    """The sequence's tokens; more may be appended."""
    pages: list[Pages]
    """Of every group."""
    length: int = 0
    """Tokens whose state was computed."""
    owed: int = 0
    """Pages that it was promised when it was admitted and has not taken, where all tokens are kept."""
    names: list[bytes] = field(default_factory=list)
    """For full pages of tokens: what tells their tokens and all before them from others."""
    memory: NDArray[np.float32] | None = None
    """The encoder's output [rows, d], where the model reads one."""
    encoded: bool = False
    """Whether that is in its pages."""


class State:
    """The pools of a plan, and who holds which pages.

    Args:
        plan: the plan.
        share: let sequences that begin alike hold the same pages.
        shuffle: give sequences other pages than the allocator chose, by a random order of all pages. Kernels
            must not depend on where pages stand: for checks.
    """

    def __init__(self, plan: Plan, *, share: bool = True, shuffle: np.random.Generator | None = None) -> None:
        self.plan, self.share = plan, share
        self.pools = [PagePool(group.pages) for group in plan.groups]
        self._order = None if shuffle is None else [shuffle.permutation(g.pages) for g in plan.groups]

    def open(
        self,
        tokens: Sequence[int],
        names: list[bytes] | None = None,
        memory: NDArray[np.float32] | None = None,
    ) -> Kept:
        """A sequence of which nothing is computed. `names`: those of its pages, from an earlier `Kept`."""
        sinks = (-(-group.reach.sinks // self.plan.page_size) for group in self.plan.groups)
        pages = [Pages(count) for count in sinks]
        return Kept(tokens, pages, names=[] if names is None else names, memory=memory)

    def _of_tokens(self, kept: Kept) -> Iterator[tuple[PagePool, StateGroup, Pages]]:
        """Pool, group and the sequence's pages, of every group that keeps tokens."""
        for pool, group, pages in zip(self.pools, self.plan.groups, kept.pages):
            if not group.reach.memory:
                yield pool, group, pages

    def hold_memory(self, kept: Kept) -> bool:
        """Have pages for a sequence's encoder output; False, and no change, where too few are free."""
        if kept.memory is None:
            return True
        for pool, group, pages in zip(self.pools, self.plan.groups, kept.pages):
            missing = -(-len(kept.memory) // self.plan.page_size) - len(pages)
            if group.reach.memory and missing > 0 and not pool.append(pages, missing):
                return False
        return True

    def memory_pages(self, kept: Kept) -> Sequence[int]:
        """The pages of a sequence's encoder output."""
        index = next(i for i, group in enumerate(self.plan.groups) if group.reach.memory)
        pages: Sequence[int] = self._ids(kept)[index]
        return pages

    def join(self, kept: Kept) -> int:
        """Go on with the full pages that are known to hold the state of the sequence's next tokens.

        Returns how many tokens that are. The last token is never among them: its logits are wanted.
        """
        place = kept.length // self.plan.page_size
        if not self.share or kept.length % self.plan.page_size:
            return 0
        end = self._longest_known(kept, place)
        if end == place:
            return 0
        for pool, group, pages in self._of_tokens(kept):
            first = self._first_needed(group, end)
            needed = [kept.names[at] if at < pages.sinks or at >= first else None for at in range(place, end)]
            pool.adopt(pages, place, needed)
            pool.drop(pages, first)
        kept.length = end * self.plan.page_size
        return kept.length - place * self.plan.page_size

    def admit(self, kept: Kept, final: int, running: Sequence[Kept]) -> bool:
        """Whether a sequence can begin: what its tokens need is free, and not owed to those that run.

        Where every token is kept, that are all its pages but for those that it will share. A bounded reach
        takes its pages part by part: as many as it ever holds. final: the length that it may grow to.
        """
        size, chunk = self.plan.page_size, self.plan.chunk
        length, place = min(len(kept.tokens), final), kept.length // size
        coming = max((self._common(kept, other) - place for other in running), default=0)
        for pool, group, pages in self._of_tokens(kept):
            # One token more, or the sequence would run out of pages as soon as it decodes.
            most = group.reach.most_pages(size, min(length + 1, final), chunk)
            free = pool.free
            if not group.reach.bounded:
                most, free = most - max(coming, 0), free - sum(other.owed for other in running)
            if min(most, pool.count) - len(pages.held) > free:
                return False
        if not self.hold_memory(kept):
            return False
        kept.owed = max(0, -(-length // size) - place - max(coming, 0))
        return True

    def extend(self, kept: Kept, count: int, final: int) -> bool:
        """Have pages for `count` tokens more; False, and no change, where too few are free."""
        size = self.plan.page_size
        groups = list(self._of_tokens(kept))
        missing = [-(-(kept.length + count) // size) - len(pages) for _, _, pages in groups]
        if any(more > pool.free for more, (pool, _, _) in zip(missing, groups)):
            return False
        for (pool, group, pages), more in zip(groups, missing):
            if more > 0:
                most = group.reach.most_pages(size, final, self.plan.chunk)
                # What it was promised is taken at once, and stands together.
                left = -(-len(kept.tokens) // size) - len(pages)  # it may share more than was expected
                owed = 0 if group.reach.bounded else min(kept.owed, pool.free, left)
                pool.append(pages, max(more, owed), expected=most - len(pages.held))
        kept.owed = 0
        return True

    def room(self, kept: Kept) -> int:
        """Tokens by which a sequence can go on with the pages that are free."""
        ends = [len(pages) + pool.free for pool, _, pages in self._of_tokens(kept)]
        return min(ends) * self.plan.page_size - kept.length

    def segment(self, kept: Kept, count: int, *, wanted: bool = True) -> Segment:
        """The next tokens of a sequence as a part of a call; when that is done, `advance` is due.

        Raises PlanningError where too few pages are free.
        """
        end = kept.length + count
        if not self.extend(kept, count, end):
            raise PlanningError(f"{count} tokens more do not fit the pages that are free")
        rows = 0 if kept.memory is None else len(kept.memory)
        return Segment(kept.tokens[kept.length : end], kept.length, self._ids(kept), wanted, rows)

    def _ids(self, kept: Kept) -> list[Any]:
        """The numbers of a sequence's pages, as kernels know them, of every group."""
        ids: list[Any] = [pages.ids for pages in kept.pages]
        if self._order is None:
            return ids
        return [order[np.frombuffer(each, np.int32)] for order, each in zip(self._order, ids)]

    def advance(self, kept: Kept, count: int) -> None:
        """A call has computed the next tokens: remember full pages, and drop what no later token sees."""
        size = self.plan.page_size
        names = self.filled(kept, count)
        before, kept.length = kept.length // size, kept.length + count
        for pool, group, pages in self._of_tokens(kept):
            for place, name in enumerate(names, before):
                pool.name(pages.ids[place], name)
            pool.drop(pages, group.reach.oldest(kept.length) // size)

    def next_page(self, kept: Kept) -> bytes | None:
        """The name of the page that a sequence goes on with, if it begins and fills one."""
        size = self.plan.page_size
        whole = kept.length % size == 0 and kept.length + size < len(kept.tokens)
        return self.name(kept, kept.length // size) if self.share and whole else None

    def filled(self, kept: Kept, count: int) -> list[bytes]:
        """The names of the pages that the next tokens fill."""
        size = self.plan.page_size
        places = range(kept.length // size, (kept.length + count) // size)
        return [self.name(kept, place) for place in places] if self.share else []

    def utilization(self, sequences: Sequence[Kept]) -> tuple[float, ...]:
        """Of every group: tokens that these sequences may still see, over those that fit the pages they hold.

        Above 1 where sequences share pages, 0 where they hold none.
        """
        found = []
        for index, group in enumerate(self.plan.groups):
            seen = 0
            for kept in sequences:
                if group.reach.memory:
                    seen += 0 if kept.memory is None else len(kept.memory)
                    continue
                first = min(group.reach.oldest(kept.length), kept.length)
                seen += kept.length - first + min(group.reach.sinks, first)
            held = {page for kept in sequences for page in kept.pages[index].held}
            found.append(seen / max(1, len(held) * self.plan.page_size))
        return tuple(found)

    def close(self, kept: Kept) -> None:
        """Give all pages of a sequence back."""
        for pool, pages in zip(self.pools, kept.pages):
            pool.release(pages)

    def name(self, kept: Kept, place: int) -> bytes:
        """What tells a full page's tokens, and all before them, from others."""
        size = self.plan.page_size
        while len(kept.names) <= place:
            at, before = len(kept.names), kept.names[-1] if kept.names else _seed(kept)
            tokens = np.array(kept.tokens[at * size : (at + 1) * size], np.int32)
            kept.names.append(hashlib.blake2b(before + tokens.tobytes(), digest_size=16).digest())
        return kept.names[place]

    def _common(self, kept: Kept, other: Kept) -> int:
        """Full pages that both begin with and the other is about to compute; not that of the last token."""
        if not self.share or other.length > kept.length:
            return 0
        most = min(len(kept.tokens) - 1, len(other.tokens)) // self.plan.page_size
        for place in range(most):
            if self.name(kept, place) != self.name(other, place):
                return place
        return most

    def _first_needed(self, group: StateGroup, pages: int) -> int:
        """The first page behind the sinks that a sequence of so many full pages has to hold."""
        return group.reach.oldest(pages * self.plan.page_size) // self.plan.page_size

    def _longest_known(self, kept: Kept, place: int) -> int:
        """Most full pages, `place` at least, of which every group holds or knows those that it would need."""
        last = (len(kept.tokens) - 1) // self.plan.page_size
        fitting = set(range(place + 1, last + 1))
        for pool, group, pages in self._of_tokens(kept):
            leading = run = place
            for end in range(place + 1, last + 1):
                run = run + 1 if pool.known(self.name(kept, end - 1)) else 0
                leading = end if run == end else leading
                if run < end - self._first_needed(group, end) or leading < min(pages.sinks, end):
                    fitting.discard(end)
            if not fitting:
                break
        return max(fitting, default=place)


def _seed(kept: Kept) -> bytes:
    """What tells the encoder's output of a sequence from others: states of tokens depend on it."""
    if kept.memory is None:
        return b""
    return hashlib.blake2b(kept.memory.tobytes(), digest_size=16).digest()
