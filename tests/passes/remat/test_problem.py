"""What a problem refuses, and the bytes of schedules counted by hand."""

from __future__ import annotations

from typing import Any

import pytest

from kvc_passes.errors import InputError
from kvc_passes.remat import Problem, Schedule, given_order, peak, resident
from kvc_passes.remat.views import with_views, without_views

CHAIN: dict[str, Any] = {"sizes": (8, 4, 2), "costs": (5, 3, 1), "inputs": ((), (0,), (1,))}


def chain(**changes: Any) -> Problem:
    return Problem(**{**CHAIN, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"costs": (1,)}, "equally long"),
        ({"sizes": (1, -1, 2)}, "negative"),
        ({"inputs": ((), (1,), ())}, "before it"),
        ({"inputs": ((), (0, 0), ())}, "different operations"),
        ({"once": (2, 1)}, "in the order"),
        ({"kept": (3,)}, "name operations"),
        ({"alias": (-1, 0, -1)}, "no bytes of its own"),
        ({"alias": (-1, 0, -1), "sizes": (8, 0, 2)}, "costs nothing"),
        (
            {"alias": (-1, -1, 0), "sizes": (8, 4, 0), "costs": (5, 3, 0), "inputs": ((), (), (0, 1))},
            "nothing else",
        ),
        ({"alias": (-1, -1, 0), "sizes": (8, 4, 0)}, "read what it is a view of"),
    ],
)
def test_contradictions_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        chain(**changes)


def update(**changes: Any) -> Problem:
    """0 is read by 1, then 2 overwrites it; 3 reads the new value."""
    fields = {
        "sizes": (8, 4, 0, 1),
        "costs": (5, 3, 1, 1),
        "inputs": ((), (0,), (0,), (2,)),
        "alias": (-1, -1, 0, -1),
        "once": (1, 2),
    }
    return Problem(**{**fields, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"once": (2,)}, "operation 1 reads what 2 overwrites"),
        ({"inputs": ((), (0,), (0,), (0, 2)), "once": (1, 2, 3)}, "operation 3 reads what 2 overwrites"),
        ({"kept": (0,)}, "overwrites an output"),
    ],
)
def test_what_is_overwritten_is_read_before(changes: dict[str, Any], message: str) -> None:
    update()
    with pytest.raises(InputError, match=message):
        update(**changes)


def test_readers_of_a_view_of_what_is_overwritten_run_once_too() -> None:
    fields: dict[str, Any] = {
        "sizes": (8, 0, 4, 0),
        "costs": (5, 0, 1, 1),
        "inputs": ((), (0,), (1,), (0,)),
        "alias": (-1, 0, -1, 0),
    }
    Problem(**fields, once=(2, 3))
    with pytest.raises(InputError, match="operation 2 reads what 3 overwrites"):
        Problem(**fields, once=(3,))


def test_an_output_lives_to_its_last_read() -> None:
    assert resident(chain(), given_order(chain())) == [8, 12, 6]


def test_scratch_is_there_while_the_operation_runs() -> None:
    assert resident(chain(scratch=(0, 5, 0)), given_order(chain())) == [8, 17, 6]


def test_what_is_kept_lives_to_the_end() -> None:
    assert resident(chain(kept=(0,)), given_order(chain())) == [8, 12, 14]


def test_between_its_last_read_and_its_next_computation_a_value_takes_no_bytes() -> None:
    problem = Problem((8, 1, 1, 1), (1, 1, 1, 1), ((), (0,), (1,), (0, 2)))
    assert resident(problem, given_order(problem)) == [8, 9, 10, 10]
    assert resident(problem, Schedule((0, 1, 2, 0, 3))) == [8, 9, 2, 9, 10]


def test_a_view_keeps_its_storage() -> None:
    problem = Problem((8, 0, 1, 1), (1, 0, 1, 1), ((), (0,), (), (1, 2)), alias=(-1, 0, -1, -1))
    assert resident(problem, given_order(problem)) == [8, 8, 9, 10]
    # The view of the first computation still needs the first storage after the second computation.
    assert resident(problem, Schedule((0, 1, 0, 2, 3))) == [8, 8, 16, 9, 10]


def test_an_update_needs_no_second_storage() -> None:
    assert resident(update(), given_order(update())) == [8, 12, 8, 9]


def test_reading_what_was_not_computed_is_an_error() -> None:
    with pytest.raises(ValueError, match="reads 0, which was not computed"):
        resident(chain(), Schedule((1, 0, 2)))


def test_a_schedule_of_the_core_gets_its_views_back() -> None:
    """1 and 2 are views of 0 and of each other, 4 is one that nobody reads; 0 is computed twice."""
    problem = Problem(
        (8, 0, 0, 1, 0, 1),
        (1, 0, 0, 1, 0, 1),
        ((), (0,), (1,), (2,), (0,), (2, 3)),
        alias=(-1, 0, 1, -1, 0, -1),
    )
    core = without_views(problem)
    assert core.sizes == (8, 1, 1, 0)
    assert core.inputs == ((), (0,), (0, 1), ())
    order = with_views(problem, core, [0, 1, 0, 2, 3])
    assert order == (0, 4, 1, 2, 3, 0, 1, 2, 5)
    assert peak(problem, Schedule(order)) == 10
