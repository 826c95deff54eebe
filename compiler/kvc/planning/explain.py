"""Why a plan is as it is, and what a byte more or less would buy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from tvm import IRModule

from kvc_passes.facts import StateForm
from kvc_passes.place_arena import Arena
from kvc_passes.plans import Plan, Workload, chunk_text
from kvc_passes.row_slices import Segment
from kvc_passes.sites import CODES
from kvc_passes.state_forms import LAST, UNJUDGED

from ..options import format_size
from .budget import LONGEST, MOST_REQUESTS, fits, most_of
from .decide import Decision, Planner, changes
from .gains import Gain, gains
from .mixes import PRICES, Chosen, Estimate

_POINTS: Final = 24


@dataclass(frozen=True)
class Point:
    """A plan on the curve of memory against time."""

    bytes: int
    """The smallest budget that it fits."""
    seconds: float
    """Predicted, of all alternatives of the workload."""
    chunk: int
    ffn: int
    """Tokens of a slice of feed-forward parts, 0 for the whole chunk."""
    forms: str
    """Forms with their numbers of layers."""


@dataclass(frozen=True)
class Explanation:
    """Everything that a person may ask of a plan."""

    reasons: tuple[tuple[str, str, str], ...]
    """(layers, form, why)"""
    curve: tuple[Point, ...]
    gains: tuple[Gain, ...]
    gap: float
    """How much more the plan costs, as a share, than the least that any choice could; see Estimate.cost."""
    codes: bool = False
    """Whether forms that change results were weighed."""
    slices: str = ""
    """Why feed-forward parts are in slices of a chunk, or whole."""

    @property
    def bound(self) -> str:
        """The gap in words."""
        what = "no choice is faster" + (", nor gains what codes have to" if self.codes else "")
        return f"{what}, by more than {self.gap:.2%}" if self.gap else f"{what}: gap 0%"


def explain(planner: Planner, decision: Decision) -> Explanation:
    """Reasons, the Pareto curve, what permissions would buy."""
    plan = decision.plan
    return Explanation(
        reasons=_reasons(planner, plan),
        curve=curve(planner, plan.workload),
        gains=gains(planner, decision),
        gap=decision.gap,
        codes=not planner.forced and any(map(changes, planner.usual())),
        slices=_slices(decision),
    )


def _slices(decision: Decision) -> str:
    plan, costs = decision.plan, decision.variant.costs
    whole = costs.arena(plan.chunk, plan.max_batch, 0)
    if plan.ffn_chunk:
        more = format_size(whole - plan.bytes.arena)
        return f"feed-forward in slices of {plan.ffn_chunk} tokens: whole, temporaries take {more} more"
    if not costs.slices(plan.chunk, plan.max_batch):
        return f"feed-forward whole: no slices of a chunk of {plan.chunk} make temporaries less"
    return "feed-forward whole: it fits, and slices would read weights more often"


def curve(planner: Planner, workload: tuple[Workload, ...]) -> tuple[Point, ...]:
    """The best plans that are faster than smaller ones, or change less, in ascending bytes; about _POINTS."""
    known = planner.usual()
    least, fastest = (planner.estimate(limit, workload, known) for limit in (None, LONGEST << 30))
    assert least is not None
    assert fastest is not None
    step = (fastest.bytes - least.bytes) / (_POINTS - 1)
    limits = [least.bytes + round(step * i) for i in range(_POINTS)]
    found = [planner.estimate(limit, workload, known) for limit in limits]
    points: list[Point] = []
    best: Estimate | None = None
    for each in found:
        if each is not None and _better(each, best):
            best = each
            points.append(Point(each.bytes, each.seconds, each.chunk, each.ffn, _forms(each)))
    return tuple(points)


def _better(one: Estimate, other: Estimate | None) -> bool:
    return other is None or one.seconds < other.seconds or _prices(one) < _prices(other)


def _prices(estimate: Estimate) -> float:
    return sum(PRICES.get(form.name, 0.0) for form in estimate.chosen)


def _forms(estimate: Estimate) -> str:
    counts = Counter(form.name for form in estimate.chosen)
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{name} x{count}" for name, count in counts.items())


def longest(planner: Planner, budget: int, batch: int, memory: int) -> int:
    """Most tokens of context that each of `batch` requests can have; 0 if even one token does not fit."""
    limit = planner.model.facts.context or LONGEST

    def most(chosen: Chosen) -> int:
        costs = planner.variant(chosen).costs
        return most_of(limit, lambda context: fits(costs, budget, Workload(batch, context, memory=memory)))

    return max(map(most, planner.usual()))


def most_requests(planner: Planner, budget: int, context: int, memory: int) -> int:
    """Most requests of `context` tokens at once; 0 if even one does not fit."""

    def most(chosen: Chosen) -> int:
        costs = planner.variant(chosen).costs
        return most_of(
            MOST_REQUESTS, lambda batch: fits(costs, budget, Workload(batch, context, memory=memory))
        )

    return max(map(most, planner.usual()))


def _reasons(planner: Planner, plan: Plan) -> tuple[tuple[str, str, str], ...]:
    """For layers alike: the form, and why it is no other."""
    from ..report import ranges

    changed = _why_changed(planner, plan)
    runs: dict[tuple[str, str], list[int]] = {}
    for site, name in enumerate(plan.forms):
        legal = [f for f in planner.model.facts.forms[site] if f.legal and f.name in planner.machine.forms]
        (own,) = [f for f in legal if f.name == name]
        others = [f for f in legal if f.token_bytes < own.token_bytes and f.name != LAST]
        smaller = [f for f in others if f.name not in CODES]
        if planner.forced:
            why = "asked for"
        elif name == LAST:
            why = "no other form fits; a step makes all keys and values again"
        elif name in CODES:
            why = f"{_share(planner, site, own):.2f} of the bytes of K and V, as it is allowed; {changed}"
        elif name != "paged_kv":
            share = _share(planner, site, own)
            why = f"{share:.2f} of the bytes of K and V; all layers as K and V would be slower or not fit"
        elif smaller:
            names = ", ".join(f"{f.name} ({f.token_bytes} bytes a token)" for f in smaller)
            why = f"it fits, and is predicted to be faster than {names}"
        else:
            why = _none_smaller(planner.model.facts.forms[site], own, planner.machine.forms)
        if not planner.forced and name not in CODES and len(others) > len(smaller):
            allowed = ", ".join(f.name for f in others if f.name in CODES)
            why += f"; {allowed}: allowed, and not needed here, nor would it gain what it has to"
        runs.setdefault((name, why), []).append(site)
    return tuple((ranges(sites), name, why) for (name, why), sites in runs.items())


def _share(planner: Planner, site: int, own: StateForm) -> float:
    """Of the bytes of K and V."""
    first = planner.model.facts.forms[site][0].token_bytes
    return own.token_bytes / first if first else 1.0


def _why_changed(planner: Planner, plan: Plan) -> str:
    """Why some layers may change results: what the best plan of exact layers would take."""
    if planner.forced or not set(plan.forms) & set(CODES):
        return ""
    exact = [chosen for chosen in planner.usual() if not changes(chosen)]
    other = planner.estimate(plan.budget, plan.workload, exact)
    if other is None:
        return "exact forms alone do not fit"
    longer = other.seconds / plan.seconds - 1
    return f"exact forms alone would take {longer:.0%} longer, as predicted"


def _none_smaller(forms: Sequence[StateForm], own: StateForm, usable: Sequence[str]) -> str:
    """Why there is no smaller exact form, as far as that is known."""
    last = any(f.name == LAST and f.legal and f.token_bytes < own.token_bytes for f in forms)
    none = f"no smaller form but {LAST}, for where nothing else fits," if last else "no smaller form"
    open_ = (f for f in forms if f.name in usable and f.detail.endswith(UNJUDGED))
    if any(f.token_bytes < own.token_bytes for f in open_):
        return f"{none} is known to be legal; keys alone were not measured: --state k_plus_r would"
    return f"{none} is legal (kvc inspect says why)"


def timeline(
    mod: IRModule, bounds: dict[str, int], segments: Sequence[Segment] = (), rows: int = 0
) -> list[int]:
    """Bytes of temporaries that are alive at each kernel call of a lowered function.

    segments: what runs for `rows` tokens after another, where that is not 0.
    """
    return Arena.of(mod, segments=segments if rows else ()).alive(bounds, rows)


def described(points: Sequence[Point]) -> list[tuple[str, str, str, str]]:
    """The curve in words: memory, predicted time, chunk, forms."""
    return [(format_size(p.bytes), f"{p.seconds:.2f} s", chunk_text(p.chunk, p.ffn), p.forms) for p in points]
