"""How the dimensions of a reshape correspond."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tvm import tirx
from tvm.sym import Analyzer

from kvc_passes.conditions import Unprovable
from kvc_passes.regroup import regroup
from support import symbol

B, S = symbol("b"), symbol("s")


def dims(*values: Any) -> list[Any]:
    return [tirx.IntImm("int64", v) if isinstance(v, int) else v for v in values]


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        ((B, S, 8), (B, S, 2, 4), [(0, 1, 0, 1), (1, 2, 1, 2), (2, 3, 2, 4)]),
        ((B, S, 2, 4), (B, S, 8), [(0, 1, 0, 1), (1, 2, 1, 2), (2, 4, 2, 3)]),
        ((B, S, 8), (B * S, 8), [(0, 2, 0, 1), (2, 3, 1, 2)]),
        ((B * S, 8), (B, S, 8), [(0, 1, 0, 2), (1, 2, 2, 3)]),
        ((1, S), (S,), [(0, 1, 0, 0), (1, 2, 0, 1)]),
        ((S,), (1, S, 1), [(0, 0, 0, 1), (0, 1, 1, 2), (1, 1, 2, 3)]),
        ((S, 8), (8 * S,), [(0, 2, 0, 1)]),
        ((B, 2, 2, S, 8), (B, 4, S, 8), [(0, 1, 0, 1), (1, 3, 1, 2), (3, 4, 2, 3), (4, 5, 3, 4)]),
    ],
)
def test_groups(source: Any, target: Any, expected: Any) -> None:
    assert regroup(Analyzer(), dims(*source), dims(*target)) == expected


@st.composite
def _shapes(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Two factorizations of one number."""
    factors = draw(st.lists(st.sampled_from([1, 2, 2, 3, 5]), min_size=1, max_size=6))

    def merged() -> list[int]:
        shape, left = [], list(factors)
        while left:
            count = draw(st.integers(1, len(left)))
            shape.append(math.prod(left[:count]))
            left = left[count:]
        return shape

    return merged(), merged()


@given(_shapes())
def test_groups_cover_both_shapes_and_hold_the_same(shapes: tuple[list[int], list[int]]) -> None:
    source, target = shapes
    groups = regroup(Analyzer(), dims(*source), dims(*target))
    i = j = 0
    for low, high, first, last in groups:
        assert (low, first) == (i, j)
        assert math.prod(source[low:high]) == math.prod(target[first:last])
        i, j = high, last
    assert (i, j) == (len(source), len(target))


@pytest.mark.parametrize(("source", "target"), [((6,), (2, 3, 4)), ((2, 3, 4), (6,)), ((2,), (1, 2, 3))])
def test_shapes_of_other_sizes_are_refused(source: Any, target: Any) -> None:
    with pytest.raises(Unprovable, match="not proved to have as many elements"):
        regroup(Analyzer(), dims(*source), dims(*target))
