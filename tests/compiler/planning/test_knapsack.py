"""The exact choice: equal to trying everything where that can be done, whatever the items are."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvc.planning.knapsack import Choice, Item, Option, smallest, solve


def brute(items: list[Item], limit: int) -> float | None:
    single = [item.options for item in items for _ in range(item.count)]
    sums = (
        sum(o.seconds for o in chosen)
        for chosen in itertools.product(*single)
        if sum(o.bytes for o in chosen) <= limit
    )
    return min(sums, default=None)


def check(items: list[Item], limit: int, found: Choice | None) -> None:
    """The sums are those of the counts, and every item is chosen as often as it is there."""
    assert found is not None
    assert [sum(c) for c in found.counts] == [item.count for item in items]
    pairs = [(o, n) for item, c in zip(items, found.counts) for o, n in zip(item.options, c)]
    assert sum(o.bytes * n for o, n in pairs) == found.bytes <= limit
    assert sum(o.seconds * n for o, n in pairs) == pytest.approx(found.seconds)


@pytest.mark.parametrize("seed", range(100))
def test_random_models_have_the_optimum_that_trying_everything_finds(seed: int) -> None:
    rng = random.Random(seed)
    items = [
        Item(
            tuple(Option(rng.randint(-20, 60), rng.uniform(-0.5, 1)) for _ in range(rng.randint(1, 4))),
            rng.randint(1, 3),
        )
        for _ in range(rng.randint(1, 4))
    ]
    limit = rng.randint(-40, 300)
    best, found = brute(items, limit), solve(items, limit)
    if best is None:
        assert found is None
    else:
        check(items, limit, found)
        assert found is not None
        assert found.seconds == pytest.approx(best, abs=1e-9)


_options = st.lists(
    st.builds(Option, st.integers(0, 9), st.integers(0, 5).map(float)), min_size=1, max_size=3
)


@settings(deadline=None)
@given(st.lists(st.builds(Item, _options.map(tuple), st.integers(1, 3)), max_size=3), st.integers(0, 40))
def test_ties_and_equal_options(items: list[Item], limit: int) -> None:
    best, found = brute(items, limit), solve(items, limit)
    assert (found is None) == (best is None)
    if found is not None:
        check(items, limit, found)
        assert found.seconds == pytest.approx(best)


def test_the_smallest_of_choices_that_take_as_long() -> None:
    found = solve([Item((Option(9, 1.0), Option(3, 1.0), Option(5, 2.0)), 80)], 10**6)
    assert found is not None
    assert found.counts == ((0, 80, 0),)


def test_eighty_layers_that_are_all_different() -> None:
    """No state explodes: what a relaxation rules out is not followed."""
    rng = random.Random(0)
    items = [
        Item(tuple(Option(rng.randint(10**6, 10**9), rng.random()) for _ in range(4))) for _ in range(80)
    ]
    least = sum(min(o.bytes for o in item.options) for item in items)
    found = solve(items, 2 * least)
    check(items, 2 * least, found)
    assert found is not None
    # No exchange of two layers' options is better.
    at = [next(o for o, n in zip(item.options, c) if n) for item, c in zip(items, found.counts)]
    room = 2 * least - found.bytes
    for i, j in itertools.combinations(range(80), 2):
        for a, b in itertools.product(items[i].options, items[j].options):
            if a.bytes + b.bytes - at[i].bytes - at[j].bytes <= room:
                assert a.seconds + b.seconds >= at[i].seconds + at[j].seconds - 1e-9


def test_sums_beyond_64_bits() -> None:
    items = [Item((Option(10**19, 1.0), Option(3, 2.0)), 5), Item((Option(2**61, 0.5), Option(1, 1.0)), 5)]
    found = solve(items, 7 * 10**18)
    assert found is not None
    assert (found.counts, found.bytes) == (((0, 5), (0, 5)), 20)
    assert solve([Item((Option(10**25, 1.0),))], 2**63) is None
    assert smallest([Item((Option(10**25, 1.0), Option(10**26, 0.1)), 3)]).bytes == 3 * 10**25
