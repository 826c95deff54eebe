"""Folding of shape arithmetic: constants as ONNX defines them, symbols as any of their values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from tvm import tirx
from tvm.ir import Range
from tvm.tirx import IntImm

from kvc.frontend.integers import Folder, Integers, NotFolded, from_array
from support import evaluate, symbol

SYMBOLS = {"s": symbol("s"), "p": symbol("p")}
Array = np.ndarray


def node(operator: str, inputs: int, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(operator, [f"i{n}" for n in range(inputs)], ["y"], **attributes)


def onnx_says(made: onnx.NodeProto, inputs: list[Array]) -> Array:
    """What ONNX's reference implementation computes."""
    graph = helper.make_graph(
        [made],
        "g",
        [
            helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
            for n, a in zip(made.input, inputs)
        ],
        [helper.make_tensor_value_info("y", TensorProto.UNDEFINED, None)],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    result = ReferenceEvaluator(proto).run(None, dict(zip(made.input, inputs)))[0]
    return np.asarray(result)


def folder() -> Folder:
    made = Folder()
    for var, low in ((SYMBOLS["s"], 1), (SYMBOLS["p"], 0)):
        made.analyzer.bind(var, Range(IntImm("int64", low), IntImm("int64", 1 << 31)), True)
    return made


def attributes(made: onnx.NodeProto) -> dict[str, Any]:
    return {a.name: helper.get_attribute_value(a) for a in made.attribute}


def fold(made: onnx.NodeProto, inputs: list[Integers | None]) -> Integers:
    return folder().fold(made, inputs, attributes(made))


def check(made: onnx.NodeProto, inputs: list[Array]) -> None:
    expected = onnx_says(made, inputs)
    got = fold(made, [from_array(a) for a in inputs])
    assert got.dtype == str(expected.dtype)
    assert got.values.shape == expected.shape
    np.testing.assert_array_equal(got.numpy(), expected)


arrays = st.lists(st.integers(-9, 9), min_size=1, max_size=4).map(lambda v: np.array(v, np.int64))


@given(arrays, st.integers(-9, 9).filter(bool))
def test_remainders_and_signs(a: Array, divisor: int) -> None:
    check(node("Mod", 2), [a, np.array([divisor], np.int64)])
    check(node("Neg", 1), [a])


@given(st.lists(st.booleans(), min_size=1, max_size=4), st.booleans())
def test_logic(a: list[bool], b: bool) -> None:
    left, right = np.array(a), np.array([b])
    check(node("And", 2), [left, right])
    check(node("Or", 2), [left, right])
    check(node("Not", 1), [left])


def test_remainders_that_are_not_folded() -> None:
    two, zero = from_array(np.array([2])), from_array(np.array([0]))
    with pytest.raises(NotFolded):
        fold(node("Mod", 2), [two, zero])
    with pytest.raises(NotFolded):
        fold(node("Mod", 2, fmod=1), [two, two])


@given(st.sampled_from(["Add", "Sub", "Mul", "Max", "Min", "Equal"]), arrays, st.data())
def test_arithmetic(operator: str, a: Array, data: st.DataObject) -> None:
    size = data.draw(st.sampled_from([1, len(a)]))
    b = np.array(data.draw(st.lists(st.integers(-9, 9), min_size=size, max_size=size)), np.int64)
    if data.draw(st.booleans()):
        a, b = b, a
    check(node(operator, 2), [a, b])
    check(node(operator, 2), [a[:1].reshape(()), b])


@given(arrays, st.integers(-9, 9))
def test_division_truncates_or_is_left_alone(a: Array, divisor: int) -> None:
    assume(divisor != 0)
    made, inputs = node("Div", 2), [a, np.array([divisor])]
    try:
        check(made, inputs)
    except NotFolded:
        assert divisor < 0 or (a < 0).any()


@given(st.lists(st.booleans(), min_size=1, max_size=4), st.data())
def test_where(condition: list[bool], data: st.DataObject) -> None:
    draw = st.lists(st.integers(-9, 9), min_size=len(condition), max_size=len(condition))
    x, y = (np.array(data.draw(draw), np.int64) for _ in range(2))
    check(node("Where", 3), [np.array(condition), x, y])


@given(st.lists(st.integers(-9, 9), min_size=1, max_size=5), st.data())
def test_gather(values: list[int], data: st.DataObject) -> None:
    shape = data.draw(st.sampled_from([(), (1,), (3,), (2, 2)]))
    index = data.draw(
        st.lists(
            st.integers(-len(values), len(values) - 1),
            min_size=int(np.prod(shape)),
            max_size=int(np.prod(shape)),
        )
    )
    check(node("Gather", 2, axis=0), [np.array(values), np.array(index, np.int64).reshape(shape)])


@given(st.lists(st.integers(-9, 9), min_size=1, max_size=6), st.data())
def test_slice(values: list[int], data: st.DataObject) -> None:
    bound = st.one_of(st.integers(-8, 8), st.sampled_from([2**63 - 1, 2**31 - 1, -(2**63)]))
    start, end = data.draw(st.integers(-8, 8)), data.draw(bound)
    step = data.draw(st.sampled_from([1, 1, 2, -1]))
    assume(step > 0 or end < 2**31 - 1)
    inputs = [np.array(values), *(np.array([v], np.int64) for v in (start, end, 0, step))]
    expected = np.array(values)[slice(start, end, step)]
    got = fold(node("Slice", 5), [from_array(a) for a in inputs])
    np.testing.assert_array_equal(got.numpy().reshape(-1), expected)


@pytest.mark.parametrize(
    ("made", "inputs"),
    [
        (node("Unsqueeze", 2), [np.array(5), np.array([0])]),
        (node("Unsqueeze", 2), [np.array([5, 6]), np.array([0, 2])]),
        (node("Unsqueeze", 2), [np.array([5, 6]), np.array([-1])]),
        (node("Squeeze", 2), [np.array([[5], [6]]), np.array([1])]),
        (node("Squeeze", 2), [np.array([5]), np.array([0])]),
        (node("Squeeze", 1), [np.array([[5]])]),
        (node("Reshape", 2), [np.array([1, 2, 3, 4]), np.array([2, -1])]),
        (node("Reshape", 2), [np.array([[1, 2], [3, 4]]), np.array([0, 2, 1])]),
        (node("Reshape", 2), [np.array([7]), np.array([], np.int64)]),
        (node("Concat", 3, axis=0), [np.array([1]), np.array([2, 3]), np.array([4])]),
        (node("Concat", 2, axis=-1), [np.array([[1], [2]]), np.array([[3], [4]])]),
        (node("Range", 3), [np.array(2), np.array(9), np.array(3)]),
        (node("Range", 3), [np.array(5), np.array(0), np.array(-2)]),
        (node("Range", 3), [np.array(2), np.array(2), np.array(1)]),
        (node("Identity", 1), [np.array([1, 2])]),
        (node("ReduceProd", 1, keepdims=0), [np.array([2, 3, 4])]),
        (node("ReduceProd", 1, keepdims=1), [np.array([2, 3, 4])]),
        (node("Cast", 1, to=TensorProto.INT32), [np.array([1, 2])]),
        (node("Cast", 1, to=TensorProto.INT64), [np.array([True, False])]),
        (node("ConstantOfShape", 1, value=numpy_helper.from_array(np.array([7]))), [np.array([2, 3])]),
        (node("ConstantOfShape", 1, value=numpy_helper.from_array(np.array([7]))), [np.array([], np.int64)]),
        (node("Equal", 2), [np.array([True, False]), np.array([True, True])]),
    ],
    ids=lambda v: v.op_type if isinstance(v, onnx.NodeProto) else "",
)
def test_other_rules_follow_onnx(made: onnx.NodeProto, inputs: list[Array]) -> None:
    check(made, inputs)


@pytest.mark.parametrize("keepdims", [0, 1])
def test_a_product_over_one_axis_of_several_is_right_or_left_alone(keepdims: int) -> None:
    made = node("ReduceProd", 2, keepdims=keepdims)
    inputs = [np.array([[2, 3], [4, 5]]), np.array([0])]
    expected = onnx_says(made, inputs)
    try:
        got = fold(made, [from_array(a) for a in inputs])
    except NotFolded:
        return
    np.testing.assert_array_equal(got.numpy(), expected)


@st.composite
def _expressions(draw: st.DrawFn, depth: int = 3) -> tuple[Integers, Callable[[dict[str, int]], int]]:
    """A chain of nodes over symbols, and what it is for given values."""
    kind = draw(
        st.sampled_from(["symbol", "number"]) if depth == 0 else st.sampled_from(["symbol", "op", "op"])
    )
    if kind == "symbol":
        name = draw(st.sampled_from(sorted(SYMBOLS)))
        return Integers.of(np.array([SYMBOLS[name]], object)), lambda known: known[name]
    if kind == "number":
        number = draw(st.integers(0, 9))
        return Integers.of(np.array([number], object)), lambda known: number
    operator, plain = draw(
        st.sampled_from(
            [
                ("Add", lambda a, b: a + b),
                ("Sub", lambda a, b: a - b),
                ("Mul", lambda a, b: a * b),
                ("Max", max),
                ("Min", min),
            ]
        )
    )
    a, b = draw(_expressions(depth - 1)), draw(_expressions(depth - 1))
    return fold(node(operator, 2), [a[0], b[0]]), lambda known: plain(a[1](known), b[1](known))


@given(_expressions(), st.integers(1, 50), st.integers(0, 50))
def test_symbols_stand_for_all_their_values(expression: Any, s: int, p: int) -> None:
    folded, plain = expression
    known = {"s": s, "p": p}
    assert evaluate(folded.flat()[0], known) == plain(known)


@given(st.integers(1, 50), st.integers(1, 12))
def test_division_of_symbols(s: int, divisor: int) -> None:
    got = fold(
        node("Div", 2), [Integers.of(np.array([SYMBOLS["s"]], object)), from_array(np.array([divisor]))]
    )
    assert evaluate(got.flat()[0], {"s": s}) == s // divisor


def test_what_depends_on_a_symbol_is_folded_only_where_it_is_the_same_for_all() -> None:
    s, p = (Integers.of(np.array([SYMBOLS[n]], object)) for n in "sp")
    total = fold(node("Add", 2), [s, p])
    assert fold(node("Equal", 2), [total, total]).flat() == [True]
    assert fold(node("Equal", 2), [s, from_array(np.array([0]))]).flat() == [False]  # s is at least 1
    assert fold(node("Sub", 2), [total, p]).flat()[0].same_as(SYMBOLS["s"])
    with pytest.raises(NotFolded):
        fold(node("Equal", 2), [s, p])
    with pytest.raises(NotFolded):
        fold(node("Range", 3), [from_array(np.array(0)), s, from_array(np.array(1))])
    with pytest.raises(NotFolded):
        fold(node("Gather", 2, axis=0), [s, p])


@pytest.mark.parametrize("operator", ["MatMul", "NonZero", "Softmax"])
def test_other_operators_are_left_alone(operator: str) -> None:
    with pytest.raises(NotFolded):
        fold(node(operator, 1), [from_array(np.array([1]))])


def test_other_domains_are_left_alone() -> None:
    made = helper.make_node("Add", ["i0", "i1"], ["y"], domain="com.example")
    with pytest.raises(NotFolded):
        fold(made, [from_array(np.array([1])), from_array(np.array([1]))])


def test_large_or_fractional_constants_are_no_integers() -> None:
    assert from_array(np.zeros(1025, np.int64)) is None
    assert from_array(np.arange(192)) is not None  # elements of a head, as scatters name them
    assert from_array(np.zeros(2, np.float32)) is None
    small = from_array(np.array([[True], [False]]))
    assert small is not None
    assert (small.dtype, small.values.shape, small.static) == ("bool", (2, 1), True)
    assert not Integers.of(np.array([SYMBOLS["s"]], object)).static


def test_simplified_values_are_plain() -> None:
    made = folder()
    assert made.simplify(np.int64(3)) == 3
    assert made.simplify(np.bool_(True)) is True
    assert made.simplify(SYMBOLS["s"] - SYMBOLS["s"] + 2) == 2
    assert isinstance(made.simplify(SYMBOLS["s"] + 0), tirx.Var)
