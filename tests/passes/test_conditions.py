"""Case distinctions: choices and conditions mean the same as Python's."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tvm import tirx

from kvc_passes.conditions import Choice, as_condition, both, choose, either, is_condition, lift, negate
from support import evaluate, symbol

X, Y = symbol("x"), symbol("y")
ATOMS: list[tuple[Any, Any]] = [
    (True, lambda x, y: True),
    (False, lambda x, y: False),
    (X < Y, lambda x, y: x < y),
    (X <= 2, lambda x, y: x <= 2),
    (tirx.EQ(Y, tirx.IntImm("int64", 1)), lambda x, y: y == 1),
]
POINTS = list(itertools.product(range(4), repeat=2))


def at(value: Any, x: int, y: int) -> Any:
    return evaluate(value, {"x": x, "y": y})


def _conditions(depth: int) -> st.SearchStrategy[tuple[Any, Any]]:
    atoms = st.sampled_from(ATOMS)
    if depth == 0:
        return atoms
    inner = _conditions(depth - 1)
    return st.one_of(
        atoms,
        inner.map(lambda a: (negate(a[0]), lambda x, y: not a[1](x, y))),
        st.tuples(inner, inner).map(
            lambda p: (both(p[0][0], p[1][0]), lambda x, y: p[0][1](x, y) and p[1][1](x, y))
        ),
        st.tuples(inner, inner).map(
            lambda p: (either(p[0][0], p[1][0]), lambda x, y: p[0][1](x, y) or p[1][1](x, y))
        ),
    )


def _values(depth: int, leaves: st.SearchStrategy[Any]) -> st.SearchStrategy[tuple[Any, Any]]:
    leaf = leaves.map(lambda v: (v, lambda x, y: v))
    if depth == 0:
        return leaf
    inner = _values(depth - 1, leaves)
    return st.one_of(
        leaf,
        st.tuples(_conditions(1), inner, inner).map(
            lambda t: (
                choose(t[0][0], t[1][0], t[2][0]),
                lambda x, y: t[1][1](x, y) if t[0][1](x, y) else t[2][1](x, y),
            )
        ),
    )


@given(_conditions(3))
def test_conditions(pair: tuple[Any, Any]) -> None:
    symbolic, plain = pair
    assert all(bool(at(symbolic, x, y)) == bool(plain(x, y)) for x, y in POINTS)


@given(_values(3, st.booleans()))
def test_a_choice_of_truths_is_one_condition(pair: tuple[Any, Any]) -> None:
    choice, plain = pair
    condition = as_condition(choice)
    assert isinstance(condition, bool) or is_condition(condition)
    assert all(bool(at(condition, x, y)) == plain(x, y) for x, y in POINTS)


@given(_values(2, st.integers(-3, 3)), _values(2, st.integers(-3, 3)))
def test_functions_are_applied_below_choices(a: tuple[Any, Any], b: tuple[Any, Any]) -> None:
    result = lift(lambda p, q: 3 * p - q, a[0], b[0])
    assert all(at(result, x, y) == 3 * a[1](x, y) - b[1](x, y) for x, y in POINTS)


def test_constant_conditions_are_decided_at_once() -> None:
    assert choose(True, 1, 2) == 1
    assert choose(tirx.IntImm("bool", 0), 1, 2) == 2
    assert choose(X < Y, 5, 5) == 5


@pytest.mark.parametrize(("value", "expected"), [(X < Y, True), (X + Y, False), (1, False), (True, False)])
def test_only_boolean_expressions_are_conditions(value: Any, expected: bool) -> None:
    assert is_condition(value) is expected


def test_constants_are_decided_by_the_caller() -> None:
    assert as_condition(Choice(X < Y, -5.0, 0), lambda v: v == 0) is not True
    assert as_condition(0.0, lambda v: v == 0) is True
