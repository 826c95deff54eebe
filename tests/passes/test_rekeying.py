"""Keys made of values: which factors and which rotation, and keys that only look as if they were."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from rotary_graphs import turned
from test_rotations import (
    by_halves,
    halves,
    interleaved,
    the_other_way,
    with_other_cosines,
    with_scaled_cosines,
)
from tvm import relax
from tvm.relax import op
from value_graphs import DIM, KV_HEADS, attention, by_weight, norm

from kvc_passes.conditions import Unprovable
from kvc_passes.graph import Graph
from kvc_passes.rekeying import Rekeying, rekeying
from kvc_passes.state_forms import Forms
from support import Draft

HALF = DIM // 2
OTHERS = "has elements that are no elements of V, or others than it is turned with"


def read(*given: Any, tables: dict[str, np.ndarray] | None = None, **options: Any) -> Rekeying:
    module, _ = attention(*given, **options)
    forms = Forms(Graph(module["main"]))
    _, key, value, _ = forms.markers()[0].args[1:]
    return rekeying(forms.provenance, key, value, tables or {})


@pytest.mark.parametrize(
    ("kv_heads", "normed", "half", "turn"),
    [(1, True, HALF, turned), (KV_HEADS, False, 2, turned), (KV_HEADS, True, HALF, by_halves)],
)
def test_values_times_a_weight_then_turned(kv_heads: int, normed: bool, half: int, turn: Any) -> None:
    found = read(by_weight, turn, kv_heads=kv_heads, normed=normed, half=half)
    (factor,) = found.factors
    assert (factor.source.name, factor.first, factor.stride, factor.step) == ("weight", 0, 0, 1)
    assert (found.number, found.half, found.pairs, found.scaled) == (1.0, half, half, True)
    assert found.angles is not None
    assert [angle[0].name.partition("_")[0] for angle in (found.angles.cosine, found.angles.sine)] == [
        "cos",
        "sin",
    ]


def test_values_as_they_are() -> None:
    found = read(lambda emit, x, w: x, None)
    assert found == Rekeying((), 1.0)
    assert not found.scaled


def one_more(emit: Draft, x: relax.Var, weight: relax.Var) -> relax.Expr:
    """x * (1 + weight) / 4, as Gemma's norms before the fourth, with a number beside."""
    more = emit(op.add(weight, relax.const(np.float32(1))), "more")
    return op.multiply(emit(op.multiply(x, more)), relax.const(np.float32(0.25)))


def test_a_weight_that_is_computed_and_a_number() -> None:
    found = read(one_more)
    assert found.factors[0].source.name.startswith("more")
    assert (found.number, found.scaled) == (0.25, True)


def a_head(emit: Draft, x: relax.Var, weight: relax.Var) -> relax.Expr:
    table = relax.const(np.arange(KV_HEADS * DIM, dtype=np.float32).reshape(KV_HEADS, DIM))
    return op.multiply(x, table)


def test_factors_of_every_head() -> None:
    (factor,) = read(a_head).factors
    assert (factor.first, factor.stride, factor.step) == (0, DIM, 1)


def test_angles_that_are_always_zero_are_none() -> None:
    speeds = np.float32([1, 0.5, 0, 0.25, 0, 0])
    found = read(tables={"speeds": speeds})
    assert (found.half, found.pairs) == (HALF, 4)  # the first zero stands before one that is none
    still = read(tables={"speeds": np.zeros(HALF, np.float32)})
    assert (still.half, still.angles) == (0, None)
    assert read(tables={"other": speeds}).pairs == HALF


def of_another_norm(emit: Draft, x: relax.Var, weight: relax.Var) -> relax.Expr:
    return op.multiply(norm(emit, emit(op.add(x, relax.const(np.float32(1))))), weight)


def other_heads(emit: Draft, x: relax.Var, weight: relax.Var) -> relax.Expr:
    return op.take(x, relax.const(np.array([1, 0])), axis=2, mode="clip")


def shifted(emit: Draft, x: relax.Var, weight: relax.Var) -> relax.Expr:
    return op.take(x, relax.const((np.arange(DIM) + 1) % DIM), axis=3, mode="clip")


def by_token(emit: Draft, x: relax.Var, weight: relax.Var) -> relax.Expr:
    return op.multiply(x, emit(op.mean(x, axis=[3], keepdims=True)))


def added(emit: Draft, x: relax.Var, weight: relax.Var) -> relax.Expr:
    return op.add(x, weight)


def backwards(emit: Draft, x: relax.Var, cosine: relax.Var, sine: relax.Var) -> relax.Var:
    (a, b), (c, _), (s, _) = (halves(emit, v) for v in (x, cosine, sine))
    low = emit(op.add(emit(op.multiply(a, c)), emit(op.multiply(b, s))))
    high = emit(op.subtract(emit(op.multiply(b, c)), emit(op.multiply(a, s))))
    return emit(op.concat([low, high], axis=-1))


def half_scaled(emit: Draft, x: relax.Var) -> relax.Expr:
    first, rest = (emit(op.strided_slice(x, [3], [a], [a + HALF], assume_inbound=True)) for a in (0, HALF))
    return op.concat([emit(op.multiply(first, relax.const(np.float32(2)))), rest], axis=-1)


def both_on_one(emit: Draft, x: relax.Var, cosine: relax.Var, sine: relax.Var) -> relax.Var:
    """a cos sin - b, b cos sin + a: no rotation, though it has a cosine and a sine."""
    (a, b), (c, _), (s, _) = (halves(emit, v) for v in (x, cosine, sine))
    low, high = (emit(op.multiply(emit(op.multiply(y, c)), s)) for y in (a, b))
    return emit(op.concat([emit(op.subtract(low, b)), emit(op.add(high, a))], axis=-1))


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ((by_weight, backwards), {}, "is turned with other signs"),
        ((by_weight, both_on_one), {}, "is no sum of two products with what depends on positions"),
        ((by_weight, with_scaled_cosines), {}, "by other cosines or sines in its second half"),
        ((by_weight, the_other_way), {}, "by other cosines or sines in its second half"),
        ((by_weight, with_other_cosines), {}, "by other cosines or sines in its second half"),
        ((by_weight, interleaved), {}, OTHERS),
        ((of_another_norm,), {}, "goes through power"),
        ((other_heads,), {}, OTHERS),
        ((other_heads, None), {}, OTHERS),
        ((shifted, None), {}, OTHERS),
        ((by_token,), {}, "goes through mean"),
        ((added, None), {}, OTHERS),
        ((lambda emit, x, w: op.tanh(x),), {}, "goes through tanh"),
        ((lambda emit, x, w: op.multiply(x, x),), {}, "is multiplied with itself"),
        ((lambda emit, x, w: op.negative(x), None), {}, "is not V times factors of its elements"),
        ((by_weight,), {"moved": half_scaled}, "scaled in several ways"),
        ((lambda emit, x, w: op.multiply(x, w),), {"moved": lambda emit, k: op.tanh(k)}, "goes through tanh"),
    ],
)
def test_keys_that_are_no_values(given: tuple[Any, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(Unprovable, match=message):
        read(*given, **options)
