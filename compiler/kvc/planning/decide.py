"""Every byte and every predicted second in one choice: the forms of layers, the prefill chunk, its slices."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Final

from kvc_passes.errors import BudgetError
from kvc_passes.kernel_sets import AttentionKernels
from kvc_passes.plans import Plan, Workload
from kvc_passes.sites import CODES, AttentionSite, FormName
from kvc_passes.state_forms import EXACT, KEYS, LAST, UNJUDGED

from ..compilation import Model, costs, lower_model
from ..encoder import Encoder
from ..layer_forms import judged, kept_in, most_saved, smallest_forms
from ..machine import Machine
from ..pipeline import Runner
from .budget import Draft, capacities, check_workload, planned, refused, useful_chunks
from .mixes import Chosen, Estimate, Parts, Variant, least_seconds, mixes
from .times import Clock, Site
from .work import work_of

_ATTEMPTS: Final = 4


@dataclass(frozen=True)
class Decision:
    """A plan, and the functions that it is for."""

    plan: Plan
    variant: Variant
    gap: float = 0.0
    """By how much the first choice would have been faster, as a share, had it fitted once it was lowered."""
    by: Planner | None = None
    """Who chose, with the encoder as it is compiled."""

    @property
    def encoder(self) -> Encoder | None:
        """The encoder that is compiled into the artifact, within the plan."""
        return None if self.by is None else self.by.encoder


class Planner:
    """Weighs forms and chunks of one model on one target, for any budgets and workloads."""

    def __init__(
        self,
        model: Model,
        machine: Machine,
        runtime: int,
        runner: Runner,
        forced: Chosen = (),
        encoder: Encoder | None = None,
    ) -> None:
        self.model, self.machine, self.runtime, self.runner = model, machine, runtime, runner
        self.forced, self.encoder = forced, encoder
        self._variants: dict[Chosen, Variant] = {}
        self._parts: dict[tuple[Chosen, tuple[Workload, ...], int, int], Parts] = {}
        self._paged: Chosen = tuple(forms[0] for forms in model.facts.forms)

    def decide(self, budget: int, workload: tuple[Workload, ...]) -> Decision:
        """The plan of the least predicted time, with what is left as pages.

        An encoder takes what it takes as it stands where that fits, else what the smallest plan leaves.
        Raises InputError for more context than the model has, BudgetError with the smallest that works.
        """
        check_workload(self.model.facts, workload)
        try:
            return self._decided(budget, workload)
        except BudgetError:
            if self.encoder is None:
                raise
        costs, chunks = [v.costs for v in self._variants.values()], self.chunks(workload)
        smallest = (Draft(c, budget, workload, chunk).smallest() for c in costs for chunk in chunks)
        room = max(self.room(plan, budget) for plan in smallest)
        return self.squeezed(room, workload)._decided(budget, workload)

    def chunks(self, workload: tuple[Workload, ...]) -> list[int]:
        """Prefill chunks worth trying."""
        return useful_chunks(self.machine.chunks, workload)

    def room(self, plan: Plan, budget: int) -> int:
        """Bytes that a plan leaves for the encoder's temporaries and what its kernels allocate."""
        assert self.encoder is not None
        return max(0, budget - plan.bytes.total + plan.bytes.arena + self.encoder.workspace(plan.workload))

    def squeezed(self, room: int, workload: tuple[Workload, ...]) -> Planner:
        """The same with the encoder in `room` bytes, or in as little memory as is reached."""
        assert self.encoder is not None
        try:
            encoder = self.encoder.within(room, workload)
        except BudgetError:
            encoder = self.encoder.least(workload)
        other = copy(self)
        other.encoder, other._parts = encoder, {}
        other._variants = {
            chosen: replace(variant, costs=replace(variant.costs, encoder=encoder))
            for chosen, variant in self._variants.items()
        }
        return other

    def _decided(self, budget: int, workload: tuple[Workload, ...]) -> Decision:
        tried: list[Chosen] = []
        for more in self._ladder(budget, workload):
            tried += more
            decision = self._settled(budget, workload, tried)
            if decision is not None:
                return decision
        failed = (refused(self.variant(chosen).costs, budget, workload) for chosen in tried)
        raise min(failed, key=lambda error: error.needed)

    def plan_of(
        self, chosen: Chosen, chunk: int, budget: int, workload: tuple[Workload, ...], ffn: int = 0
    ) -> Decision | None:
        """The plan with everything chosen, None if it does not fit."""
        variant = self.variant(chosen)
        plan = planned(variant.costs, budget, workload, chunk, ffn)
        return None if plan is None else self.finished(plan, variant, chosen)

    def finished(self, plan: Plan, variant: Variant, chosen: Chosen) -> Decision:
        """The plan with its forms, its predicted times and what its budget could hold."""
        times = tuple(variant.clock.times(w, plan.chunk, plan.ffn_chunk) for w in plan.workload)
        most = plan.capacities or capacities(variant.costs, plan)
        forms = tuple(form.name for form in chosen)
        source = self.machine.rates.source
        whole = replace(plan, forms=forms, times=times, rates=source, capacities=most)
        return Decision(whole, variant, by=self)

    def least(self, workload: tuple[Workload, ...]) -> int:
        """Bytes of the smallest plan among forms that need no judgement."""
        found = self.estimate(None, workload, self.usual())
        assert found is not None
        return found.bytes

    def usual(self) -> list[Chosen]:
        """Forms whose legality does not depend on the rounding of weights, or those that are forced.

        What changes results is legal where it is allowed: each such form where a layer may have it, and last
        the smallest of all.
        """
        if self.forced:
            return [self.forced]
        legal = {form.name for forms in self.model.facts.forms for form in forms if form.legal}
        exact = [f for f in self.machine.forms if f in ("paged_kv", *EXACT)]
        codes = [f for f in self.machine.forms if f in CODES and f in legal]
        each = [smallest_forms(self.model, ("paged_kv", name)) for name in codes]
        smallest = [smallest_forms(self.model, only) for only in (exact, [*exact, *codes])]
        return list(dict.fromkeys([self._paged, smallest[0], *each, smallest[1]]))

    def _ladder(self, budget: int, workload: tuple[Workload, ...]) -> Iterator[list[Chosen]]:
        """Forms to choose from, further ones where those before do not fit."""
        yield self.usual()
        if self.forced:
            return
        # Judging the weights of a large layer takes minutes: not where even the best would not fit.
        unjudged = any(f.detail.endswith(UNJUDGED) for forms in self.model.facts.forms for f in forms)
        if unjudged and set(KEYS) & set(self.machine.forms) and self._floor(budget, workload) <= budget:
            self.model = judged(self.model, self.runner)
            yield [smallest_forms(self.model, self._judged)]
        chosen = smallest_forms(self.model, self.machine.forms)
        if any(form.name == LAST for form in chosen):
            yield [chosen]

    @property
    def _judged(self) -> list[FormName]:
        """Forms that are weighed where their weights were judged: all but the last resort."""
        return [form for form in self.machine.forms if form != LAST]

    def _floor(self, budget: int, workload: tuple[Workload, ...]) -> int:
        """Bytes without which no form but the last will do, by what the model needs with K and V."""
        needed: int = refused(self.variant(self._paged).costs, budget, workload).needed
        tokens, rows = max(w.batch * w.context for w in workload), max(w.batch * w.memory for w in workload)
        saved = rows * most_saved(self.model, self._judged, memory=True)
        return needed - tokens * most_saved(self.model, self._judged) - saved

    def _settled(
        self, budget: int, workload: tuple[Workload, ...], known: Sequence[Chosen]
    ) -> Decision | None:
        """The best choice among what the layers of `known` are, lowered and counted byte by byte."""
        unit = self._unit(budget, workload, known)
        first = self._weighed(budget, workload, known, unit)
        # `known` itself is lowered already: what is said of it is exact.
        whole = self._weighed(budget, workload, known, unit, mixed=False)
        best, limit = first, budget
        for _ in range(_ATTEMPTS):
            if best is None or (whole is not None and whole.cost < best.cost):
                break
            decision = self.plan_of(best.chosen, best.chunk, budget, workload, best.ffn)
            if decision is not None:
                return replace(decision, gap=_gap(best, first))
            draft = Draft(self.variant(best.chosen).costs, budget, workload, best.chunk, best.ffn)
            # A mix of forms may take more than its parts.
            limit -= max(draft.smallest().bytes.total - best.bytes, 1)
            best = self._weighed(limit, workload, known, unit)
        if whole is None:
            return None
        decision = self.plan_of(whole.chosen, whole.chunk, budget, workload, whole.ffn)
        return None if decision is None else replace(decision, gap=_gap(whole, first))

    def estimate(
        self, limit: int | None, workload: tuple[Workload, ...], known: Sequence[Chosen]
    ) -> Estimate | None:
        """The best choice of at most `limit` bytes, None if there is none; of None the smallest.

        The best is the fastest, where forms that change results are charged their price.
        """
        return self._weighed(limit, workload, known, self._unit(limit, workload, known))

    def _unit(self, limit: int | None, workload: tuple[Workload, ...], known: Sequence[Chosen]) -> float:
        """Seconds that a layer is charged, times its form's price: a share of the least time that fits."""
        if limit is None or not any(map(changes, known)):
            return 0.0
        fastest = self._weighed(limit, workload, known, 0.0)
        return 0.0 if fastest is None else fastest.seconds / len(fastest.chosen)

    def _weighed(
        self,
        limit: int | None,
        workload: tuple[Workload, ...],
        known: Sequence[Chosen],
        unit: float,
        *,
        mixed: bool = True,
    ) -> Estimate | None:
        """As `estimate`, with prices of `unit` seconds; mixed: layers may be of several of `known`."""
        found: list[Estimate] = []

        def parts(chunk: int, ffn: int) -> list[Parts]:
            return [self._part(chosen, workload, chunk, ffn) for chosen in known]

        def worth(chunk: int, ffn: int) -> bool:
            """Whether a call could cost less than what was found."""
            best = min((e.cost for e in found), default=math.inf)
            return limit is None or least_seconds(parts(chunk, ffn)) < best

        chunks = self.chunks(workload)
        for chunk in chunks:
            found += mixes(parts(chunk, 0), limit, mixed, unit) if worth(chunk, 0) else ()
        for chunk in chunks:  # slices are never faster than the whole
            for ffn in self._slices(chunk, workload, known) if worth(chunk, 0) else ():
                found += mixes(parts(chunk, ffn), limit, mixed, unit) if worth(chunk, ffn) else ()
        if limit is None:
            return min(found, key=lambda e: e.bytes)
        # Of equal costs the first is taken: whole, the larger chunk, K and V.
        return min(found, key=lambda e: e.cost, default=None)

    def assuming(self, variants: Mapping[Chosen, Variant]) -> Planner:
        """The same with these variants in the place of those that would be lowered."""
        other = copy(self)
        other._variants, other._parts = {**self._variants, **variants}, {}
        return other

    def _slices(self, chunk: int, workload: tuple[Workload, ...], known: Sequence[Chosen]) -> list[int]:
        """Slices of a chunk that are worth trying for one of `known`, the largest first."""
        batch = max(w.batch for w in workload)
        tried = (self.variant(chosen).costs.slices(chunk, batch) for chosen in known)
        return sorted({ffn for slices in tried for ffn in slices}, reverse=True)

    def _part(self, chosen: Chosen, workload: tuple[Workload, ...], chunk: int, ffn: int) -> Parts:
        key = (chosen, workload, chunk, ffn)
        if key not in self._parts:
            self._parts[key] = Parts(self.variant(chosen), *key)
        return self._parts[key]

    def variant(self, chosen: Chosen) -> Variant:
        """The model in chosen forms, lowered once."""
        if chosen not in self._variants:
            plain = all(form.name == "paged_kv" for form in chosen)
            model = self.model if plain else kept_in(self.model, chosen, self.runner)
            lowered = lower_model(model, self.machine, self.runner)
            pairs = zip(model.facts.sites, self.model.facts.sites, strict=True)
            clock = Clock(
                prefill=work_of(lowered.functions["prefill"], lowered.segments, spread=True),
                decode=work_of(lowered.functions["decode"]),
                sites=tuple(self.site_of(kept, graph, lowered.attention) for kept, graph in pairs),
                rates=self.machine.rates,
            )
            weighed = replace(costs(model, lowered, self.runtime), encoder=self.encoder)
            self._variants[chosen] = Variant(model, lowered, weighed, clock)
        return self._variants[chosen]

    def site_of(self, kept: AttentionSite, graph: AttentionSite, kernels: AttentionKernels) -> Site:
        """What the times of a layer follow from, as it is kept and as it stands in the graph."""
        operations = (kernels.operations(kept, decodes=False), kernels.operations(kept, decodes=True))
        shared = kept.head_dim - kept.value_dim if kept.kept == "mla_latent" else 0  # by all heads
        sizes = (graph.head_dim - shared, graph.value_dim, kept.kv_dtype)
        rebuilds, together = kernels.rebuilds(*sizes), kernels.together(kept, graph)
        site = Site(kept, graph, operations=operations, rebuilds=rebuilds, together=together)
        return site.as_measured(self.machine.rates, self.machine.attention_times(kept))


def _gap(best: Estimate, first: Estimate | None) -> float:
    """How much more `best` costs than the first choice, by the same estimates; that costs the least."""
    return max(0.0, best.cost / first.cost - 1) if first is not None and first.cost else 0.0


def changes(chosen: Chosen) -> bool:
    """Whether a layer's form changes results beyond rounding."""
    return any(form.name in CODES for form in chosen)
