"""Mixes of forms, chunks and slices: as good as trying everything, with prices of what changes results."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Sequence
from copy import copy

import pytest

from kvc.planning.decide import Planner
from kvc.planning.mixes import PRICES, Chosen, Estimate, Parts
from kvc_passes.facts import StateForm
from kvc_passes.plans import Workload
from kvc_passes.sites import FormName

WORK = (Workload(1, 1),)
NAMES: tuple[FormName, ...] = ("paged_kv", "x_absorbed", "kv-int8", "kv-int4")
Call = tuple[int, int]
"""A chunk, and tokens of a slice of it or 0."""


class Made(Planner):
    """Chooses from parts that are given."""

    def __init__(self, parts: dict[Call, list[Parts]]) -> None:
        self.parts = parts

    def chunks(self, workload: tuple[Workload, ...]) -> list[int]:
        return list(dict.fromkeys(chunk for chunk, _ in self.parts))

    def _slices(self, chunk: int, workload: tuple[Workload, ...], known: Sequence[Chosen]) -> list[int]:
        return [ffn for c, ffn in self.parts if c == chunk and ffn]

    def _part(self, chosen: Chosen, workload: tuple[Workload, ...], chunk: int, ffn: int) -> Parts:
        return next(p for p in self.parts[chunk, ffn] if p.chosen == chosen)

    @property
    def all(self) -> list[Chosen]:
        return [p.chosen for p in next(iter(self.parts.values()))]


def made(rng: random.Random, layers: int, reading: int) -> Made:
    """Up to four forms, two chunks, one also in slices; the last layers read an encoder's output."""
    names = (NAMES[0], *(n for n in NAMES[1:] if rng.random() < 0.8))
    # Where a form is not legal a layer keeps K and V.
    chosen = {tuple(n if rng.random() < 0.8 else "paged_kv" for _ in range(layers)): None for n in names}
    sizes = [rng.randint(20, 60) for _ in range(layers)]
    whole = {chunk: [_parts(rng, own, sizes, chunk, reading) for own in chosen] for chunk in (8, 4)}
    for parts in whole.values():
        for p in parts:  # a form has one size and one time, whatever other layers are
            for i, form in enumerate(p.chosen):
                same = next(q for q in parts if q.chosen[i] == form)
                p.pools[i], p.seconds[i] = same.pools[i], same.seconds[i]
    slices = []
    for p in whole[8]:
        sliced = copy(p)
        sliced.ffn, sliced.arena, sliced.rest = 4, p.arena // 2, p.rest + rng.uniform(0, 1)
        slices.append(sliced)
    return Made({(8, 0): whole[8], (8, 4): slices, (4, 0): whole[4]})


def _parts(
    rng: random.Random, own: tuple[FormName, ...], sizes: list[int], chunk: int, reading: int
) -> Parts:
    p, layers = object.__new__(Parts), len(own)
    p.chosen = tuple(StateForm(name, 0, "") for name in own)
    p.chunk, p.ffn, p.memory = chunk, 0, [i >= layers - reading for i in range(layers)]
    p.pools = [size // (NAMES.index(name) + 1) for name, size in zip(own, sizes)]
    p.seconds = [rng.uniform(0.5, 1.5) for _ in own]
    p.rest, p.arena, p.others = rng.uniform(5, 6), rng.randint(10, 60), rng.randint(0, 10)
    p.weights = 100 + 12 * rng.randint(-1, 1)  # differences are shared evenly by up to four layers
    return p


def everything(planner: Made) -> list[Estimate]:
    """Every choice of a variant for each layer, with every chunk and slices."""
    found = []
    for (chunk, ffn), parts in planner.parts.items():
        first, layers = parts[0], range(len(parts[0].chosen))
        differ = {id(p): sum(a != b for a, b in zip(p.chosen, first.chosen)) for p in parts}
        for which in itertools.product(parts, repeat=len(layers)):
            if len({id(p) for p, reads in zip(which, first.memory) if reads}) > 1:
                continue
            chosen = tuple(p.chosen[i] for i, p in enumerate(which))
            changed = [p for i, p in enumerate(which) if p.chosen[i] != first.chosen[i]]
            bytes_ = first.weights + max(p.arena for p in which) + max(p.others for p in which)
            bytes_ += sum(p.pools[i] for i, p in enumerate(which))
            bytes_ += sum((p.weights - first.weights) // differ[id(p)] for p in changed)
            seconds = first.rest + sum(p.seconds[i] for i, p in enumerate(which))
            seconds += sum((p.rest - first.rest) / differ[id(p)] for p in changed)
            found.append(Estimate(chosen, chunk, ffn, bytes_, seconds))
    return found


@pytest.mark.parametrize("seed", range(40))
def test_no_choice_costs_less(seed: int) -> None:
    """A layer in codes costs a share of the least time of what fits; the least sum is chosen."""
    rng = random.Random(seed)
    layers = rng.randint(2, 4)
    planner = made(rng, layers, rng.choice((0, 0, 2)))
    tried = everything(planner)
    sizes = sorted(e.bytes for e in tried)
    smallest = planner.estimate(None, WORK, planner.all)
    assert smallest is not None
    assert smallest.bytes == sizes[0]
    assert planner.estimate(sizes[0] - 1, WORK, planner.all) is None
    for limit in (sizes[0], sizes[len(sizes) // 3], sizes[-1]):
        fitting = [e for e in tried if e.bytes <= limit]
        unit = min(e.seconds for e in fitting) / layers

        def cost(e: Estimate, unit: float = unit) -> float:
            return e.seconds + unit * sum(PRICES.get(form.name, 0.0) for form in e.chosen)

        best = planner.estimate(limit, WORK, planner.all)
        assert best is not None
        assert best.bytes <= limit
        assert best.cost == pytest.approx(min(map(cost, fitting)))
        assert best.cost == pytest.approx(cost(best))
        assert (best.chosen, best.chunk, best.ffn) in {(e.chosen, e.chunk, e.ffn) for e in fitting}


def test_eighty_layers_with_six_forms_in_twenty_calls_take_less_than_a_second() -> None:
    rng = random.Random(3)
    names: tuple[FormName, ...] = (*NAMES, "v_only", "kv-fp8")
    kinds = [(rng.randint(10**6, 10**7), rng.uniform(0.01, 0.02)) for _ in range(8)]
    faster = {name: [rng.uniform(0.5, 1.5) for _ in kinds] for name in names}
    parts: dict[Call, list[Parts]] = {}
    for chunk, ffn in itertools.product((512, 256, 128, 64, 32), (0, 2, 4, 8)):
        parts[chunk, ffn] = []
        for number, name in enumerate(names):
            p = object.__new__(Parts)
            p.chosen = (StateForm(name, 0, ""),) * 80
            p.chunk, p.ffn, p.memory = chunk, ffn, [False] * 80
            p.pools = [kinds[i % 8][0] // (number + 1) for i in range(80)]
            p.seconds = [kinds[i % 8][1] * faster[name][i % 8] for i in range(80)]
            p.rest = 1.0 + 10 / (chunk // max(1, ffn))
            p.arena = chunk // max(1, ffn) * 10**5 * (1 + (name == "v_only"))
            p.others, p.weights = int(name == "x_absorbed"), 10**9
            parts[chunk, ffn].append(p)
    planner = Made(parts)
    smallest = planner.estimate(None, WORK, planner.all)
    assert smallest is not None
    begin = time.perf_counter()
    for more in (10**6, 10**8):
        assert planner.estimate(smallest.bytes + more, WORK, planner.all) is not None
    assert time.perf_counter() - begin < 2
