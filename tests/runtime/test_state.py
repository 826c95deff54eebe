"""Which pages sequences keep: as many as are seen, each once, for as long as somebody sees them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kvc.runtime.sampler import SamplingParams
from kvc.runtime.scheduler import Scheduler
from kvc.runtime.state import Kept, State
from kvc_passes.errors import PlanningError
from kvc_passes.plans import StateGroup
from kvc_passes.sites import Reach

Make = Callable[..., Any]
SIZE = 4
LONG = SamplingParams(max_new_tokens=8, ignore_eos=True)


def groups(*reaches: Reach, pages: int = 64) -> tuple[StateGroup, ...]:
    return tuple(StateGroup((i,), reach, "test", 64, pages) for i, reach in enumerate(reaches))


def go_on(state: State, kept: Kept, count: int) -> None:
    state.segment(kept, count)
    state.advance(kept, count)


def held(kept: Kept) -> list[int]:
    return [len(pages.held) for pages in kept.pages]


@pytest.mark.parametrize(
    ("reach", "length", "pages"),
    [
        (Reach(), 41, 11),
        (Reach(window=8), 41, 3),  # the next query sees 34 .. 41, in pages 8, 9, 10
        (Reach(window=8, sinks=5), 41, 5),
        (Reach(chunk=12), 41, 2),  # 36 .. 40
        (Reach(chunk=12), 36, 0),  # the next token begins a chunk
        (Reach(window=1), 40, 0),  # the next token sees itself alone
        (Reach(window=100), 41, 11),
    ],
)
@pytest.mark.parametrize("step", [1, 3, 8])
def test_what_no_later_token_sees_is_given_back(
    make_plan: Make, reach: Reach, length: int, pages: int, step: int
) -> None:
    state = State(make_plan(groups=groups(reach), page_size=SIZE, max_context=64))
    kept = state.open(list(range(64)))
    while kept.length < length:
        go_on(state, kept, min(step, length - kept.length))
        limit = reach.most_pages(SIZE, 64, 1)
        assert held(kept)[0] <= limit
    needed = {key // SIZE for key in range(length) if key >= reach.oldest(length) or key < reach.sinks}
    assert held(kept) == [len(needed)] == [state.pools[0].used]
    assert len(needed) == pages
    state.close(kept)
    assert state.pools[0].used == 0


@pytest.mark.parametrize("window", [1, 3, 4, 5, 8, 9, 16, 17])
@pytest.mark.parametrize("step", [1, 2, 5, 8, 13])
def test_a_pool_of_the_planned_size_holds_a_window_and_a_chunk(
    make_plan: Make, window: int, step: int
) -> None:
    """The bound of Reach.most_pages is met, and by some position it is reached."""
    reach = Reach(window=window)
    pages = reach.most_pages(SIZE, 10_000, step)
    state = State(
        make_plan(groups=groups(reach, pages=pages), page_size=SIZE, chunk=step, max_context=10_000)
    )
    kept, most = state.open([0] * 300), 0
    go_on(state, kept, 1)  # so that steps begin anywhere in a page
    while kept.length + step < 300:
        state.segment(kept, step)
        most = max(most, state.pools[0].used)
        state.advance(kept, step)
        go_on(state, kept, 1) if kept.length + 1 < 300 else None
    assert most == pages


def test_sequences_that_begin_alike_share_full_pages(make_plan: Make) -> None:
    state = State(make_plan(groups=groups(Reach()), page_size=SIZE, max_context=64))
    first = state.open([*range(10), 50, 51])
    go_on(state, first, 12)
    second = state.open([*range(10), 60, 61, 62])
    assert state.join(second) == 8  # two full pages; the third differs
    go_on(state, second, 5)
    assert list(first.pages[0].ids[:2]) == list(second.pages[0].ids[:2])
    assert first.pages[0].ids[2] != second.pages[0].ids[2]
    assert state.pools[0].used == 3 + 2
    state.close(first)
    assert state.pools[0].used == 4
    again = state.open([*range(10), 50, 51])  # its pages were freed, and still hold it
    assert state.join(again) == 8  # and not 12: the logits of the last token are wanted
    assert state.join(state.open([1, *range(1, 10), 50, 51])) == 0
    assert State(state.plan, share=False).join(state.open([*range(10), 50, 51])) == 0


def test_a_window_that_slid_on_cannot_be_shared(make_plan: Make) -> None:
    """All groups must still hold what the new sequence would need."""
    state = State(make_plan(groups=groups(Reach(), Reach(window=8)), page_size=SIZE, max_context=64))
    first = state.open(list(range(33)))
    go_on(state, first, 8)
    other = state.open([*range(8), 70, 71])
    assert state.join(other) == 8
    assert held(other) == [2, 2]
    state.close(other)
    while first.length < 33:
        go_on(state, first, 1)
    # Pages 0 .. 5 of the window's group are free; once somebody takes them, what they held is lost.
    filler = state.open([99] * 60)
    for pool in state.pools:
        pool.append(filler.pages[state.pools.index(pool)], pool.free)
    assert state.join(state.open([*range(8), 70, 71])) == 0
    late = state.open([*range(32), 70])
    assert state.join(late) == 32
    assert held(late) == [8, 2]


def test_requests_that_come_together_compute_their_common_prefix_once(
    fake_model: Make, make_plan: Make, make_facts: Make
) -> None:
    plan = make_plan(groups=groups(Reach()), page_size=SIZE, chunk=16, max_batch=4, max_context=64)
    prompts = [[*range(9), 10 + i, 11] for i in range(4)]
    tokens, used = {}, {}
    for share in (True, False):
        model = fake_model(plan, make_facts())
        scheduler = Scheduler(model, share=share)
        requests = [scheduler.add(prompt, LONG) for prompt in prompts]
        used[share] = 0
        while scheduler.busy:
            scheduler.step()
            used[share] = max(used[share], scheduler.state.pools[0].used)
        tokens[share] = [request.generated for request in requests]
        assert sum(model.calls) == (11 + 3 * 3 if share else 4 * 11)
        assert scheduler.counters.shared_tokens == (3 * 8 if share else 0)
    assert tokens[True] == tokens[False]
    assert used == {True: 2 + 3 * 3, False: 4 * 4 + 1}  # when the first has ended, or is about to


def test_a_prompt_of_another_answer_takes_no_more_pages_than_it_has(
    fake_model: Make, make_plan: Make, make_facts: Make
) -> None:
    """While the third waits for the second, the first computes what the third's prompt goes on with."""
    plan = make_plan(groups=groups(Reach()), page_size=SIZE, chunk=8, max_batch=3, max_context=32)
    first = [1, 2, 3, 4]
    params = SamplingParams(max_new_tokens=28, ignore_eos=True)
    answer = fake_model(plan, make_facts()).unbatched(first, params, frozenset())
    scheduler = Scheduler(fake_model(plan, make_facts()))
    for prompt in (first, [9] * 32, (first + answer)[:32]):
        scheduler.add(prompt, params)
    while scheduler.busy:
        scheduler.step()
        kept = [r.kept for r in scheduler._running if r.kept is not None]
        assert all(len(each.pages[0]) <= plan.table_width for each in kept)
        assert all(len(each.pages[0]) <= -(-len(each.tokens) // SIZE) for each in kept)


def test_utilization_counts_tokens_that_are_seen(make_plan: Make) -> None:
    reaches = Reach(), Reach(window=8, sinks=2)
    state = State(make_plan(groups=groups(*reaches), page_size=SIZE, max_context=64))
    assert state.utilization([]) == (0.0, 0.0)
    first, second = state.open([0] * 30), state.open([1] * 30)
    go_on(state, first, 21)
    go_on(state, second, 4)
    # 21 and 4 tokens in 6 and 1 pages; 14 .. 20 and 2 sinks in 3 and 1 pages, 4 tokens in 1.
    assert state.utilization([first, second]) == (25 / 28, (7 + 2 + 4) / 20)


def test_more_than_what_is_free_is_refused(make_plan: Make) -> None:
    state = State(make_plan(groups=groups(Reach(), pages=2), page_size=SIZE))
    kept = state.open([0] * 12)
    assert state.room(kept) == 8
    with pytest.raises(PlanningError, match="9 tokens more do not fit the pages that are free"):
        state.segment(kept, 9)
    assert held(kept) == [0]


def test_shuffled_pages_are_a_permutation(make_plan: Make) -> None:
    state = State(
        make_plan(groups=groups(Reach()), page_size=SIZE, max_context=64), shuffle=np.random.default_rng(0)
    )
    first, second = state.open([0] * 30), state.open([1] * 30)
    pages = [list(state.segment(kept, 30).pages[0]) for kept in (first, second)]
    assert len({*pages[0], *pages[1]}) == 16
    assert pages[0] != sorted(pages[0])
