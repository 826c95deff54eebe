"""Random small programs of Relax operations beside what numpy computes for them."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st
from tvm import relax, tirx
from tvm.relax import op

from kvc_passes.graph import dims, static
from support import Draft, evaluate, symbol

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
