"""Every byte under one budget: the chunk, the pages, and the refusal with the smallest budget that works."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kvc_passes.errors import BudgetError, InputError
from kvc_passes.facts import Bytes, ModelFacts, Plan, Workload

from .options import format_size
from .runtime.executor import logits_bytes, pool_bytes, table_bytes
from .runtime.sampler import scratch_bytes

_VARIATION = 1 << 20
"""Bytes by which the process measures differently from run to run: a budget named in a refusal must work."""


@dataclass(frozen=True)
class Costs:
    """What a model costs before a budget is known.

    Attributes:
        facts: the proved model.
        target: what code is generated for.
        chunks: prefill chunks that are tried, in tokens, the best first.
        weights: bytes of the weights as they are stored.
        runtime: bytes of the process itself.
        arena: bytes of temporaries for (chunk, batch), the larger of prefill and decode.
        page_size: tokens a page.
        tile: query tokens of one prefill task.
        keys_transposed: how a page holds its keys.
    """

    facts: ModelFacts
    target: dict[str, Any]
    chunks: tuple[int, ...]
    weights: int
    runtime: int
    arena: Callable[[int, int], int]
    page_size: int
    tile: int
    keys_transposed: bool = True


def make_plan(costs: Costs, budget: int, workload: tuple[Workload, ...]) -> Plan:
    """The fastest plan within `budget` bytes: the largest chunk that fits, what is left as pages.

    Raises:
        InputError: the workload asks for more context than the model has.
        BudgetError: no plan fits; says what is needed and what was given.
    """
    limit = costs.facts.context
    for w in workload:
        if limit is not None and w.context > limit:
            raise InputError(
                f"the workload {w} asks for {w.context} tokens of context; the model has {limit} positions"
            )
    plans = []
    for chunk in _chunks(costs.chunks, workload):
        plans.append(_smallest(costs, budget, workload, chunk))
        if plans[-1].bytes.total <= budget:
            return _fill(costs, plans[-1])
    least = min(plans, key=lambda p: p.bytes.total)
    needed = least.bytes.total + _VARIATION
    raise BudgetError(_refusal(least, needed, workload), needed=needed, given=budget)


def _chunks(chunks: tuple[int, ...], workload: tuple[Workload, ...]) -> list[int]:
    """Chunks worth trying: none beyond what the workload can have in flight."""
    most = max(w.batch * w.context for w in workload)
    useful = [c for c in chunks if c < 2 * most]
    return useful or [chunks[-1]]


def _smallest(costs: Costs, budget: int, workload: tuple[Workload, ...], chunk: int) -> Plan:
    """The plan with no more pages than the workload needs."""
    batch = max(w.batch for w in workload)
    pages = max(w.batch * -(-w.context // costs.page_size) for w in workload)
    return _plan(costs, budget, workload, chunk, batch, pages)


def _plan(
    costs: Costs, budget: int, workload: tuple[Workload, ...], chunk: int, batch: int, pages: int
) -> Plan:
    context = pages * costs.page_size
    if costs.facts.context is not None:
        context = min(context, costs.facts.context)
    draft = Plan(
        budget=budget,
        workload=workload,
        target=costs.target,
        page_size=costs.page_size,
        page_bytes=costs.facts.kv_token_bytes() * costs.page_size,
        pages=pages,
        chunk=chunk,
        tile=costs.tile,
        keys_transposed=costs.keys_transposed,
        max_batch=batch,
        max_context=context,
        bytes=Bytes(0, 0, 0, 0, 0, 0),
    )
    counted = Bytes(
        weights=costs.weights,
        pools=pool_bytes(draft, costs.facts),
        tables=table_bytes(draft),
        arena=costs.arena(chunk, batch),
        outputs=logits_bytes(draft, costs.facts) + scratch_bytes(costs.facts.logits),
        runtime=costs.runtime,
    )
    return Plan(**{**draft.__dict__, "bytes": counted})


def _fill(costs: Costs, plan: Plan) -> Plan:
    """Turn what the budget leaves into pages, as far as the model's context can use them."""
    most = plan.pages + (plan.budget - plan.bytes.total) // plan.page_bytes
    if costs.facts.context is not None:
        most = min(most, plan.max_batch * -(-costs.facts.context // plan.page_size))
    pages = max(most, plan.pages)
    while True:
        larger = _plan(costs, plan.budget, plan.workload, plan.chunk, plan.max_batch, pages)
        if larger.bytes.total <= plan.budget or pages == plan.pages:
            return larger
        over = larger.bytes.total - plan.budget  # a longer context widens the tables
        pages = max(plan.pages, pages - max(1, over // plan.page_bytes))


def _refusal(least: Plan, needed: int, workload: tuple[Workload, ...]) -> str:
    b = least.bytes
    parts = [
        f"weights {format_size(b.weights)}",
        f"KV pages {format_size(b.pools)} for {least.pages * least.page_size} tokens",
        f"temporaries {format_size(b.arena)} with chunks of {least.chunk} tokens",
        f"logits and tables {format_size(b.outputs + b.tables)}",
        f"the process {format_size(b.runtime)}",
    ]
    return (
        f"the budget of {least.budget} bytes ({format_size(least.budget)}) cannot hold the workload "
        f"{','.join(map(str, workload))}: it needs {needed} bytes ({format_size(needed)}), "
        f"the smallest budget that works: {', '.join(parts)}"
    )
