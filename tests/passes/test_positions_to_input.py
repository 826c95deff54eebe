"""PositionsToInput: every spelling of the tokens' positions becomes one input, other counts are refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from attention_graphs import Context, i64
from tvm import relax
from tvm.relax import op

from kvc_passes.errors import UnsupportedModel
from kvc_passes.positions_to_input import PositionsToInput
from support import module_of, ops, param, params_of, run

TABLE = np.arange(64, dtype=np.float32).reshape(32, 2)


def arange(emit: Any, c: Context) -> Any:
    return emit(op.arange(c.start, c.total, 1, "int64"))


def arange_plus_past(emit: Any, c: Context) -> Any:
    past = emit(op.shape_to_tensor(relax.ShapeExpr([c.start])))
    return emit(op.add(emit(op.arange(0, c.sequence, 1, "int64")), past))


def broadcast(emit: Any, c: Context) -> Any:
    return emit(op.broadcast_to(emit(op.expand_dims(arange(emit, c), 0)), [c.batch, c.sequence]))


def narrow(emit: Any, c: Context) -> Any:
    return emit(op.astype(arange(emit, c), "int32"))


def counted(emit: Any, c: Context) -> Any:
    """cumsum(attention_mask) - 1, the last `sequence` of it."""
    count = emit(op.subtract(emit(op.cumsum(c.padding, axis=1)), i64(1)))
    return emit(op.strided_slice(count, [1], [c.start], [c.total], assume_inbound=True))


def given(emit: Any, c: Context) -> Any:
    return c.positions


def shifted(emit: Any, c: Context) -> Any:
    """Positions counted from two, as OPT has them."""
    return emit(op.add(counted(emit, c), i64(2)))


SPELLINGS = {
    "counted from two": (shifted, True),
    "arange": (arange, False),
    "arange from the past": (arange, True),
    "arange plus the past": (arange_plus_past, True),
    "broadcast to the batch": (broadcast, True),
    "int32": (narrow, True),
    "position_ids": (given, True),
    "cumulative sum over the attention mask": (counted, True),
    "cumulative sum without past": (counted, False),
}


def module(spelling: Any, past: bool) -> Any:
    c = Context(past)
    table = param("table", [32, 2])

    def body(emit: Any, *_: Any) -> Any:
        index = spelling(emit, c)
        if len(index.ty.shape.values) == 1:
            index = emit(op.expand_dims(index, 0))
        rows = emit(op.take(table, index, axis=0))
        words = emit(op.expand_dims(emit(op.astype(c.tokens, "float32")), 2))
        return emit(op.add(rows, words))

    params = [c.tokens, c.padding, c.positions, *c.past, table]
    built, names = module_of(params, body)
    return built, c.roles, names


@pytest.mark.parametrize(("spelling", "past"), SPELLINGS.values(), ids=SPELLINGS)
def test_a_spelling_becomes_the_input(spelling: Any, past: bool) -> None:
    before, roles, names = module(spelling, past)
    result = PositionsToInput(roles, names).run(before)
    assert params_of(result.module) == ["input_ids", "positions", "table"]
    assert ops(result.module)["arange"] == ops(result.module)["cumsum"] == 0
    assert result.sites == len(result.facts) > 0
    length, start = 5, 7 if past else 0
    tokens = np.arange(length)[None]
    positions = np.arange(start, start + length)
    pasts = [np.zeros((1, 2, start, 8), np.float32)] * (2 if past else 0)
    old = [tokens, np.ones((1, start + length), np.int64), positions[None], *pasts, TABLE]
    np.testing.assert_array_equal(run(result.module, tokens, positions, TABLE)[0], run(before, *old)[0])


def test_any_positions_may_be_given() -> None:
    before, roles, names = module(arange, past=False)
    after = PositionsToInput(roles, names).run(before).module
    positions = np.array([9, 0, 3])
    (got,) = run(after, np.zeros((1, 3), np.int64), positions, TABLE)
    np.testing.assert_array_equal(got[0], TABLE[positions])


def test_the_facts_name_nodes_and_inputs() -> None:
    before, roles, names = module(arange, past=True)
    assert PositionsToInput(roles, names).run(before).facts[0] == "arange_0"
    before, roles, names = module(given, past=True)
    assert "position_ids" in PositionsToInput(roles, names).run(before).facts


def backwards(emit: Any, c: Context) -> Any:
    return emit(op.subtract(i64(31), emit(op.arange(0, c.sequence, 1, "int64"))))


def without_past(emit: Any, c: Context) -> Any:
    return emit(op.arange(0, c.sequence, 1, "int64"))


@pytest.mark.parametrize(
    ("spelling", "past"),
    [(backwards, True), (without_past, True)],
    ids=["backwards", "the past forgotten"],
)
def test_another_count_over_tokens_is_refused(spelling: Any, past: bool) -> None:
    before, roles, names = module(spelling, past)
    with pytest.raises(
        UnsupportedModel,
        match=r"node 'arange_\d+' \(arange\) counts over tokens, but is not proved to be their positions",
    ):
        PositionsToInput(roles, names).run(before)


def test_positions_that_are_computed_with_stay() -> None:
    def doubled(emit: Any, c: Context) -> Any:
        return emit(op.multiply(arange(emit, c), i64(2)))

    before, roles, names = module(doubled, past=False)
    after = PositionsToInput(roles, names).run(before).module
    (got,) = run(after, np.zeros((1, 2), np.int64), np.array([4, 1]), TABLE)
    np.testing.assert_array_equal(got[0], TABLE[[8, 2]])


@pytest.mark.parametrize("name", ["attention_mask", "past_k"])
def test_other_uses_of_mask_and_past_are_refused(name: str) -> None:
    c = Context(past=True)

    def body(emit: Any, *_: Any) -> Any:
        value = c.padding if name == "attention_mask" else c.past[0]
        used = emit(op.astype(emit(op.max(value)), "float32"), "/model/Odd")
        return emit(op.add(emit(op.astype(c.tokens, "float32")), used))

    built, names = module_of([c.tokens, c.padding, c.positions, *c.past], body)
    with pytest.raises(
        UnsupportedModel, match=rf"node '.*' \(max\) uses the input '{name}' for something other"
    ):
        PositionsToInput(c.roles, names).run(built)


@pytest.mark.parametrize(
    "length",
    [
        lambda e, c: e(op.arange(c.start, c.start + 1, 1, "int64")),
        lambda e, c: e(
            op.strided_slice(i64(np.arange(64)), [0], [c.start], [c.start + 1], assume_inbound=True)
        ),
        lambda e, c: e(op.sum(e(op.zeros([c.total], "int64")), keepdims=True)),
    ],
    ids=["counted", "read", "summed"],
)
def test_the_length_of_the_past_as_a_number_is_refused(length: Any) -> None:
    c = Context(past=True)

    def body(emit: Any, *_: Any) -> Any:
        return emit(op.add(c.tokens, length(emit, c)))

    built, names = module_of([c.tokens, c.padding, c.positions, *c.past], body)
    with pytest.raises(UnsupportedModel, match="depends on the length of the past; only attention may"):
        PositionsToInput(c.roles, names).run(built)
