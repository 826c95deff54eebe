"""Predicates as text: what is written says the same as the expression, and counter-examples are real."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import tirx

from kvc_passes.conditions import Unprovable
from kvc_passes.predicates import counter_example, holds, to_text
from support import evaluate, symbol

Q, K, H = symbol("q"), symbol("k"), symbol("h")
NAMES = {Q: "q", K: "k", H: "h"}


def constant(value: int) -> Any:
    return tirx.IntImm("int64", value)


numbers = st.recursive(
    st.sampled_from([Q, K, H]) | st.integers(-9, 9).map(constant),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map(lambda p: p[0] + p[1]),
        st.tuples(inner, inner).map(lambda p: p[0] - p[1]),
        st.tuples(inner, st.integers(1, 5)).map(lambda p: tirx.floordiv(p[0], constant(p[1]))),
        st.tuples(inner, st.integers(1, 5)).map(lambda p: tirx.floormod(p[0], constant(p[1]))),
        st.tuples(inner, inner).map(lambda p: tirx.max(p[0], p[1])),
        st.tuples(inner, inner).map(lambda p: tirx.min(p[0], p[1])),
    ),
    max_leaves=6,
)
comparisons = st.tuples(numbers, numbers, st.sampled_from(["LT", "LE", "GT", "GE", "EQ", "NE"])).map(
    lambda t: getattr(tirx, t[2])(t[0], t[1])
)
conditions = st.recursive(
    comparisons,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map(lambda p: tirx.And(*p)),
        st.tuples(inner, inner).map(lambda p: tirx.Or(*p)),
        inner.map(tirx.Not),
    ),
    max_leaves=4,
)


@settings(max_examples=200, deadline=None)
@given(conditions, st.integers(0, 20), st.integers(0, 20), st.integers(0, 7))
def test_the_text_says_what_the_expression_says(condition: Any, q: int, k: int, h: int) -> None:
    assert holds(to_text(condition, NAMES), q, k, h) == evaluate(condition, {"q": q, "k": k, "h": h})


def test_a_variable_without_a_name_is_refused() -> None:
    with pytest.raises(Unprovable, match="depends on past"):
        to_text(symbol("past") < Q, NAMES)


def test_an_operator_without_a_spelling_is_refused() -> None:
    with pytest.raises(Unprovable, match="has the form Select"):
        to_text(tirx.Select(Q < K, Q, K) < K, NAMES)


def test_a_counter_example_is_one() -> None:
    found = counter_example("k <= q + 1", "k <= q")
    assert found == (0, 1)
    assert holds("k <= q + 1", *found) != holds("k <= q", *found)
    assert counter_example("k <= q", "not k > q") is None
    assert counter_example("k <= q and h < 3", "k <= q", heads=4) == (0, 0)
