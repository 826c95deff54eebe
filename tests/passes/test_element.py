"""Elements: the symbolic expression of one element against numpy, on random small programs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from element_programs import RULES, SEQUENCE, SOURCES, Inapplicable, Program, S, value_of
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tvm import relax, tirx
from tvm.ir import Range
from tvm.relax import op
from tvm.sym import Analyzer

from kvc_passes.affine import Affine
from kvc_passes.conditions import Unprovable
from kvc_passes.element import Elements
from kvc_passes.graph import Graph
from support import Draft, evaluate, module_of, param, symbol


@settings(
    max_examples=120,
    deadline=None,
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(data=st.data())
def test_an_element_is_what_numpy_computes(data: st.DataObject) -> None:
    programs: list[Program] = []

    def body(emit: Draft, tokens: relax.Var) -> relax.Expr:
        program = Program(emit, data.draw)
        programs.append(program)
        program.arange()
        for rule in data.draw(st.lists(st.sampled_from(SOURCES), min_size=1, max_size=2)):
            getattr(program, rule)()
        for rule in data.draw(st.lists(st.sampled_from(RULES), min_size=4, max_size=10)):
            with contextlib.suppress(Inapplicable):
                getattr(program, rule)()
        return program.made[-1].var

    module, _ = module_of([param("tokens", [1, S], "int64")], body)
    value = programs[0].made[-1]
    assume(value.array.size)
    graph, analyzer = Graph(module["main"]), Analyzer()
    index = [symbol(f"i{axis}") for axis in range(len(value.shape))]
    for var, extent in zip(index, value.shape):
        analyzer.bind(var, Range(tirx.IntImm("int64", 0), extent), True)
    element = Elements(graph, {}, analyzer).at(value.var, index)
    for _ in range(4):
        at = tuple(data.draw(st.integers(0, extent - 1)) for extent in value.array.shape)
        expected = value.array[at]
        assert value_of(element, dict(zip(index, at))) == expected
        concrete = Elements(graph, {}, Analyzer()).at(value.var, at)
        assert value_of(concrete, {}) == expected


def element(body: Callable[..., relax.Expr], *index: Any, params: list[relax.Var] | None = None) -> Any:
    given_ = params or [param("tokens", [1, S], "int64")]
    module, _ = module_of(given_, body)
    graph = Graph(module["main"])
    return Elements(graph, {}, Analyzer()).at(graph.alias(module["main"].body.body), list(index))


def test_an_input_has_no_element() -> None:
    with pytest.raises(Unprovable, match="depends on the input 'tokens'"):
        element(lambda emit, tokens: emit(op.add(tokens, tokens)), 0, 0)


def test_an_operation_without_a_rule_is_named() -> None:
    with pytest.raises(Unprovable, match="uses the operation tan, which has no element rule"):
        element(lambda emit, t: emit(op.tan(emit(op.ones([S], "float32")))), 0)


@pytest.mark.parametrize(
    ("array", "index", "reason"),
    [
        (np.arange(9).reshape(3, 3) % 4, (symbol("i"), symbol("j")), r"table of shape \[3, 3\]"),
        (np.array([3, 1, 2]), (symbol("i"),), r"table of shape \[3\]"),
    ],
)
def test_a_table_of_data_is_refused(array: np.ndarray, index: Any, reason: str) -> None:
    with pytest.raises(Unprovable, match=reason):
        element(lambda emit, t: emit(op.expand_dims(relax.const(array, "int64"), 0)), 0, *index)


@pytest.mark.parametrize(
    ("array", "at"),
    [
        (np.arange(7), (3,)),
        (np.full((2, 3), 5), (1, 2)),
        (np.tril(np.ones((4, 4), np.int64)), (1, 2)),
        (np.tril(np.ones((4, 4), np.int64)), (2, 1)),
        (np.where(np.tril(np.ones((4, 4))), 0, -7), (1, 2)),
        (np.where(np.tril(np.ones((4, 4))), 0, -7), (3, 3)),
    ],
)
def test_tables_with_a_rule_are_read(array: np.ndarray, at: tuple[int, ...]) -> None:
    index = [symbol(f"i{axis}") for axis in range(array.ndim)]
    found = element(lambda emit, t: emit(op.expand_dims(relax.const(array, "int64"), 0)), 0, *index)
    assert value_of(found, dict(zip(index, at))) == array[at]
    fixed = element(lambda emit, t: emit(op.expand_dims(relax.const(array, "int64"), 0)), 0, *at)
    assert value_of(fixed, {}) == array[at]


def test_cumulative_sums_of_equal_values_are_known() -> None:
    """The packed-sequence detection of transformers 5: neighbouring positions that do not differ by one."""

    def detection(emit: Draft, tokens: relax.Var) -> relax.Expr:
        count = emit(op.arange(0, S, 1, "int64"))
        later = emit(op.strided_slice(count, [0], [1], [S], assume_inbound=True))
        earlier = emit(op.strided_slice(count, [0], [0], [S - 1], assume_inbound=True))
        jump = emit(op.not_equal(emit(op.subtract(later, earlier)), relax.const(1, "int64")))
        return emit(op.cumsum(emit(op.astype(jump, "int64")), axis=0))

    i = symbol("i")
    assert element(detection, i) == 0
    ones = element(lambda emit, t: emit(op.cumsum(emit(op.ones([S], "int64")), axis=0)), i)
    assert [value_of(ones, {i: n}) for n in range(3)] == [1, 2, 3]


def test_a_cumulative_sum_of_other_values_is_refused() -> None:
    with pytest.raises(Unprovable, match="takes a cumulative sum of values that are not all"):
        element(lambda emit, t: emit(op.cumsum(emit(op.arange(0, S, 1, "int64")), axis=0)), symbol("i"))


def test_gathering_by_coordinates() -> None:
    def body(emit: Draft, tokens: relax.Var) -> relax.Expr:
        rows = emit(op.expand_dims(emit(op.arange(0, 3, 1, "int64")), 1))
        table = emit(op.reshape(emit(op.arange(0, 12, 1, "int64")), [3, 4]))
        return emit(op.gather_nd(table, emit(op.concat([rows, rows], axis=1))))

    i = symbol("i")
    found = element(body, i)
    assert [value_of(found, {i: n}) for n in range(3)] == [0, 5, 10]


def test_a_shape_is_read_as_a_tensor() -> None:
    def body(emit: Draft, tokens: relax.Var) -> relax.Expr:
        return emit(op.shape_to_tensor(relax.ShapeExpr([tirx.IntImm("int64", 7), S])))

    assert element(body, 0) == 7
    assert value_of(element(body, 1), {}) == SEQUENCE
    with pytest.raises(Unprovable, match="reads a shape at an unknown axis"):
        element(body, symbol("i"))


def halves(emit: Draft) -> relax.Var:
    """0, 0.5, 1, 1.5, ..."""
    numbers = emit(op.astype(emit(op.arange(0, S, 1, "int64")), "float32"))
    return emit(op.multiply(numbers, relax.const(0.5, "float32")))


def test_fractions_of_an_index_are_affine() -> None:
    i = symbol("i")
    got = element(lambda emit, tokens: emit(op.subtract(halves(emit), relax.const(3.0, "float32"))), i)
    assert isinstance(got, Affine)
    assert got.constant == -3.0
    assert [(str(e), c) for e, c in got.terms] == [("i", 0.5)]


def test_half_an_index_rounded_down_is_an_integer_division() -> None:
    got = element(lambda emit, tokens: emit(op.floor(halves(emit))), symbol("i"))
    assert evaluate(got, {"i": 7}) == 3


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (lambda emit, half: op.multiply(half, half), "multiplies two values that depend on the position"),
        (lambda emit, half: op.divide(half, half), "divides by a value that depends on the position"),
        (lambda emit, half: op.astype(half, "int64"), "rounds a value that depends on the position"),
        (lambda emit, half: op.exp(half), "takes the exponential of an index"),
        (lambda emit, half: op.floor(emit(op.add(half, half))), "rounds a value that depends"),
    ],
)
def test_fractions_of_an_index_are_refused_where_they_are_not_affine(body: Any, reason: str) -> None:
    with pytest.raises(Unprovable, match=reason):
        element(lambda emit, tokens: emit(body(emit, halves(emit))), symbol("i"))
