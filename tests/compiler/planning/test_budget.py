"""The promise: every byte counted, the smallest budget named, what is left turned into pages."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvc.planning import budget as planner
from kvc.planning.budget import Costs, Draft, make_plan
from kvc.runtime.sizes import input_shapes
from kvc_passes.errors import BudgetError, InputError
from kvc_passes.facts import ModelFacts
from kvc_passes.plans import Plan, Workload
from kvc_passes.sites import AttentionSite, MaskFact, Reach

MIB = 1 << 20
CHUNKS = (512, 256, 128, 64, 32)
SLACK = getattr(planner, "_VARIATION", 0)
"""Bytes that a refusal recommends beyond what was counted, for measurements that differ between runs."""


def facts(context: int | None = 1024, layers: int = 2, heads: int = 2, dim: int = 16) -> ModelFacts:
    sites = tuple(
        AttentionSite(i, f"n{i}", 4, heads, dim, dim, 0.25, None, MaskFact("causal", None, "given"), None)
        for i in range(layers)
    )
    return ModelFacts("m", 500, 512, context, sites, (), {}, 1)


def costs(**changes: Any) -> Costs:
    values: dict[str, Any] = {"facts": facts(), "target": {"kind": "llvm"}, "weights": 3 * MIB}
    values |= {"runtime": 5 * MIB, "arena": lambda chunk, batch, ffn: 4096 * chunk + 512 * batch}
    values |= {"page_size": 16, "tile": lambda chunk: 4, "chunks": CHUNKS}
    return Costs(**values | changes)


SMALL = (Workload(2, 40),)


def test_the_promise_is_the_sum_of_its_lines() -> None:
    plan = make_plan(costs(), 64 * MIB, (Workload(2, 40), Workload(1, 100)))
    b = plan.bytes
    assert b.total == b.weights + b.pools + b.tables + b.arena + b.outputs + b.runtime
    assert b.total <= plan.budget == 64 * MIB
    assert (b.weights, b.runtime) == (3 * MIB, 5 * MIB)
    assert b.arena == 4096 * plan.chunk + 512 * plan.max_batch
    (group,) = plan.groups
    assert group.page_bytes == 2 * 2 * (16 + 16) * 4 * 16
    assert b.pools == group.pages * group.page_bytes
    widths = {"int64": 8, "int32": 4}
    shapes = input_shapes(plan, costs().facts)
    counted = 0
    for dtype, shape in shapes.values():
        size = widths[dtype]
        for extent in shape:
            size *= extent
        counted += -(-size // 64) * 64
    assert b.tables == counted + 256 * group.pages
    assert shapes["table_0"][1] == (plan.max_batch, -(-plan.max_context // 16))
    assert b.outputs >= plan.max_batch * 512 * 4


def test_the_workload_decides_batch_and_least_pages() -> None:
    plan = make_plan(costs(), 64 * MIB, (Workload(3, 33), Workload(1, 200)))
    assert plan.max_batch == 3
    assert plan.groups[0].pages >= max(3 * 3, 13)
    assert plan.workload == (Workload(3, 33), Workload(1, 200))


def test_the_largest_chunk_that_fits_is_taken() -> None:
    big = costs(arena=lambda chunk, batch, ffn: chunk * 100_000)
    base = make_plan(costs(arena=lambda chunk, batch, ffn: 0), 64 * MIB, (Workload(1, 1024),))
    rest = base.bytes.total - base.bytes.arena - (base.groups[0].pages - 64) * base.groups[0].page_bytes
    for chunk in CHUNKS:
        plan = make_plan(big, rest + chunk * 100_000 + 8192, (Workload(1, 1024),))
        assert plan.chunk == chunk


def test_a_chunk_is_cut_where_it_does_not_fit_whole() -> None:
    """And the smallest budget is that of the smallest slices."""
    made = costs(
        arena=lambda chunk, batch, ffn: (ffn or chunk) * 100_000 + chunk * 1000,
        slices=lambda chunk, batch: (chunk // 2, chunk // 4),
    )
    work = (Workload(1, 1024),)
    whole = make_plan(made, 1 << 30, work)
    assert (whole.chunk, whole.ffn_chunk) == (512, 0)
    least = Draft(made, 0, work, 512).smallest().bytes.total
    cut = make_plan(made, least - 1, work)
    assert (cut.chunk, cut.ffn_chunk, cut.bytes.arena) == (512, 256, 256 * 100_000 + 512 * 1000)
    with pytest.raises(BudgetError, match="chunks of 32 tokens and feed-forward in slices of 8") as refused:
        make_plan(made, 1, work)
    assert make_plan(made, refused.value.needed - SLACK, work).ffn_chunk == 8


def test_no_chunk_is_much_larger_than_the_workload() -> None:
    assert make_plan(costs(), 64 * MIB, (Workload(1, 20),)).chunk == 32
    assert make_plan(costs(), 64 * MIB, (Workload(1, 60),)).chunk == 64
    assert make_plan(costs(), 64 * MIB, (Workload(8, 1000),)).chunk == 512
    assert make_plan(costs(), 64 * MIB, (Workload(1, 1),)).chunk == min(CHUNKS)


def test_what_is_left_becomes_pages_up_to_the_models_context() -> None:
    small = make_plan(costs(), 9 * MIB, SMALL)
    larger = make_plan(costs(), 9 * MIB + 10 * (small.groups[0].page_bytes + 320), SMALL)
    assert larger.groups[0].pages - small.groups[0].pages in (10, 11)  # less than one was left before
    full = make_plan(costs(), 1 << 40, SMALL)
    assert full.groups[0].pages == 2 * 1024 // 16
    assert full.max_context == 1024
    assert full.bytes.total < 64 * MIB


def test_a_model_without_a_limit_takes_all_pages() -> None:
    unbounded = costs(facts=facts(context=None))
    plan = make_plan(unbounded, 64 * MIB, SMALL)
    assert 64 * MIB - plan.bytes.total < 2 * plan.groups[0].page_bytes
    assert plan.max_context == plan.groups[0].pages * 16


@pytest.mark.parametrize("workload", [Workload(1, 1025), Workload(8, 2000)])
def test_more_context_than_the_model_has_is_refused(workload: Workload) -> None:
    with pytest.raises(
        InputError, match=rf"{workload} asks for {workload.context} tokens .* has 1024 positions"
    ):
        make_plan(costs(), 1 << 40, (Workload(1, 16), workload))


def test_the_models_whole_context_is_served() -> None:
    plan = make_plan(costs(facts=facts(context=1000)), 64 * MIB, (Workload(1, 1000),))
    assert plan.max_context == 1000
    assert plan.table_width == 63


def test_a_refusal_says_what_takes_the_memory() -> None:
    with pytest.raises(BudgetError) as refused:
        make_plan(costs(), 6 * MIB, SMALL)
    text = str(refused.value)
    for part in ("2x40", "weights 3.1 MB", "KV pages", "96 tokens", "the process 5.2 MB", "smallest budget"):
        assert part in text
    assert refused.value.given == 6 * MIB
    assert str(refused.value.needed) in text


@st.composite
def _costs(draw: st.DrawFn) -> Costs:
    per_token, per_sequence = draw(st.integers(0, 10**5)), draw(st.integers(0, 10**5))
    tile = draw(st.sampled_from([1, 4, 8]))
    wide, most = draw(st.integers(0, 10**5)), draw(st.integers(1, 4))  # of feed-forward parts, in slices
    return costs(
        facts=facts(draw(st.sampled_from([None, 64, 100, 2048])), draw(st.integers(1, 4))),
        weights=draw(st.integers(0, 10**8)),
        runtime=draw(st.integers(0, 10**8)),
        arena=lambda chunk, batch, ffn: chunk * per_token + batch * per_sequence + (ffn or chunk) * wide,
        slices=lambda chunk, batch: tuple(chunk >> k for k in range(1, most) if chunk >> k >= 8),
        page_size=draw(st.sampled_from([8, 16, 32])),
        tile=lambda chunk: tile,
    )


_workloads = st.lists(st.builds(Workload, st.integers(1, 20), st.integers(1, 64)), min_size=1, max_size=3)


@settings(deadline=None)
@given(_costs(), _workloads)
def test_the_budget_that_a_refusal_names_works_and_no_smaller_one(
    given_: Costs, workload: list[Workload]
) -> None:
    with pytest.raises(BudgetError) as refused:
        make_plan(given_, 1, tuple(workload))
    needed = refused.value.needed
    assert make_plan(given_, needed, tuple(workload)).bytes.total <= needed
    make_plan(given_, needed - SLACK, tuple(workload))
    with pytest.raises(BudgetError) as again:
        make_plan(given_, needed - SLACK - 1, tuple(workload))
    assert again.value.needed == needed


@settings(deadline=None)
@given(_costs(), _workloads, st.integers(0, 10**8))
def test_a_plan_holds_its_workload_within_its_budget(
    given_: Costs, workload: list[Workload], spare: int
) -> None:
    with pytest.raises(BudgetError) as refused:
        make_plan(given_, 1, tuple(workload))
    budget = refused.value.needed + spare
    plan = make_plan(given_, budget, tuple(workload))
    assert plan.bytes.total <= budget
    for w in workload:
        assert w.batch <= plan.max_batch
        assert w.context <= plan.max_context
        assert w.batch * -(-w.context // plan.page_size) <= plan.groups[0].pages
    unused, context = budget - plan.bytes.total, given_.facts.context
    if context is None or plan.groups[0].pages < plan.max_batch * -(-context // plan.page_size):
        assert (
            unused < 2 * plan.groups[0].page_bytes + plan.bytes.pools // 16
        )  # the tables widen with the pages


def mixed(context: int | None = 1 << 20, window: int = 128) -> ModelFacts:
    """Four layers: three see a window, one sees all."""
    near = MaskFact("window", window, "given")
    sites = facts(context, layers=4).sites
    sites = tuple(replace(s, mask=near) if s.index != 2 else s for s in sites)
    return replace(facts(context), sites=sites)


def least(costs: Costs, workload: Workload) -> Plan:
    """The plan of the smallest budget."""
    with pytest.raises(BudgetError) as refused:
        make_plan(costs, 1, (workload,))
    return make_plan(costs, refused.value.needed - SLACK, (workload,))


def test_layers_with_a_window_take_a_window_and_a_chunk() -> None:
    plan = make_plan(costs(facts=mixed(4096)), 40 * MIB, (Workload(1, 4096),))
    near, far = plan.groups
    assert (near.sites, far.sites) == ((0, 1, 3), (2,))
    assert near.page_bytes == 3 * far.page_bytes
    assert far.pages == 4096 // 16
    assert near.pages == Reach(window=128).most_pages(16, 4096, plan.chunk)
    assert near.pages <= (128 + plan.chunk) // 16 + 1
    assert plan.max_context == 4096
    assert plan.bytes.pools == sum(group.pages * group.page_bytes for group in plan.groups)


def test_a_smaller_chunk_also_makes_windows_smaller() -> None:
    big = make_plan(costs(facts=mixed(4096)), 1 << 40, (Workload(1, 4096),))
    small = least(costs(facts=mixed(4096)), Workload(1, 4096))
    assert (big.chunk, small.chunk) == (512, 32)
    assert small.groups[0].pages < big.groups[0].pages


def test_what_is_left_goes_to_all_groups_in_proportion_to_the_workload() -> None:
    """Windows are full long before contexts end, so what is left goes to the layers that see all."""
    small = make_plan(costs(facts=mixed()), 12 * MIB, (Workload(2, 64), Workload(1, 128)))
    large = make_plan(costs(facts=mixed()), 48 * MIB, (Workload(2, 64), Workload(1, 128)))
    most = 2 * Reach(window=128).most_pages(16, 1 << 20, large.chunk)
    assert small.groups[0].pages <= large.groups[0].pages <= most
    assert large.groups[1].pages > 4 * small.groups[1].pages
    for plan in (small, large):
        assert plan.budget - plan.bytes.total < 2 * plan.groups[1].page_bytes + plan.bytes.pools // 16


def test_a_sequence_is_no_longer_than_its_pages_and_its_windows_allow() -> None:
    """One request may have what was planned for several, but a window that is not whole cannot slide."""
    plan = least(costs(facts=mixed(window=1000)), Workload(2, 40))
    near, far = plan.groups
    assert near.pages < Reach(window=1000).most_pages(16, 1 << 20, 1)
    assert plan.max_context == min(near.pages, far.pages) * 16


@pytest.mark.parametrize("context", [4096, None])
def test_where_all_layers_have_windows_the_model_or_the_workload_limits_the_context(
    context: int | None,
) -> None:
    near = MaskFact("window", 64, "given")
    base = facts(context)
    windowed = replace(base, sites=tuple(replace(s, mask=near) for s in base.sites))
    plan = make_plan(costs(facts=windowed), 1 << 40, (Workload(2, 200),))
    assert plan.max_context == (context or 200)
    (group,) = plan.groups
    assert group.pages <= Reach(window=64).most_pages(16, 4096, 512) + Reach(window=64).most_pages(
        16, 4096, 1
    )


def test_a_common_prefix_is_counted_once() -> None:
    assert least(costs(), Workload(10, 160)).groups[0].pages == 100
    # Full pages are shared: 96 tokens.
    assert least(costs(), Workload(10, 160, 100)).groups[0].pages == 6 + 10 * 4
    assert least(costs(), Workload(1, 160, 100)).groups[0].pages == 10


def test_capacities_are_the_largest_that_a_plan_of_their_own_can_have() -> None:
    given_, budget = costs(facts=mixed()), 16 * MIB
    plan = make_plan(given_, budget, (Workload(2, 64), Workload(1, 128)))
    alone, *batches = plan.capacities
    assert [w.context for w in batches] == [64, 128]
    assert alone.batch == 1
    make_plan(given_, budget, (alone,))
    with pytest.raises(BudgetError):
        make_plan(given_, budget, (Workload(1, alone.context + 1),))
    for most in batches:
        make_plan(given_, budget, (most,))
        with pytest.raises(BudgetError):
            make_plan(given_, budget, (Workload(most.batch + 1, most.context),))


def test_capacities_end_at_the_models_context() -> None:
    plan = make_plan(costs(facts=facts(1000)), 1 << 40, (Workload(1, 10),))
    assert plan.capacities[0] == Workload(1, 1000)


@settings(deadline=None)
@given(
    st.builds(
        Reach, st.none() | st.integers(1, 60), st.none() | st.integers(1, 60), st.just(0) | st.integers(1, 20)
    ),
    st.sampled_from([1, 4, 16]),
    st.integers(1, 40),
    st.integers(1, 200),
)
def test_the_most_pages_of_a_reach(reach: Reach, page: int, step: int, context: int) -> None:
    """Against a count, for every place at which a call may begin."""
    if reach.window is not None and reach.chunk is not None:
        reach = replace(reach, chunk=None)
    most = 0
    for first in range(context):
        end = min(first + step, context)
        kept = {k // page for k in range(end) if k >= reach.oldest(first) or k < reach.sinks}
        most = max(most, len(kept))
    bound = reach.most_pages(page, context, step)
    assert most <= bound
    if reach.window is not None and not reach.sinks and context > reach.window + step + 2 * page:
        assert bound == most


def test_a_common_prefix_counts_in_capacities() -> None:
    plan = make_plan(costs(facts=facts(None)), 12 * MIB, (Workload(8, 1024, 1000),))
    _, most = plan.capacities
    assert (most.context, most.prefix) == (1024, 1000)
    assert most.batch >= 8
    make_plan(costs(facts=facts(None)), 12 * MIB, (most,))


def test_a_chunk_of_several_contexts_has_their_windows_whole() -> None:
    """16 requests of 40 tokens with a window of 32: a call of 512 computes twelve, and a part of one more."""
    given_ = costs(facts=mixed(window=32), chunks=(512,))
    near = least(given_, Workload(16, 40)).groups[0]
    whole, part = Reach(window=32).most_pages(16, 40, 40), Reach(window=32).most_pages(16, 40, 512 - 12 * 40)
    assert near.pages == 12 * whole + part + 3 * Reach(window=32).most_pages(16, 40, 1)


def test_longer_contexts_do_not_take_pages_from_the_workload() -> None:
    """A chunk of 512 computes two of 250 tokens and a part of a third, but just two of 256."""
    given_ = costs(facts=mixed(256, window=32), chunks=(512,))
    plan = make_plan(given_, 1 << 40, (Workload(32, 250),))
    assert plan.max_context == 256
    assert plan.groups[0].pages >= least(given_, Workload(32, 250)).groups[0].pages
