"""BoundContext: choices by the sequence's length are decided, and the length for which they hold is found."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tvm import relax
from tvm.relax import op

from kvc_passes.bound_context import BoundContext
from kvc_passes.errors import UnsupportedModel
from kvc_passes.facts import Roles
from support import floats, module_of, ops, param, run, symbol

B, S, PAST = symbol("batch"), symbol("sequence"), symbol("past")
TOKENS = param("input_ids", [B, S], "int64")
GIVEN = param("position_ids", [B, S], "int64")
PAST_K = param("past_k", [B, 2, PAST, 4])
SHORT, LONG = param("short", [4]), param("long", [4])


def i64(value: int) -> relax.Expr:
    return relax.const(value, "int64")


def counted(emit: Any, start: Any = 0) -> Any:
    return emit(op.expand_dims(emit(op.arange(start, start + S, 1, "int64")), 0))


def chosen(condition: Any, positions: Any = counted, past: bool = False) -> Any:
    """Frequencies chosen by `condition(emit, largest position)`, times positions: [1 or b, s, 4]."""
    params = [TOKENS, GIVEN, *([PAST_K] if past else []), SHORT, LONG]

    def body(emit: Any, *_: Any) -> Any:
        at = positions(emit)
        picked = emit(op.where(condition(emit, emit(op.max(at))), LONG, SHORT))
        numbers = emit(op.expand_dims(emit(op.astype(at, "float32")), 2))
        return emit(op.multiply(numbers, picked))

    mod, names = module_of(params, body)
    roles = Roles("input_ids", None, "position_ids", ("past_k",) if past else ())
    return BoundContext(roles, names).run(mod), mod


def longer_than(limit: int) -> Any:
    return lambda e, largest: e(op.greater(e(op.add(largest, i64(1))), i64(limit)))


CASES = {
    "counted": (longer_than(32), counted, False),
    "given": (longer_than(32), lambda e: GIVEN, False),
    "given behind a past": (longer_than(32), lambda e: GIVEN, True),
    "counted behind a past": (longer_than(32), lambda e: counted(e, PAST), True),
    "at least": (lambda e, m: e(op.greater_equal(m, i64(32))), counted, False),
    "the other way round": (lambda e, m: e(op.less(i64(31), m)), counted, False),
}


@pytest.mark.parametrize(("condition", "positions", "past"), CASES.values(), ids=CASES)
def test_the_choice_for_short_sequences_is_taken_up_to_their_length(
    condition: Any, positions: Any, past: bool
) -> None:
    result, mod = chosen(condition, positions, past)
    assert (result.sites, result.facts) == (1, 32)
    assert ops(result.module)["max"] == 0
    length = 27
    inputs: list[Any] = [np.zeros((1, length), np.int64), np.arange(5, 5 + length)[None] if past else None]
    inputs[1] = np.arange(length)[None] if inputs[1] is None else inputs[1]
    inputs += [floats(1, 2, 5, 4)] if past else []
    inputs += [floats(4), floats(4, seed=1)]
    np.testing.assert_array_equal(run(result.module, *inputs)[0], run(mod, *inputs)[0])


def test_without_a_choice_nothing_is_bounded() -> None:
    mod, names = module_of([TOKENS], lambda emit, t: emit(op.add(t, i64(1))))
    result = BoundContext(Roles("input_ids"), names).run(mod)
    assert (result.sites, result.facts) == (0, None)
    assert result.module.same_as(mod)


def test_a_choice_that_never_changes_bounds_nothing() -> None:
    result, _ = chosen(lambda e, m: e(op.less(m, i64(0))))
    assert (result.sites, result.facts) == (1, None)


def test_a_choice_that_changes_twice_is_refused() -> None:
    def parity(emit: Any, largest: Any) -> Any:
        return emit(op.equal(emit(op.floor_mod(largest, i64(2))), i64(0)))

    with pytest.raises(UnsupportedModel, match=r"node 'equal_\d+' .* with several numbers"):
        chosen(parity)


def at_one_length(emit: Any, largest: Any) -> Any:
    return emit(op.equal(largest, i64(5000)))


def between(emit: Any, largest: Any) -> Any:
    return emit(op.less(emit(op.floor_mod(largest, i64(100000))), i64(60000)))


@pytest.mark.parametrize("choice", [at_one_length, between])
def test_a_choice_at_lengths_that_no_sample_meets_is_refused(choice: Any) -> None:
    with pytest.raises(UnsupportedModel, match=r"node '\w+' .* with several numbers"):
        chosen(choice)


def test_a_maximum_of_data_is_left_for_the_proof_that_tokens_do_not_mix() -> None:
    mod, names = module_of([TOKENS], lambda emit, t: emit(op.greater(emit(op.max(t)), i64(3))))
    assert BoundContext(Roles("input_ids"), names).run(mod).sites == 0
