"""What permissions that were not given would buy, weighed without lowering anything again."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from kvc_passes.errors import InputError
from kvc_passes.plans import Plan, Workload
from kvc_passes.sites import CODES, AttentionSite
from kvc_passes.state_forms import UNASKED

from ..permissions import parse_permissions
from .budget import LONGEST, Costs, Draft, fits, most_of
from .decide import Decision, Planner
from .mixes import Chosen, Variant

_TRIED: Final = (*CODES, "window=4096,sinks=4")


@dataclass(frozen=True)
class Gain:
    """What a permission would buy."""

    allow: str
    saved: int
    """Bytes less for the same workload and chunk, where all layers use it."""
    context: int
    """Most tokens of one request within the budget, instead of the plan's."""
    seconds: float
    """Predicted, of the plan that the budget would have then."""


def gains(planner: Planner, decision: Decision) -> tuple[Gain, ...]:
    """Of permissions that were not given."""
    if planner.forced:
        return ()
    plan, found = decision.plan, []
    now = _smallest(decision.variant.costs, plan)
    for text in _TRIED:
        tried = _with_codes(planner, text) if text in CODES else _with_window(planner, decision, text)
        if tried is None:
            continue
        other, known, variant = tried
        then, context = _smallest(variant.costs, plan), _longest_alone(variant.costs, plan)
        best = other.estimate(plan.budget, plan.workload, known)
        seconds = plan.seconds if best is None else min(best.seconds, plan.seconds)
        if then < now:
            found.append(Gain(text, now - then, context, seconds))
    return tuple(found)


def _with_codes(planner: Planner, name: str) -> tuple[Planner, list[Chosen], Variant] | None:
    """The planner with one more form, what it chooses from, and the form in all layers; None if none may."""
    forms = planner.model.facts.forms
    asked = [[f for f in own if f.name == name and f.detail.endswith(UNASKED)] for own in forms]
    if not any(asked):
        return None
    chosen = tuple(replace(own[0], legal=True) if own else each[0] for own, each in zip(asked, forms))
    plain = planner.variant(tuple(each[0] for each in forms))
    pairs = zip(plain.model.facts.sites, asked, strict=True)
    sites = tuple(replace(site, stored=CODES[own[0].name]) if own else site for site, own in pairs)
    variant = _derived(planner, plain, sites, planner.model.facts.sites)
    return planner.assuming({chosen: variant}), [*planner.usual(), chosen], variant


def _with_window(
    planner: Planner, decision: Decision, text: str
) -> tuple[Planner, list[Chosen], Variant] | None:
    """The planner with other masks, what it chooses from, and the plan's own layers; None if no mask may."""
    permissions, page, known = parse_permissions(text), decision.plan.page_size, planner.usual()

    def windowed(variant: Variant) -> Variant:
        sites = permissions.applied(variant.model.facts.sites, page)
        return _derived(planner, variant, sites, permissions.applied(planner.model.facts.sites, page))

    try:
        other = planner.assuming({chosen: windowed(planner.variant(chosen)) for chosen in known})
        return other, known, windowed(decision.variant)
    except InputError:
        return None


def _derived(
    planner: Planner, variant: Variant, sites: tuple[AttentionSite, ...], graph: tuple[AttentionSite, ...]
) -> Variant:
    """A variant with other sites, all else as it is: near what lowering it would say."""
    attention = variant.lowered.attention
    clocks = tuple(planner.site_of(kept, plain, attention) for kept, plain in zip(sites, graph, strict=True))
    facts = replace(variant.model.facts, sites=sites)
    return replace(
        variant,
        model=replace(variant.model, facts=facts),
        costs=replace(variant.costs, facts=facts),
        clock=replace(variant.clock, sites=clocks),
    )


def _smallest(costs: Costs, plan: Plan) -> int:
    return Draft(costs, plan.budget, plan.workload, plan.chunk, plan.ffn_chunk).smallest().bytes.total


def _longest_alone(costs: Costs, plan: Plan) -> int:
    def within(context: int) -> bool:
        return fits(costs, plan.budget, Workload(1, context, memory=plan.max_memory))

    return most_of(costs.facts.context or LONGEST, within)
