"""FlattenTokens: a batch of sequences becomes one list of tokens that computes the same."""

from __future__ import annotations

import numpy as np
import pytest
from flat_graphs import ROLES, SHAPES, SITES, VOCAB, WEIGHTS, decoder, tokens_and_positions

from kvc_passes.flatten_tokens import FlattenTokens
from kvc_passes.graph import Graph, dims
from support import params_of, run_markers, shape_of


def test_every_value_has_one_token_axis_behind_a_batch_of_one() -> None:
    result = FlattenTokens(ROLES).run(decoder()[0])
    function = result.module["main"]
    assert params_of(result.module) == ["tokens", "positions", *SHAPES]
    assert [shape_of(p) for p in function.params[:2]] == [["n"], ["n"]]
    assert shape_of(function.body.body) == ["1", "n", str(VOCAB)]
    symbols = {str(d) for v in Graph(function).order for d in dims(v)} & {"batch", "sequence"}
    assert symbols == set()


@pytest.mark.parametrize("ids", ["int64", "int32"])
def test_the_tokens_of_one_sequence_compute_the_same(ids: str) -> None:
    before = decoder(ids)[0]
    after = FlattenTokens(ROLES).run(before).module
    assert after["main"].params[0].ty.dtype.dtype == "int64"
    tokens, positions = tokens_and_positions(9)
    weights = list(WEIGHTS.values())
    (expected,) = run_markers(before, SITES, tokens[None].astype(ids), positions, *weights)
    (got,) = run_markers(after, SITES, tokens, positions, *weights)
    np.testing.assert_array_equal(got, expected)
