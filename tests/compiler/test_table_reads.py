"""Tables that an encoder reads: every index has a row, up to a longest request, or the node is refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import NodeProto, TensorProto, helper, numpy_helper

from kvc.planning.budget import LONGEST
from kvc_passes.errors import UnsupportedModel
from support import OnnxRuntime

from .encoder_files import save
from .test_encoder import WIDTH, read

Nodes = list[tuple[str, str, str, dict[str, Any]]]
NUMBERS: dict[str, Any] = {
    "zero": 0, "one": 1, "two": 2, "seven": 7, "eight": 8, "last": 15, "n_axis": [1], "column": [[1]],
    "zero_axis": [0], "three": [3], "eight_f": np.float32(8), "wide": np.float32(2.7725887),
}  # fmt: skip


def encoder(path: Path, nodes: Nodes, rows: int = 16, read_by: Sequence[NodeProto] | None = None) -> Path:
    """rows = features [batch,n,64] + what a table [rows,64] has at `index`, a value [n] or [n,n] of `nodes`.

    Values: `range` 0 .. n - 1, `n`, `x0` the first feature of each row [n], mask [batch,n], NUMBERS.
    """
    table = np.random.default_rng(0).standard_normal((rows, WIDTH)).astype(np.float32)
    tensors = [numpy_helper.from_array(np.asarray(a), name) for name, a in NUMBERS.items()]
    tensors.append(numpy_helper.from_array(table, "table"))
    first: Nodes = [
        ("Shape", "features", "shape", {}),
        ("Gather", "shape one", "n", {}),
        ("Range", "zero n one", "range", {}),
        ("ReduceMax", "features", "x1", {"axes": [0, 2], "keepdims": 0}),
        ("Identity", "x1", "x0", {}),
    ]
    made = [helper.make_node(op, args.split(), [out], **attrs) for op, args, out, attrs in [*first, *nodes]]
    last = read_by or [
        helper.make_node("Gather", ["table", "index"], ["found"], name="/lookup"),
        helper.make_node("Add", ["features", "found"], ["rows"]),
    ]
    shape = ["batch", "n", WIDTH]
    inputs = {"features": shape, "attention_mask": ["batch", "n"]}
    return save(path, [*made, *last], inputs, shape, tensors)


def longest(path: Path) -> int:
    return read(path).extents.most


DISTANCES: Nodes = [
    ("Unsqueeze", "range zero_axis", "row", {}),
    ("Unsqueeze", "range n_axis", "columns", {}),
    ("Sub", "columns row", "distance", {}),
]
MEAN = [
    helper.make_node("Gather", ["table", "index"], ["each"], name="/lookup"),
    helper.make_node("ReduceMean", ["each"], ["found"], axes=[1], keepdims=0),
    helper.make_node("Add", ["features", "found"], ["rows"]),
]
"""Of an index [n,n]."""
BOUNDED: dict[str, tuple[Nodes, int]] = {
    "positions": ([("Identity", "range", "index", {})], 16),
    "a constant before": ([("Add", "two range", "index", {})], 14),
    "a constant behind": ([("Add", "range two", "index", {})], 14),
    "every second": ([("Mul", "range two", "index", {})], 8),
    "from the end": ([("Sub", "n range", "left", {}), ("Sub", "left one", "index", {})], 16),
    "of a mask": (
        [
            ("Cast", "attention_mask", "ones", {"to": TensorProto.INT64}),
            ("CumSum", "ones one", "sums", {}),
            ("Sub", "sums one", "all", {}),
            ("Squeeze", "all zero_axis", "index", {}),
        ],
        16,
    ),
    "of the request's own rows": (
        [
            ("Neg", "one", "end", {}),
            ("Gather", "range end", "final", {}),
            ("Min", "final last", "index", {}),
        ],
        LONGEST,
    ),
    "clipped": ([("Min", "range last", "index", {})], LONGEST),
    "of a float, clipped": (
        [
            ("Cast", "x0", "whole", {"to": TensorProto.INT64}),
            ("Max", "whole zero", "least", {}),
            ("Min", "least last", "index", {}),
        ],
        LONGEST,
    ),
    "chosen": (
        [("Less", "range last", "small", {}), ("Where", "small range last", "index", {})],
        LONGEST,
    ),
}


@pytest.mark.parametrize(("nodes", "most"), BOUNDED.values(), ids=BOUNDED)
def test_the_longest_request_is_that_of_the_table(tmp_path: Path, nodes: Nodes, most: int) -> None:
    assert longest(encoder(tmp_path / "encoder.onnx", nodes)) == most


def test_distances(tmp_path: Path) -> None:
    """i - j + 15 of 31 rows, and a bucket of it by its logarithm, as T5 has them."""
    moved: Nodes = [*DISTANCES, ("Add", "distance last", "index", {})]
    assert longest(encoder(tmp_path / "moved.onnx", moved, rows=31, read_by=MEAN)) == 16
    bucket: Nodes = [
        *DISTANCES,
        ("Abs", "distance", "d", {}),
        ("Less", "d eight", "near", {}),
        ("Cast", "d", "d_f", {"to": TensorProto.FLOAT}),
        ("Div", "d_f eight_f", "ratio", {}),
        ("Log", "ratio", "log", {}),
        ("Div", "log wide", "share", {}),
        ("Mul", "share eight_f", "steps", {}),
        ("Cast", "steps", "steps_i", {"to": TensorProto.INT64}),
        ("Add", "steps_i eight", "far", {}),
        ("Min", "far last", "most", {}),
        ("Where", "near d most", "index", {}),
    ]
    assert longest(encoder(tmp_path / "bucket.onnx", bucket, read_by=MEAN)) == LONGEST
    other = [("Where", "near most d", "index", {}) if out == "index" else (o, i, out, a)
             for o, i, out, a in bucket]  # fmt: skip
    with pytest.raises(UnsupportedModel, match="node '/lookup' "):
        longest(encoder(tmp_path / "other.onnx", other, read_by=MEAN))


REFUSED: dict[str, tuple[Nodes, str]] = {
    "of a float": ([("Cast", "x0", "index", {"to": TensorProto.INT64})], "the table has 16 rows"),
    "cut on one side": (
        [("Cast", "x0", "whole", {"to": TensorProto.INT64}), ("Min", "whole last", "index", {})],
        "the table has 16 rows",
    ),
    "behind the table": ([("Add", "range last", "far", {}), ("Add", "far one", "index", {})], "16 .. 16"),
    "of another place": (
        [
            ("Cast", "x0", "whole", {"to": TensorProto.INT64}),
            ("Abs", "whole", "positive", {}),
            ("Less", "positive last", "small", {}),
            ("Sub", "n range", "left", {}),
            ("Sub", "left one", "backwards", {}),
            ("Gather", "positive backwards", "others", {}),
            ("Where", "small others zero", "index", {}),
        ],
        "the table has 16 rows|one of its",
    ),
    "wrapping": (
        [
            ("Cast", "range", "narrow", {"to": TensorProto.INT8}),
            ("Cast", "narrow", "again", {"to": TensorProto.INT64}),
            ("Max", "again zero", "index", {}),
        ],
        "the table has 16 rows",
    ),
}


@pytest.mark.parametrize(("nodes", "message"), REFUSED.values(), ids=REFUSED)
def test_an_index_without_a_bound_is_refused(tmp_path: Path, nodes: Nodes, message: str) -> None:
    with pytest.raises(UnsupportedModel, match=rf"node '.*' \(Gather\) reads a table at .*({message})"):
        longest(encoder(tmp_path / "encoder.onnx", nodes))


@pytest.mark.parametrize("operator", ["GatherND", "GatherElements"])
def test_other_reads(tmp_path: Path, operator: str) -> None:
    """Of the request's own rows: at the positions, and behind them."""
    whole = helper.make_node("Unsqueeze", ["index", "n_axis"], ["column_index"])
    by_row = [
        whole,
        helper.make_node("Expand", ["column_index", "shape_2"], ["at"]),
        helper.make_node("Squeeze", ["features", "zero_axis"], ["flat"]),
        helper.make_node("GatherElements", ["flat", "at"], ["found"], axis=0, name="/lookup"),
    ]
    pairs = [
        whole,
        helper.make_node("Mul", ["column_index", "zero"], ["first"]),
        helper.make_node("Concat", ["first", "column_index"], ["at"], axis=1),
        helper.make_node("GatherND", ["features", "at"], ["found"], name="/lookup"),
    ]
    add = helper.make_node("Add", ["features", "found"], ["rows"])
    reads = [*(pairs if operator == "GatherND" else by_row), add]
    shape: Nodes = [("Slice", "shape n_axis three", "shape_2", {})]
    good = encoder(tmp_path / "good.onnx", [*shape, ("Identity", "range", "index", {})], read_by=reads)
    assert longest(good) == LONGEST
    bad = encoder(tmp_path / "bad.onnx", [*shape, ("Add", "range one", "index", {})], read_by=reads)
    with pytest.raises(UnsupportedModel, match=rf"node '/lookup' \({operator}\) reads a table .*cannot be"):
        longest(bad)


def test_bounds_hold_for_what_is_computed(tmp_path: Path) -> None:
    """ONNX Runtime reads every row of the longest request, and refuses a longer one."""
    path = encoder(tmp_path / "encoder.onnx", BOUNDED["a constant before"][0])
    runtime = OnnxRuntime(path)
    most = longest(path)
    given = [np.zeros((1, n, WIDTH), np.float32) for n in (most, most + 1)]
    masks = [np.ones((1, n), np.float32) for n in (most, most + 1)]
    (rows,) = runtime.run({"features": given[0], "attention_mask": masks[0]})
    assert np.abs(rows[0]).max(axis=1).all()
    with pytest.raises(Exception, match="out of data bounds"):
        runtime.run({"features": given[1], "attention_mask": masks[1]})
