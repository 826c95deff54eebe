"""Every byte under one budget: the chunk, the pages, and the refusal with the smallest budget that works."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final, Protocol

from kvc_passes.errors import BudgetError, InputError
from kvc_passes.facts import ModelFacts
from kvc_passes.plans import Bytes, EncoderPlan, Plan, StateGroup, Workload
from kvc_passes.sites import AttentionSite, Reach

from ..options import format_size
from ..runtime.encoder import encoder_bytes
from ..runtime.sizes import choice_bytes, logits_bytes, pool_bytes, table_bytes

LONGEST: Final = 1 << 30
"""Tokens; positions are computed with 32 bits."""
MOST_REQUESTS: Final = 1 << 16
_VARIATION: Final = 1 << 20
"""Bytes by which the process measures differently from run to run: a budget named in a refusal must work."""


class EncoderCosts(Protocol):
    """What an encoder costs in the same artifact."""

    def workspace(self, workload: tuple[Workload, ...]) -> int:
        """Bytes that its kernels allocate for themselves, on all threads."""

    def plan(self, workload: tuple[Workload, ...]) -> EncoderPlan:
        """Its part of a plan. Raises InputError where the workload has no room for any output."""


@dataclass(frozen=True)
class Costs:
    """What a model costs before a budget is known.

    Attributes:
        facts: the proved model.
        target: what code is generated for.
        chunks: prefill chunks that are tried, in tokens, the best first.
        weights: bytes of the weights as they are stored.
        runtime: bytes of the process itself.
        arena: bytes of temporaries for (chunk, batch, tokens of a slice or 0), the most of all functions.
        workspaces: bytes of kernels' local buffers, on all threads.
        slices: for (chunk, batch) the slices of feed-forward parts that are worth trying, in tokens: fewer
            and fewer, each with less alive.
        page_size: tokens a page.
        tile: query tokens of one prefill task in calls of so many tokens.
        keys_transposed: how a page holds its keys.
        encoder: of the encoder, if there is one.
    """

    facts: ModelFacts
    target: dict[str, Any]
    chunks: tuple[int, ...]
    weights: int
    runtime: int
    arena: Callable[[int, int, int], int]
    page_size: int
    tile: Callable[[int], int]
    keys_transposed: bool = True
    workspaces: int = 0
    slices: Callable[[int, int], tuple[int, ...]] = lambda chunk, batch: ()
    encoder: EncoderCosts | None = None


def make_plan(costs: Costs, budget: int, workload: tuple[Workload, ...]) -> Plan:
    """The largest chunk within `budget` bytes, in slices where it must be, and what is left as pages.

    Raises:
        InputError: the workload asks for more context than the model has.
        BudgetError: no plan fits; says what is needed and what was given.
    """
    check_workload(costs.facts, workload)
    for chunk, ffn in calls(costs, workload):
        plan = planned(costs, budget, workload, chunk, ffn)
        if plan is not None:
            return plan
    raise refused(costs, budget, workload)


def planned(
    costs: Costs, budget: int, workload: tuple[Workload, ...], chunk: int, ffn: int = 0
) -> Plan | None:
    """The plan with one prefill chunk and its slices, what is left as pages; None if it does not fit."""
    draft = Draft(costs, budget, workload, chunk, ffn)
    if draft.smallest().bytes.total > budget:
        return None
    plan = draft.filled()
    return replace(plan, capacities=capacities(costs, plan))


def refused(costs: Costs, budget: int, workload: tuple[Workload, ...]) -> BudgetError:
    """Why nothing fits, with the smallest budget that works."""
    plans = [Draft(costs, budget, workload, *call).smallest() for call in calls(costs, workload)]
    least = min(plans, key=lambda p: p.bytes.total)
    needed = least.bytes.total + _VARIATION
    return BudgetError(_refusal(least, needed, workload), needed=needed, given=budget)


def check_workload(facts: ModelFacts, workload: tuple[Workload, ...]) -> None:
    """Raises InputError for one that the model cannot serve, whatever the budget is."""
    limit = facts.context
    for w in workload:
        if facts.reads_memory and not w.memory:
            raise InputError(
                f"the model reads an encoder's output: say how many rows of it a request has, as {w}+1500"
            )
        if w.memory and not facts.reads_memory:
            raise InputError(f"the workload {w} has rows of an encoder's output; the model reads none")
        if limit is not None and w.context > limit:
            raise InputError(
                f"the workload {w} asks for {w.context} tokens of context; the model has {limit} positions"
            )


def capacities(costs: Costs, plan: Plan) -> tuple[Workload, ...]:
    """The longest context of one request, and the most requests of each of the workload's contexts."""

    def context_fits(context: int) -> bool:
        return fits(costs, plan.budget, Workload(1, context, memory=plan.max_memory))

    def batch_fits(one: Workload, batch: int) -> bool:
        return fits(costs, plan.budget, replace(one, batch=batch))

    alone = Workload(1, most_of(costs.facts.context or LONGEST, context_fits), memory=plan.max_memory)
    kinds = dict.fromkeys(replace(w, batch=1) for w in plan.workload)
    most = (replace(w, batch=most_of(MOST_REQUESTS, partial(batch_fits, w))) for w in kinds)
    return (alone, *most)


