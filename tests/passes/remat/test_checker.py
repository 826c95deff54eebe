"""The evaluator and the checker are written apart and have to agree; the checker finds what is wrong."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_problems import problems, schedules

from kvc_passes.remat import Problem, Schedule, peak
from kvc_passes.remat.checker import InvalidSchedule, check


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_evaluator_and_checker_agree(data: st.DataObject) -> None:
    problem = data.draw(problems())
    order = data.draw(schedules(problem))
    schedule = Schedule(order)
    most = peak(problem, schedule)
    assert check(problem, order, most) == (most, schedule.cost(problem))
    if most:
        with pytest.raises(InvalidSchedule, match=f"the peak is {most} bytes"):
            check(problem, order, most - 1)


ONCE = Problem((4, 4, 4), (1, 1, 1), ((), (0,), (0, 1)), once=(1,))
UPDATE = Problem((8, 0, 1), (1, 1, 1), ((), (0,), (1,)), alias=(-1, 0, -1), once=(1,))
VIEW = Problem((8, 0, 1, 1), (1, 0, 1, 1), ((), (0,), (0,), (1, 2)), alias=(-1, 0, -1, -1))


@pytest.mark.parametrize(
    ("problem", "order", "fixed", "message"),
    [
        (ONCE, (0, 1), False, "not every operation"),
        (ONCE, (1, 0, 2), False, "reads 0 before"),
        (ONCE, (0, 1, 1, 2), False, "repeated or out of order"),
        (Problem((1, 1), (1, 1), ((), ()), once=(0, 1)), (1, 0), False, "repeated or out of order"),
        (Problem((1, 1), (1, 1), ((), ())), (1, 0), True, "not in the given order"),
        (
            Problem((4, 0, 0), (1, 1, 0), ((), (0,), (0,)), alias=(-1, 0, 0), once=(1,)),
            (0, 1, 2),
            False,
            "overwritten",
        ),
    ],
)
def test_what_breaks_a_rule_is_found(
    problem: Problem, order: tuple[int, ...], fixed: bool, message: str
) -> None:
    with pytest.raises(InvalidSchedule, match=message):
        check(problem, order, 100, fixed)


def test_the_update_of_storage_that_was_computed_again_is_fine() -> None:
    assert check(UPDATE, (0, 0, 1, 2), 16) == (9, 4)


def test_views_may_come_anywhere_in_a_fixed_order() -> None:
    assert check(VIEW, (0, 2, 1, 3), 10, fixed_order=True) == (10, 3)
