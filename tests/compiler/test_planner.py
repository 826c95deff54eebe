"""The promise: every byte counted, the smallest budget named, what is left turned into pages."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvc import planner
from kvc.planner import Costs, make_plan
from kvc.runtime.executor import input_shapes
from kvc_passes.errors import BudgetError, InputError
from kvc_passes.facts import AttentionSite, MaskFact, ModelFacts, Workload

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
    values |= {"runtime": 5 * MIB, "arena": lambda chunk, batch: 4096 * chunk + 512 * batch}
    values |= {"page_size": 16, "tile": 4, "chunks": CHUNKS}
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
    shapes = input_shapes(plan)
    counted = 0
    for dtype, shape in shapes.values():
        size = widths[dtype]
        for extent in shape:
            size *= extent
        counted += -(-size // 64) * 64
    assert b.tables == counted
    assert shapes["table_0"][1] == (plan.max_batch, -(-plan.max_context // 16))
    assert b.outputs >= plan.max_batch * 512 * 4


def test_the_workload_decides_batch_and_least_pages() -> None:
    plan = make_plan(costs(), 64 * MIB, (Workload(3, 33), Workload(1, 200)))
    assert plan.max_batch == 3
    assert plan.groups[0].pages >= max(3 * 3, 13)
    assert plan.workload == (Workload(3, 33), Workload(1, 200))


def test_the_largest_chunk_that_fits_is_taken() -> None:
    big = costs(arena=lambda chunk, batch: chunk * 100_000)
    base = make_plan(costs(arena=lambda chunk, batch: 0), 64 * MIB, (Workload(1, 1024),))
    rest = base.bytes.total - base.bytes.arena - (base.groups[0].pages - 64) * base.groups[0].page_bytes
    for chunk in CHUNKS:
        plan = make_plan(big, rest + chunk * 100_000 + 8192, (Workload(1, 1024),))
        assert plan.chunk == chunk


def test_no_chunk_is_much_larger_than_the_workload() -> None:
    assert make_plan(costs(), 64 * MIB, (Workload(1, 20),)).chunk == 32
    assert make_plan(costs(), 64 * MIB, (Workload(1, 60),)).chunk == 64
    assert make_plan(costs(), 64 * MIB, (Workload(8, 1000),)).chunk == 512
    assert make_plan(costs(), 64 * MIB, (Workload(1, 1),)).chunk == min(CHUNKS)


def test_what_is_left_becomes_pages_up_to_the_models_context() -> None:
    small = make_plan(costs(), 9 * MIB, SMALL)
    larger = make_plan(costs(), 9 * MIB + 10 * (small.groups[0].page_bytes + 64), SMALL)
    assert larger.groups[0].pages == small.groups[0].pages + 10
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
    return costs(
        facts=facts(draw(st.sampled_from([None, 64, 100, 2048])), draw(st.integers(1, 4))),
        weights=draw(st.integers(0, 10**8)),
        runtime=draw(st.integers(0, 10**8)),
        arena=lambda chunk, batch: chunk * per_token + batch * per_sequence,
        page_size=draw(st.sampled_from([8, 16, 32])),
        tile=draw(st.sampled_from([1, 4, 8])),
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
