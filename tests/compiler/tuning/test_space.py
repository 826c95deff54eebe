"""Candidates: each once, never the default, coordinates first."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from kvc.kernels.traits import CpuTraits
from kvc.tuning.cpu import CpuTarget
from kvc.tuning.programs import operands
from kvc.tuning.space import KNOBS, Values, default_of, frozen, knobs_of, propose
from kvc.tuning.tasks import Bucket, Task

from .tuning_cases import CODED, CPU, SHAPE, TARGET, TASKS, TRAITS, attention, product

TRAITS_OF = [TRAITS, CpuTraits(8, 16, 6), CpuTraits(4, 16, 1)]
ALL = [*TASKS.values(), *CODED.values(), product(buckets=(Bucket(14, 0, 1.0),))]


def proposals(task: Task, best: Values, tiles: bool = True, most: int = 10**6) -> list[Values]:
    choices, tried, rng = CPU.space(task, tiles), set(), np.random.default_rng(0)
    found: list[Values] = []
    while len(found) < most and (values := propose(task, choices, best, tried, rng)) is not None:
        tried.add(frozen(values))
        found.append(values)
    return found


@pytest.mark.parametrize("task", ALL, ids=lambda t: t.name)
def test_all_are_proposed_once_but_the_default(task: Task) -> None:
    found = [frozen(values) for values in proposals(task, {})]
    size = np.prod([len(values) for values in CPU.space(task, True).values()])
    assert len(found) == len(set(found)) == size - 1
    assert () not in found
    for values in found:
        assert all(value != default_of(task, name) for name, value in values)


@pytest.mark.parametrize("task", ALL, ids=lambda t: t.name)
@pytest.mark.parametrize("traits", TRAITS_OF, ids=str)
@pytest.mark.parametrize("tiles", [False, True])
def test_the_default_is_first_and_no_value_is_twice(task: Task, traits: CpuTraits, tiles: bool) -> None:
    for name, values in CpuTarget(traits, TARGET).space(task, tiles).items():
        assert values[0] == default_of(task, name)
        assert len(set(values)) == len(values)
        assert all(value >= 0 for value in values)


@pytest.mark.parametrize("task", ALL, ids=lambda t: t.name)
def test_one_parameter_changes_before_two_do(task: Task) -> None:
    choices = CPU.space(task, True)
    near = sum(len(values) - 1 for values in choices.values())
    found = proposals(task, {})
    assert all(len(values) == 1 for values in found[:near])
    assert all(len(values) > 1 for values in found[near:])


def test_neighbours_of_the_best_come_first() -> None:
    task, best = TASKS["product_many"], {"depth": 256, "rows": 11}
    choices = CPU.space(task, True)
    near = sum(len(values) - 1 for values in choices.values())
    first, *_, last = proposals(task, best, most=near + 2)
    assert all(
        sum(
            values.get(name, default_of(task, name)) != best.get(name, default_of(task, name))
            for name in choices
        )
        <= 1
        for values in proposals(task, best, most=near)
    )
    assert first == {"depth": 256}
    assert last != best


def test_the_order_is_that_of_the_seed() -> None:
    assert proposals(TASKS["product_many"], {}) == proposals(TASKS["product_many"], {})


@pytest.mark.parametrize("task", ALL, ids=lambda t: t.name)
def test_every_candidate_makes_parameters_of_its_kernel(task: Task) -> None:
    for values in proposals(task, {}):
        made = knobs_of(task.kernel, values)
        assert type(made) is KNOBS[task.kernel]
        assert {name: getattr(made, name) for name in values} == values


def test_a_parameter_that_there_is_not() -> None:
    with pytest.raises(TypeError):
        knobs_of("decode", {"gone": 8})


def test_codes_are_not_prefetched() -> None:
    assert CPU.space(CODED["product_few"], True)["ahead"] == (0,)
    assert len(CPU.space(TASKS["product_few"], True)["ahead"]) > 1


def test_tiles_vary_where_they_are_free() -> None:
    assert CPU.space(TASKS["prefill"], False)["tile"] == (0,)
    assert len(CPU.space(TASKS["prefill"], True)["tile"]) > 3


def test_threads_are_split_evenly() -> None:
    for threads in (1, 2, 6, 8):
        groups = CpuTarget(CpuTraits(16, 32, threads), TARGET).space(TASKS["product_many"], True)["groups"]
        assert groups == (0, *(g for g in range(1, threads + 1) if threads % g == 0))


def test_blocks_are_not_much_deeper_than_the_weight() -> None:
    depths = {k: CPU.space(product("product_many", depth=k), True)["depth"] for k in (100, 600, 9000)}
    assert depths == {100: (1024,), 600: (1024, 256, 512), 9000: (1024, 256, 512, 2048, 4096)}


def test_rows_of_a_tile_are_few_enough_to_be_kept_in_registers() -> None:
    for traits, kernel in itertools.product(TRAITS_OF, ("product_many",)):
        rows = CpuTarget(traits, TARGET).space(TASKS[kernel], True)["rows"]
        assert all(0 < r < traits.tile_rows for r in rows[1:])


def test_a_tile_of_many_tokens_of_a_small_group() -> None:
    """Tiles are whole numbers of tokens, whatever the group is."""
    from dataclasses import replace

    for heads in (2, 64, 254):
        task = attention("prefill", replace(SHAPE, heads=heads))
        assert all(tile >= 1 for tile in CPU.space(task, True)["tile"][1:])


@pytest.mark.parametrize("task", ALL, ids=lambda t: t.name)
@pytest.mark.parametrize("length", [100, 224, 1920])
def test_every_candidate_runs_on_the_operands_of_the_default(task: Task, length: int) -> None:
    """As many copies, of the same sizes."""
    keys = length if task.kernel in ("prefill", "decode") else 0
    bucket = Bucket(task.buckets[0].rows, keys, 1.0)
    default = operands(task, bucket, {}, TRAITS)
    for values in proposals(task, {}):
        other = operands(task, bucket, values, TRAITS)
        assert (other.copies, other.cold) == (default.copies, default.cold)
        assert other.results[-1] == default.results[-1]
