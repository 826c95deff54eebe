"""Elements: the symbolic expression of one element against numpy, on random small programs."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tvm import relax, tirx
from tvm.ir import Range
from tvm.relax import op
from tvm.sym import Analyzer

from kvc_passes.affine import Affine
from kvc_passes.conditions import Unprovable
from kvc_passes.element import Elements
from kvc_passes.graph import Graph, dims, static
from support import Draft, evaluate, module_of, param, symbol

SEQUENCE = 5
"""The value of the symbol in the tests' shapes."""
S = symbol("sequence")


def number(dim: Any) -> int:
    """An extent with the symbol replaced by its value."""
    return int(evaluate(dim, {"sequence": SEQUENCE}))


def value_of(element: Any, index: dict[tirx.Var, int]) -> Any:
    """An element at one index."""
    return evaluate(element, {"sequence": SEQUENCE, **{var.name: i for var, i in index.items()}})


@dataclass(frozen=True)
class Value:
    """A Relax value and what numpy computes for it."""

    var: relax.Var
    array: np.ndarray

    @property
    def shape(self) -> list[Any]:
        return dims(self.var)


class Inapplicable(Exception):
    """An operation that fits none of the values made so far."""


def need(condition: Any) -> None:
    if not condition:
        raise Inapplicable


class Program:
    """Draws operations one by one and computes each with numpy too."""

    def __init__(self, emit: Draft, draw: Callable[..., Any]) -> None:
        self.emit, self.draw = emit, draw
        self.made: list[Value] = []

    def add(self, expression: relax.Expr, array: np.ndarray) -> Value:
        value = Value(self.emit(expression), np.asarray(array))
        assert [number(d) for d in value.shape] == list(value.array.shape)
        self.made.append(value)
        return value

    def pick(self, kinds: str) -> Value:
        found = [v for v in self.made if v.array.dtype.kind in kinds]
        need(found)
        value: Value = self.draw(st.sampled_from(found))
        return value

    def pair(self, kinds: str) -> tuple[Value, Value]:
        """Two values of one type with equal or broadcast shapes."""
        a = self.pick(kinds)
        others = [
            v
            for v in self.made
            if v.array.dtype == a.array.dtype
            and all(
                str(x) == str(y) or 1 in (static(x), static(y)) for x, y in zip(a.shape[::-1], v.shape[::-1])
            )
        ]
        return a, self.draw(st.sampled_from(others))

    # Each rule below is one operation.

    def arange(self) -> Value:
        start, step = self.draw(st.integers(-3, 3)), self.draw(st.sampled_from([1, 1, 2]))
        if self.draw(st.booleans()):
            stop = S + start
            return self.add(op.arange(start, stop, 1, "int64"), np.arange(start, SEQUENCE + start))
        stop = start + 1 + self.draw(st.integers(0, 4))
        return self.add(op.arange(start, stop, step, "int64"), np.arange(start, stop, step))

    def full(self) -> Value:
        shape: list[Any] = self.draw(st.lists(st.sampled_from([1, 2, 3, S]), min_size=1, max_size=2))
        dtype, fill = self.draw(
            st.sampled_from(
                [("bool", True), ("bool", False), ("int64", 2), ("float32", -1e9), ("float32", 0.0)]
            )
        )
        array = np.full([number(d) for d in shape], fill, dtype)
        return self.add(op.full(shape, relax.const(fill, dtype), dtype), array)

    def ones(self) -> Value:
        make, fill = self.draw(st.sampled_from([(op.ones, 1), (op.zeros, 0)]))
        dtype = self.draw(st.sampled_from(["bool", "int64", "float32"]))
        return self.add(make([S, 2], dtype), np.full((SEQUENCE, 2), fill, dtype))

    def arithmetic(self) -> Value:
        relax_op, numpy_op = self.draw(
            st.sampled_from(
                [
                    (op.add, np.add),
                    (op.subtract, np.subtract),
                    (op.multiply, np.multiply),
                    (op.maximum, np.maximum),
                    (op.minimum, np.minimum),
                ]
            )
        )
        a, b = self.pair("i")
        need(np.abs(a.array).max(initial=0) < 10**4 and np.abs(b.array).max(initial=0) < 10**4)
        return self.add(relax_op(a.var, b.var), numpy_op(a.array, b.array))

    def negative(self) -> Value:
        a = self.pick("i")
        return self.add(op.negative(a.var), -a.array)

    def compare(self) -> Value:
        relax_op, numpy_op = self.draw(
            st.sampled_from(
                [
                    (op.less, operator.lt),
                    (op.less_equal, operator.le),
                    (op.greater, operator.gt),
                    (op.greater_equal, operator.ge),
                    (op.equal, operator.eq),
                    (op.not_equal, operator.ne),
                ]
            )
        )
        a, b = self.pair("i")
        return self.add(relax_op(a.var, b.var), numpy_op(a.array, b.array))

    def logic(self) -> Value:
        relax_op, numpy_op = self.draw(
            st.sampled_from(
                [
                    (op.logical_and, np.logical_and),
                    (op.logical_or, np.logical_or),
                    (op.bitwise_and, np.bitwise_and),
                    (op.bitwise_or, np.bitwise_or),
                    (op.equal, np.equal),
                    (op.not_equal, np.not_equal),
                ]
            )
        )
        a, b = self.pair("b")
        need(relax_op not in (op.equal, op.not_equal) or b.array.size == 1 or b.array.all())
        return self.add(relax_op(a.var, b.var), numpy_op(a.array, b.array))

    def invert(self) -> Value:
        a = self.pick("b")
        relax_op = self.draw(st.sampled_from([op.logical_not, op.bitwise_not]))
        return self.add(relax_op(a.var), ~a.array)

    def choose(self) -> Value:
        condition, (a, b) = self.pick("b"), self.pair("if")
        for other in (a, b):
            need(
                all(
                    str(x) == str(y) or 1 in (static(x), static(y))
                    for x, y in zip(condition.shape[::-1], other.shape[::-1])
                )
            )
        try:
            array = np.where(condition.array, a.array, b.array)
        except ValueError:
            raise Inapplicable from None
        return self.add(op.where(condition.var, a.var, b.var), array)

    def cast(self) -> Value:
        a = self.pick("bi")
        target = self.draw(
            st.sampled_from(["int64", "bool"] + (["float32"] if a.array.dtype == bool else []))
        )
        return self.add(op.astype(a.var, target), a.array.astype(target))

    def expand(self) -> Value:
        a = self.pick("bif")
        need(a.array.ndim < 4)
        axis = self.draw(st.integers(0, a.array.ndim))
        return self.add(op.expand_dims(a.var, axis), np.expand_dims(a.array, axis))

    def squeeze(self) -> Value:
        a = self.pick("bif")
        axes = [i for i, d in enumerate(a.shape) if static(d) == 1]
        need(axes and a.array.ndim > 1)
        axis = self.draw(st.sampled_from(axes))
        return self.add(op.squeeze(a.var, [axis]), np.squeeze(a.array, axis))

    def broadcast(self) -> Value:
        a = self.pick("bif")
        need(a.array.ndim < 4)
        lead: list[Any] = self.draw(st.lists(st.sampled_from([1, 2, S]), max_size=1))
        shape = [*lead, *(self.draw(st.sampled_from([1, 3, S])) if static(d) == 1 else d for d in a.shape)]
        array = np.broadcast_to(a.array, [number(d) for d in shape])
        need(array.size < 2000)
        return self.add(op.broadcast_to(a.var, shape), array)

    def reshape(self) -> Value:
        """Merges two axes, or splits the last one by two."""
        a = self.pick("bif")
        shape = list(a.shape)
        if self.draw(st.booleans()) and len(shape) > 1:
            axis = self.draw(st.integers(0, len(shape) - 2))
            shape[axis : axis + 2] = [shape[axis] * shape[axis + 1]]
        else:
            need(isinstance(shape[-1], tirx.IntImm) and int(shape[-1]) % 2 == 0)
            shape[-1:] = [int(shape[-1]) // 2, 2]
        return self.add(op.reshape(a.var, shape), a.array.reshape([number(d) for d in shape]))

    def permute(self) -> Value:
        a = self.pick("bif")
        axes = self.draw(st.permutations(range(a.array.ndim)))
        return self.add(op.permute_dims(a.var, axes), a.array.transpose(axes))

    def slice(self) -> Value:
        a = self.pick("bif")
        axis = self.draw(st.integers(0, a.array.ndim - 1))
        extent = number(a.shape[axis])
        need(extent > 1)
        begin, step = self.draw(st.integers(0, extent - 1)), self.draw(st.sampled_from([1, 1, 2]))
        symbolic = not isinstance(a.shape[axis], tirx.IntImm)
        need(not symbolic or step == 1)
        array = a.array[(slice(None),) * axis + (slice(begin, None, step),)]
        end = a.shape[axis]
        return self.add(op.strided_slice(a.var, [axis], [begin], [end], [step], assume_inbound=True), array)

    def concat(self) -> Value:
        a = self.pick("bi")
        axis = self.draw(st.integers(0, a.array.ndim - 1))
        fits = [
            v
            for v in self.made
            if v.array.dtype == a.array.dtype
            and v.array.ndim == a.array.ndim
            and all(str(x) == str(y) for i, (x, y) in enumerate(zip(a.shape, v.shape)) if i != axis)
        ]
        b = self.draw(st.sampled_from(fits))
        return self.add(op.concat([a.var, b.var], axis=axis), np.concatenate([a.array, b.array], axis))

    def take(self) -> Value:
        a = self.pick("bif")
        axis = self.draw(st.integers(0, a.array.ndim - 1))
        fits = [
            v
            for v in self.made
            if v.array.dtype == np.int64
            and v.array.size
            and v.array.min() >= 0
            and v.array.max() < a.array.shape[axis]
        ]
        need(fits)
        at = self.draw(st.sampled_from(fits))
        need(a.array.ndim + at.array.ndim < 6)
        return self.add(op.take(a.var, at.var, axis), np.take(a.array, at.array, axis))

    def triangle(self) -> Value:
        a = self.pick("bif")
        need(a.array.ndim > 1)
        k = self.draw(st.integers(-2, 2))
        if self.draw(st.booleans()):
            return self.add(op.tril(a.var, k), np.tril(a.array, k).astype(a.array.dtype))
        return self.add(op.triu(a.var, k), np.triu(a.array, k).astype(a.array.dtype))


SOURCES = ("arange", "full", "ones")
RULES = (
    "arithmetic",
    "negative",
    "compare",
    "logic",
    "invert",
    "choose",
    "cast",
    "expand",
    "squeeze",
    "broadcast",
    "reshape",
    "permute",
    "slice",
    "concat",
    "take",
    "triangle",
)


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
    with pytest.raises(Unprovable, match="uses the operation sin, which has no element rule"):
        element(lambda emit, t: emit(op.sin(emit(op.ones([S], "float32")))), 0)


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
