"""Continuous batching gives every request the tokens that it would get alone, and returns every page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvc.runtime.requests import Request, Update
from kvc.runtime.sampler import SamplingParams
from kvc.runtime.scheduler import Scheduler
from kvc_passes.errors import Error, InputError
from kvc_passes.plans import StateGroup
from kvc_passes.sites import Reach

EOS = frozenset({3})
Make = Callable[..., Any]


@st.composite
def _reaches(draw: st.DrawFn) -> Reach:
    match draw(st.sampled_from(["all", "window", "chunk", "sinks"])):
        case "window":
            return Reach(window=draw(st.integers(1, 12)))
        case "chunk":
            return Reach(chunk=draw(st.integers(1, 12)))
        case "sinks":
            return Reach(window=draw(st.integers(1, 12)), sinks=draw(st.integers(1, 5)))
    return Reach()


@st.composite
def _worlds(draw: st.DrawFn) -> dict[str, Any]:
    """A plan with few pages, and requests that arrive and are cancelled at some steps."""
    size, chunk = draw(st.integers(1, 5)), draw(st.integers(1, 9))
    context = draw(st.integers(1, 40))
    reaches = draw(st.lists(_reaches(), min_size=1, max_size=3, unique=True))
    groups = []
    for index, reach in enumerate(reaches):
        least = reach.most_pages(size, context, 1)  # one sequence alone must be able to go on
        groups.append(StateGroup((index,), reach, "test", 64, least + draw(st.integers(0, 6))))
    plan = {"page_size": size, "groups": tuple(groups), "chunk": chunk, "tile": 2, "max_context": context}
    plan |= {"max_batch": draw(st.integers(1, 4))}
    common = draw(st.lists(st.integers(0, 22), max_size=context))
    requests = []
    for seed in range(draw(st.integers(1, 9))):
        begin = common[: draw(st.integers(0, len(common)))]
        rest = draw(st.lists(st.integers(0, 22), min_size=not begin, max_size=context - len(begin)))
        params = SamplingParams(
            max_new_tokens=draw(st.integers(1, 12)),
            temperature=draw(st.sampled_from([0.0, 1.0])),
            seed=seed,
            ignore_eos=draw(st.booleans()),
        )
        cancelled = draw(st.one_of(st.none(), st.integers(0, 30)))
        requests.append((draw(st.integers(0, 15)), begin + rest, params, cancelled))
    return {"plan": plan, "requests": requests}


@settings(max_examples=400, deadline=None)
@given(world=_worlds())
def test_outputs_equal_the_unbatched_ones(
    fake_model: Make, make_plan: Make, make_facts: Make, world: dict[str, Any]
) -> None:
    model = fake_model(make_plan(**world["plan"]), make_facts())
    scheduler = Scheduler(model)
    added: list[tuple[Request, Sequence[int], SamplingParams]] = []
    pending = sorted(world["requests"], key=lambda r: r[0])
    cancels: dict[int, list[Request]] = {}
    updates: list[Update] = []
    step = 0
    while pending or scheduler.busy:
        while pending and pending[0][0] <= step:
            _, prompt, params, cancelled = pending.pop(0)
            request = scheduler.add(prompt, params, eos=EOS)
            added.append((request, prompt, params))
            if cancelled is not None:
                cancels.setdefault(step + cancelled, []).append(request)
        for request in cancels.get(step, []):
            assert scheduler.cancel(request.id) == (request.finish_reason is None)
        updates += scheduler.step()
        assert scheduler.running <= model.plan.max_batch
        _check_pages(scheduler, [r for r, *_ in added])
        live = [r for r, *_ in added if r.finish_reason is None]
        ages = [r.id for r in live if r.kept is not None] + [r.id for r in live if r.kept is None]
        assert ages == sorted(ages)  # nobody waits for a younger one
        step += 1
        assert step < 2000
    assert scheduler.running == scheduler.waiting == 0
    assert all(pool.used == 0 for pool in scheduler.state.pools)
    for request, prompt, params in added:
        expected = model.unbatched(prompt, params, EOS)
        seen = [u.token for u in updates if u.request is request and u.token is not None]
        assert request.generated == seen
        if request.finish_reason == "cancelled":
            assert seen == expected[: len(seen)]
        else:
            assert seen == expected
            assert request.finish_reason == _reason(scheduler, request)
        assert [u.finish_reason for u in updates if u.request is request and u.finish_reason] == [
            request.finish_reason
        ]


def _check_pages(scheduler: Scheduler, requests: Sequence[Request]) -> None:
    """Every page that is in use is somebody's; nobody holds more than the plan says that a sequence may."""
    plan = scheduler.plan
    for index, (pool, group) in enumerate(zip(scheduler.state.pools, plan.groups)):
        held = [r.kept.pages[index].held for r in requests if r.kept is not None]
        assert pool.used == len({page for pages in held for page in pages})
        for request, pages in zip([r for r in requests if r.kept is not None], held):
            limit = group.reach.most_pages(plan.page_size, plan.max_context, 1)
            assert len(pages) <= limit or not group.reach.bounded, request


def _reason(scheduler: Scheduler, request: Request) -> str:
    if request.tokens[-1] in EOS and not request.params.ignore_eos:
        return "stop"
    if len(request.generated) == request.params.max_new_tokens:
        return "length"
    assert len(request.tokens) == scheduler.limit + 1
    return "context"


@pytest.fixture
def scheduler(fake_model: Make, make_plan: Make, make_facts: Make) -> Scheduler:
    return Scheduler(fake_model(make_plan(), make_facts()))


