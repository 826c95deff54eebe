from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_machines import MACHINES
from tvm import tirx

from kvc.kernels.emit import Emitter, argument, compiled, i64, splat, vec
from kvc.kernels.predicate import condition, names

LANES = 16
MACHINE = MACHINES["native"]


def evaluate(predicate: str, q: int, h: int, k: int) -> list[bool]:
    """The predicate at keys k .. k + 15, by a compiled kernel."""
    e = Emitter()
    inputs = argument("inputs", (3,), "int32")
    out = argument("out", (LANES,), "int32")
    scalars = [inputs[i64(i)] for i in range(3)]
    values: dict[str, Any] = {name: splat(value, LANES) for name, value in zip("qh", scalars)}
    values["k"] = vec(scalars[2], LANES)
    one, zero = (splat(tirx.const(value, "int32"), LANES) for value in (1, 0))
    e.store(out, tirx.Select(condition(predicate, values), one, zero), vec(i64(0), LANES))
    kernel = compiled(e.function([inputs, out], [inputs], [out]), MACHINE.target)
    result = MACHINE.call(kernel, np.array([q, h, k], np.int32), np.full(LANES, 7, np.int32))[-1]
    assert set(result) <= {0, 1}
    return [bool(value) for value in result]


def numbers() -> st.SearchStrategy[str]:
    leaves = st.sampled_from(["q", "k", "h"]) | st.integers(-50, 50).map(str)
    divisors = st.integers(1, 40) | st.integers(-40, -1)

    def grow(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
        return (
            st.tuples(inner, st.sampled_from("+-*"), inner).map(lambda t: f"({t[0]} {t[1]} {t[2]})")
            | st.tuples(inner, st.sampled_from(["//", "%"]), divisors).map(
                lambda t: f"({t[0]}) {t[1]} {t[2]}"
            )
            | st.tuples(st.sampled_from(["min", "max"]), inner, inner).map(
                lambda t: f"{t[0]}({t[1]}, {t[2]})"
            )
            | inner.map(lambda text: f"-({text})")
        )

    return st.recursive(leaves, grow, max_leaves=5)


def predicates() -> st.SearchStrategy[str]:
    comparison = st.sampled_from(["<", "<=", ">", ">=", "==", "!="])
    pair = st.tuples(numbers(), comparison, numbers()).map(" ".join)
    chain = st.tuples(numbers(), comparison, numbers(), comparison, numbers()).map(" ".join)
    leaves = pair | chain | st.sampled_from(["True", "False"])

    def grow(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
        joined = st.tuples(inner, st.sampled_from(["and", "or"]), inner).map(
            lambda t: f"({t[0]} {t[1]} {t[2]})"
        )
        return joined | inner.map(lambda text: f"not ({text})")

    return st.recursive(leaves, grow, max_leaves=4)


@settings(max_examples=60, deadline=None)
@given(predicates(), st.integers(0, 300), st.integers(0, 40), st.integers(0, 300))
def test_vectors_agree_with_python(predicate: str, q: int, h: int, k: int) -> None:
    function = eval(f"lambda q, k, h: {predicate}")
    assert evaluate(predicate, q, h, k) == [bool(function(q, k + i, h)) for i in range(LANES)]


@pytest.mark.parametrize("divisor", [7, -7, 8, -8, 1, -1])
def test_quotients_are_rounded_down(divisor: int) -> None:
    for expected in (-3, -2, -1, 0, 1, 2):
        predicate = f"(k - 8) // {divisor} == {expected}"
        assert evaluate(predicate, 0, 0, 0) == [(k - 8) // divisor == expected for k in range(LANES)]
        predicate = f"(k - 8) % {divisor} == {expected}"
        assert evaluate(predicate, 0, 0, 0) == [(k - 8) % divisor == expected for k in range(LANES)]


def test_the_names_that_are_read() -> None:
    assert names("k <= q") == {"q", "k"}
    assert names("k <= q and min(h, 3) > 1") == {"q", "k", "h"}
    assert names("True") == set()


@pytest.mark.parametrize(
    ("predicate", "message"),
    [
        ("", "is not an expression"),
        ("k <=", "is not an expression"),
        ("k = q", "is not an expression"),
        ("k", "'k' is no condition"),
        ("k and q", "'k' is no condition"),
        ("k - q", "'k - q' is no condition"),
        ("1", "'1' is no condition"),
        ("None", "'None' is no condition"),
        ("min(k, q)", "is no condition"),
        ("True if k < q else False", "is no condition"),
        ("k <= x", "'x' is no number"),
        ("k <= 1.5", "'1.5' is no number"),
        ("k <= True", "'True' is no number"),
        ("k <= (q < 3)", "'q < 3' is no number"),
        ("k <= q / 2", "'q / 2' is no number"),
        ("k <= q ** 2", "is no number"),
        ("k <= q << 1", "is no number"),
        ("k <= abs(q)", r"'abs\(q\)' is no number"),
        ("k <= min(q)", r"'min\(q\)' is no number"),
        ("k <= min(q, 1, key=h)", "is no number"),
        ("k <= q.real", "is no number"),
        ("k <= __import__('os').getpid()", "is no number"),
        ("k in (q, 1)", "is no comparison of numbers|is no number"),
        ("k is q", "is no comparison of numbers"),
        ("k % 0 == 1", "divides by"),
        ("k // h == 1", "divides by"),
        ("k <= 2147483648", "more than 32 bits"),
    ],
)
def test_anything_else_is_refused(predicate: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        names(predicate)
    assert repr(predicate) in str(error.value)
