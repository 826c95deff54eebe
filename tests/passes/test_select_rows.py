"""SelectRows: what no attention reads is computed for the asked rows alone."""

from __future__ import annotations

import numpy as np
import pytest
from flat_graphs import SITES, VOCAB, WEIGHTS, flat, tokens_and_positions

from kvc_passes.graph import Graph, op_name
from kvc_passes.select_rows import SelectRows
from support import params_of, run_markers, shape_of


def test_the_last_layers_outer_part_works_on_the_asked_rows() -> None:
    module = SelectRows().run(flat()).module
    function = module["main"]
    assert params_of(module)[:4] == ["tokens", "positions", "rows", "embedding"]
    assert (shape_of(function.params[2]), function.params[2].ty.dtype.dtype) == (["r"], "int32")
    assert shape_of(function.body.body) == ["1", "r", str(VOCAB)]
    graph = Graph(function)
    products = [shape_of(v)[1] for v in graph.order if op_name(graph.definitions[v]) == "matmul"]
    assert products == ["n"] * 3 + ["n"] + ["n"] * 3 + ["r"] * 2  # q, k, v, output, q, k, v; output, logits
    picks = [v for v in graph.order if op_name(graph.definitions[v]) == "take" and shape_of(v)[1] == "r"]
    assert len(picks) == 2  # what attention gives, and the residual


@pytest.mark.parametrize("rows", [[8], [0], [3, 8, 1], [5, 5], list(range(9))])
def test_the_asked_rows_are_those_of_the_whole(rows: list[int]) -> None:
    before = flat()
    after = SelectRows().run(before).module
    tokens, positions = tokens_and_positions(9)
    weights = list(WEIGHTS.values())
    (expected,) = run_markers(before, SITES, tokens, positions, *weights)
    (got,) = run_markers(after, SITES, tokens, positions, np.array(rows, np.int32), *weights)
    np.testing.assert_array_equal(got, expected[:, rows])
