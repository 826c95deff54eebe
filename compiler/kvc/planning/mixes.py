"""The fastest mix of layers in several forms, of what lowered variants of the model take."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Final

from kvc_passes.facts import StateForm
from kvc_passes.plans import Workload
from kvc_passes.sites import FormName

from ..compilation import Lowered, Model
from .budget import Costs, Draft
from .knapsack import Item, Option, smallest, solve
from .times import Clock

Chosen = tuple[StateForm, ...]
"""The form of every layer."""
PRICES: Final[dict[FormName, float]] = {"kv-int8": 0.05, "kv-fp8": 0.10, "kv-int4": 0.15}
"""What a form that changes results has to gain in all layers, as a share of the least time of what fits; the
more it changes, the more."""


@dataclass(frozen=True)
class Variant:
    """The model with its state in chosen forms, lowered."""

    model: Model
    lowered: Lowered
    costs: Costs
    clock: Clock


@dataclass(frozen=True)
class Estimate:
    """A choice, before it is lowered: exact where all layers are alike, else from parts of others."""

    chosen: Chosen
    chunk: int
    ffn: int
    """Tokens of a slice of feed-forward parts, 0 for the whole chunk."""
    bytes: int
    seconds: float
    price: float = 0.0
    """Seconds that it has to gain over choices that change results less."""

    @property
    def cost(self) -> float:
        """What is weighed: the least is chosen."""
        return self.seconds + self.price


class Parts:
    """What each layer of a variant takes with one chunk, and what everything else does."""

    def __init__(
        self, variant: Variant, chosen: Chosen, workload: tuple[Workload, ...], chunk: int, ffn: int
    ) -> None:
        self.chosen, self.chunk, self.ffn = chosen, chunk, ffn
        draft = Draft(variant.costs, 0, workload, chunk, ffn).smallest()
        self.arena, self.weights = draft.bytes.arena, draft.bytes.weights
        self.others = draft.bytes.total - draft.bytes.arena - draft.bytes.weights - draft.bytes.pools
        pages = {index: group.pages for group in draft.groups for index in group.sites}
        size, sites = draft.page_size, variant.model.facts.sites
        self.pools = [site.token_bytes() * size * pages[site.index] for site in sites]
        # Each pool begins on a boundary of its own: what that takes is shared by all.
        self.others += draft.bytes.pools - sum(self.pools)
        clock = variant.clock
        self.seconds = [sum(sum(clock.attention(site, w, chunk)) for w in workload) for site in clock.sites]
        self.rest = sum(sum(clock.rest(w, chunk, ffn)) for w in workload)
        self.memory = [site.mask.reach.memory for site in sites]


def mixes(parts: Sequence[Parts], limit: int | None, mixed: bool, unit: float = 0.0) -> Iterator[Estimate]:
    """The best of each of several variants, and of their mixes where layers may differ.

    unit: seconds that a layer of a form is charged, times its price.
    """
    subsets: list[tuple[Parts, ...]] = [(each,) for each in parts]
    if mixed:
        subsets += _subsets(parts)
    for some in subsets:
        estimate = _best(some, parts[0] if len(some) > 1 else some[0], limit, unit)
        if estimate is not None:
            yield estimate


def _subsets(parts: Sequence[Parts]) -> list[tuple[Parts, ...]]:
    """All of `parts` whose temporaries and tables are within the largest of some of them: two or more."""
    limits = product({p.arena for p in parts}, {p.others for p in parts})
    found = (tuple(p for p in parts if p.arena <= a and p.others <= o) for a, o in limits)
    return [some for some in dict.fromkeys(found) if len(some) > 1]


def least_seconds(parts: Sequence[Parts]) -> float:
    """What no mix of these is faster than, whatever fits."""
    first = parts[0]
    rest: float = first.rest + sum(min(0.0, p.rest - first.rest) for p in parts[1:])
    for seconds in zip(*(p.seconds for p in parts)):
        rest += min(seconds)
    return rest


def _best(parts: Sequence[Parts], first: Parts, limit: int | None, unit: float) -> Estimate | None:
    """The choice of the least cost among layers of several variants, with the largest's temporaries.

    What a variant's other kernels and weights take more than the first's is laid on its layers, equally.
    """
    fixed = first.weights + max(p.others for p in parts) + max(p.arena for p in parts)
    groups = _alike(list(zip(*(_options(p, first, unit) for p in parts))), first.memory)
    items = [Item(key, len(sites)) for key, sites in groups]
    choice = smallest(items) if limit is None else solve(items, limit - fixed)
    if choice is None:
        return None
    chosen = list(first.chosen)
    for (_, members), counts in zip(groups, choice.counts, strict=True):
        which = [p for p, many in zip(parts, counts) for _ in range(many)]
        for together, p in zip(members, which, strict=True):
            for site in together:
                chosen[site] = p.chosen[site]
    price = sum(PRICES.get(form.name, 0.0) for form in chosen) * unit
    bytes_, seconds = fixed + choice.bytes, first.rest + choice.seconds - price
    return Estimate(tuple(chosen), first.chunk, first.ffn, bytes_, seconds, price)


def _options(p: Parts, first: Parts, unit: float) -> list[Option]:
    """What each layer takes as it is in a variant."""
    differs = [a.name != b.name for a, b in zip(p.chosen, first.chosen)]
    share = 1 / max(1, sum(differs))
    weights, rest = round((p.weights - first.weights) * share), (p.rest - first.rest) * share
    prices = [PRICES.get(form.name, 0.0) * unit for form in p.chosen]
    return [
        Option(pool + weights * more, seconds + rest * more + price)
        for pool, seconds, price, more in zip(p.pools, p.seconds, prices, differs, strict=True)
    ]


def _alike(
    options: Sequence[tuple[Option, ...]], memory: Sequence[bool]
) -> list[tuple[tuple[Option, ...], list[list[int]]]]:
    """Layers with the same options; those that read an encoder's output have one form together."""
    found: dict[tuple[Option, ...], list[list[int]]] = {}
    for site, key in enumerate(options):
        if not memory[site]:
            found.setdefault(key, []).append([site])
    reading = [site for site, reads in enumerate(memory) if reads]
    groups = list(found.items())
    if reading:
        columns = zip(*(options[site] for site in reading))
        summed = tuple(Option(sum(o.bytes for o in c), sum(o.seconds for o in c)) for c in columns)
        groups.append((summed, [reading]))
    return groups