def test_youngest_gives_way_when_pages_run_out(fake_model: Make, make_plan: Make, make_facts: Make) -> None:
    scheduler = Scheduler(fake_model(make_plan(pages=6), make_facts()))
    params = SamplingParams(max_new_tokens=12, ignore_eos=True)
    first, second = (scheduler.add([i] * 8, params) for i in range(2))
    finished = [u.request for _ in range(60) if scheduler.busy for u in scheduler.step() if u.finish_reason]
    assert finished == [first, second]
    assert scheduler.counters.preemptions >= 1
    assert len(second.generated) == 12


def test_a_failure_for_one_request_strands_no_other(
    fake_model: Make, make_plan: Make, make_facts: Make
) -> None:
    """What was chosen before it is told with the next step; the others are computed again."""
    scheduler = Scheduler(fake_model(make_plan(), make_facts()))
    params, failing = SamplingParams(max_new_tokens=3, ignore_eos=True), [True]

    def stopped(_: int) -> bool:
        if failing[0]:
            raise RuntimeError("no")
        return False

    first = scheduler.add([1, 2], params)
    bad = scheduler.add([3, 4], params, stopped=stopped)
    last = scheduler.add([5, 6], params)
    with pytest.raises(RuntimeError, match="no"):
        scheduler.step()
    scheduler.cancel(bad.id)
    updates = [update for _ in range(20) if scheduler.busy for update in scheduler.step()]
    assert [u.request for u in updates if u.finish_reason] == [bad, first, last]
    for request in (first, last):
        expected = scheduler.model.unbatched(request.tokens[:2], params, frozenset())
        assert [u.token for u in updates if u.request is request] == expected
    assert scheduler.state.pools[0].used == 0


def test_a_request_without_a_next_token_stops_no_other(
    fake_model: Make, make_plan: Make, make_facts: Make
) -> None:
    """The others get theirs in the same step; the reason is raised, and the request is computed again."""

    class Broken(fake_model):  # type: ignore[misc]
        broken = True

        def logits(self, history: Sequence[Sequence[int]]) -> Any:
            row = super().logits(history)
            return row * float("nan") if self.broken and list(history[0]) == [3, 4] else row

    model = Broken(make_plan(), make_facts())
    scheduler = Scheduler(model)
    params = SamplingParams(max_new_tokens=3, ignore_eos=True, temperature=1.0, seed=7)
    requests = [scheduler.add(prompt, params) for prompt in ([1, 2], [3, 4], [5, 6])]
    with pytest.raises(Error, match="largest logit"):
        scheduler.step()
    assert [len(request.generated) for request in requests] == [1, 0, 1]
    model.broken = False
    updates = [update for _ in range(20) if scheduler.busy for update in scheduler.step()]
    assert len(updates) == 9
    for request in requests:
        assert request.generated == model.unbatched(request.tokens[:2], params, frozenset())


def test_a_long_prompt_does_not_stop_others_from_decoding(scheduler: Scheduler) -> None:
    params = SamplingParams(max_new_tokens=20, ignore_eos=True)
    first = scheduler.add([1], params)
    scheduler.step()
    scheduler.add([2] * 30, params)
    for step in range(3):  # 30 tokens take 4 prefill calls
        assert [u.request for u in scheduler.step()] == [first], step


def test_several_prompts_share_one_prefill(scheduler: Scheduler) -> None:
    for length in (3, 3, 2, 1):
        scheduler.add([1] * length, SamplingParams(max_new_tokens=5, ignore_eos=True))
    assert len(scheduler.step()) == 3  # max_batch; 8 tokens fill the chunk
    assert (scheduler.running, scheduler.waiting) == (3, 1)


def test_stop_callback_ends_a_request(scheduler: Scheduler) -> None:
    seen: list[int] = []

    def stopped(token: int) -> bool:
        seen.append(token)
        return len(seen) == 2

    request = scheduler.add([5], SamplingParams(ignore_eos=True), stopped=stopped)
    while scheduler.busy:
        scheduler.step()
    assert (request.finish_reason, request.generated) == ("stop", seen)
    assert len(seen) == 2


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "prompt is empty"),
        ([1] * 33, "the prompt has 33 tokens; one request may have at most 32"),
        ([1, 23], r"token id 23 does not exist: the model has 0 \.\. 22"),
        ([-1], "token id -1 does not exist"),
        ([1.0], "token ids are integers, not 1.0"),
        ([True], "token ids are integers, not True"),
    ],
)
def test_prompts_that_cannot_be_served(scheduler: Scheduler, prompt: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        scheduler.add(prompt, SamplingParams())
    assert not scheduler.busy


@pytest.mark.parametrize("changes", [{"pages": 2}, {"max_context": 8}, {"context": 8}])
def test_limit_is_the_smallest_of_pages_plan_and_model(
    fake_model: Make, make_plan: Make, make_facts: Make, changes: dict[str, int]
) -> None:
    facts = make_facts(context=changes.pop("context", None))
    scheduler = Scheduler(fake_model(make_plan(**changes), facts))
    scheduler.check([1] * 8)
    with pytest.raises(InputError, match="at most 8"):
        scheduler.check([1] * 9)


def test_cancel_of_what_is_not_there(scheduler: Scheduler) -> None:
    assert not scheduler.cancel(7)
    request = scheduler.add([1], SamplingParams())
    assert scheduler.cancel(request.id)
    assert [u.finish_reason for u in scheduler.step()] == ["cancelled"]
    assert not scheduler.cancel(request.id)
    assert request.generated == []