def fits(costs: Costs, budget: int, workload: Workload) -> bool:
    """Whether some chunk serves it within a budget."""
    chunks = useful_chunks(costs.chunks, (workload,))[::-1]
    found = [(chunk, 0) for chunk in chunks]
    # In slices the smallest chunk takes least, too.
    found[1:1] = [(chunks[0], ffn) for ffn in costs.slices(chunks[0], workload.batch)[-1:]]
    return any(Draft(costs, budget, (workload,), *call).smallest().bytes.total <= budget for call in found)


def most_of(limit: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to `limit` that fits, where all smaller ones do; 0 if none does."""
    low, high = 0, 1
    while high <= limit and fits(high):
        low, high = high, 2 * high
    high = min(high, limit + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def useful_chunks(chunks: tuple[int, ...], workload: tuple[Workload, ...]) -> list[int]:
    """Chunks worth trying: none beyond what the workload can have in flight."""
    most = max(w.batch * w.context for w in workload)
    useful = [c for c in chunks if c < 2 * most]
    return useful or [chunks[-1]]


def calls(costs: Costs, workload: tuple[Workload, ...]) -> list[tuple[int, int]]:
    """Prefill chunks worth trying, each whole (0) and in slices, in tokens."""
    batch = max(w.batch for w in workload)
    chunks = useful_chunks(costs.chunks, workload)
    return [(chunk, ffn) for chunk in chunks for ffn in (0, *costs.slices(chunk, batch))]


@dataclass(frozen=True)
class Draft:
    """Plans with one prefill chunk, feed-forward parts whole (0) or in slices of `ffn` tokens."""

    costs: Costs
    budget: int
    workload: tuple[Workload, ...]
    chunk: int
    ffn: int = 0

    def smallest(self) -> Plan:
        """No more pages than the workload needs."""
        return self.with_pages(self._pages(self.workload), max(w.context for w in self.workload))

    def filled(self) -> Plan:
        """What the budget leaves makes the workload's contexts longer, all in the same proportion."""
        longest = max(w.context for w in self.workload)
        limit = self.costs.facts.context

        def grown(more: int) -> Plan:
            longer = [w.context + -(-more * w.context // longest) for w in self.workload]
            capped = [min(context, limit or context) for context in longer]
            workload = [replace(w, context=context) for w, context in zip(self.workload, capped)]
            # A window's pages may be fewer for longer contexts, of which a chunk holds fewer whole ones.
            return self.with_pages(self._pages([*self.workload, *workload]), max(capped))

        def fits(more: int) -> bool:
            return grown(more).bytes.total <= self.budget

        # Where every reach is bounded and the model has no limit, contexts could grow for ever.
        most = 0 if all(r.bounded or r.memory for r, _ in self.costs.facts.groups()) else LONGEST
        if limit is not None:
            most = max(-(-limit * longest // w.context) for w in self.workload)
        return self._with_rest(grown(most_of(most, fits)))

    def _with_rest(self, plan: Plan) -> Plan:
        """Less than a page for every request is left: it becomes pages of the layers that keep all tokens."""
        pages = [group.pages for group in plan.groups]
        whole = next(
            (i for i, g in enumerate(plan.groups) if not g.reach.bounded and not g.reach.memory), None
        )
        if whole is None:
            return plan

        def more(count: int) -> Plan:
            return self.with_pages([n + count * (i == whole) for i, n in enumerate(pages)], plan.max_context)

        limit, size = self.costs.facts.context, self.costs.page_size
        most = LONGEST if limit is None else plan.max_batch * -(-limit // size) - pages[whole]
        return more(most_of(most, lambda count: more(count).bytes.total <= self.budget))

    def _pages(self, workload: Sequence[Workload]) -> list[int]:
        """Pages of every group, such that each alternative of the workload fits on its own."""
        size = self.costs.page_size
        return [
            max(_pages_of(reach, w, size, self.chunk) for w in workload)
            for reach, _ in self.costs.facts.groups()
        ]

    def with_pages(self, pages: Sequence[int], context: int) -> Plan:
        """The plan with so many pages in each group.

        context: what a sequence may have where no layer keeps all tokens; else its pages say that.
        """
        costs, size = self.costs, self.costs.page_size
        batch = max(w.batch for w in self.workload)
        groups = tuple(
            StateGroup(
                sites=tuple(site.index for site in sites),
                reach=reach,
                form=_form(sites),
                page_bytes=sum(site.token_bytes() for site in sites) * size,
                pages=count,
            )
            for (reach, sites), count in zip(costs.facts.groups(), pages, strict=True)
        )
        draft = Plan(
            budget=self.budget,
            workload=self.workload,
            target=costs.target,
            page_size=size,
            groups=groups,
            chunk=self.chunk,
            tile=costs.tile(self.chunk),
            keys_transposed=costs.keys_transposed,
            max_batch=batch,
            max_context=_context(groups, size, context, costs.facts.context),
            bytes=Bytes(0, 0, 0, 0, 0, 0),
            max_memory=max(w.memory for w in self.workload),
            ffn_chunk=self.ffn,
            encoder=None if costs.encoder is None else costs.encoder.plan(self.workload),
        )
        weights, workspaces = costs.weights, costs.workspaces
        arena = costs.arena(self.chunk, batch, self.ffn)
        if costs.encoder is not None and draft.encoder is not None:
            weights, arena = weights + draft.encoder.weights, max(arena, draft.encoder.arena)
            workspaces += costs.encoder.workspace(self.workload)
        counted = Bytes(
            weights=weights,
            pools=pool_bytes(draft, costs.facts),
            tables=table_bytes(draft, costs.facts),
            arena=arena,
            outputs=logits_bytes(draft, costs.facts) + choice_bytes(draft, costs.facts),
            runtime=costs.runtime,
            workspaces=workspaces,
            encoder=encoder_bytes(draft, costs.facts),
        )
        return replace(draft, bytes=counted)


def _form(sites: Sequence[AttentionSite]) -> str:
    """The forms of a group, in words, with the number of layers where there are several."""
    counts = Counter(site.form for site in sites)
    if len(counts) == 1:
        return next(iter(counts))
    return "; ".join(f"{form} ({count} layers)" for form, count in counts.items())


def _context(groups: Sequence[StateGroup], size: int, context: int, limit: int | None) -> int:
    """Most tokens of one sequence that has all pages of all groups to itself."""
    limits = [] if limit is None else [limit]
    groups = [group for group in groups if not group.reach.memory]
    for group in groups:
        endless = group.reach.bounded and group.pages >= group.reach.most_pages(size, LONGEST, 1)
        limits += [] if endless else [group.pages * size]
    if all(group.reach.bounded for group in groups):
        limits.append(context)
    return min(limits)


def _pages_of(reach: Reach, workload: Workload, size: int, chunk: int) -> int:
    """Pages that a workload holds at once in a group, when a call computes a chunk of a request."""
    batch, context = workload.batch, workload.context
    if reach.memory:
        return batch * -(-workload.memory // size)
    between = reach.most_pages(size, context, 1)
    if not reach.bounded:
        shared = workload.prefix // size
        return shared + batch * (between - shared)
    # A call may compute some requests whole, and a part of one more.
    whole = min(batch, chunk // context)
    pages = whole * reach.most_pages(size, context, context)
    if whole < batch:
        part = max(1, chunk - whole * context)
        pages += reach.most_pages(size, context, part) + (batch - whole - 1) * between
    return pages


def _refusal(least: Plan, needed: int, workload: tuple[Workload, ...]) -> str:
    b = least.bytes
    tokens = max(group.pages for group in least.groups if not group.reach.memory) * least.page_size
    rows = sum(group.pages for group in least.groups if group.reach.memory) * least.page_size
    beside = f" and {rows} rows of encoders' output" if rows else ""
    slices = f" and feed-forward in slices of {least.ffn_chunk}" if least.ffn_chunk else ""
    encoder = [f"the encoder's inputs {format_size(b.encoder)}"] if least.encoder else []
    parts = [
        f"weights {format_size(b.weights)}",
        f"KV pages {format_size(b.pools)} for {tokens} tokens{beside}",
        f"temporaries {format_size(b.arena + b.workspaces)} with chunks of {least.chunk} tokens{slices}",
        f"logits and tables {format_size(b.outputs + b.tables)}",
        *encoder,
        f"the process {format_size(b.runtime)}",
    ]
    return (
        f"the budget of {least.budget} bytes ({format_size(least.budget)}) cannot hold the workload "
        f"{','.join(map(str, workload))}: it needs {needed} bytes ({format_size(needed)}), "
        f"the smallest budget that works: {', '.join(parts)}"
    )
