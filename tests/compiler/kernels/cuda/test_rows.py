"""Weights row by row: shapes, and codes of four bits where the kernels look for them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvc.kernels.cuda import rows
from kvc_passes.kernel_sets import TensorType
from kvc_passes.weight_format import WeightFormat


@given(st.integers(1, 40), st.integers(1, 300), st.integers(0, 9))
def test_codes_of_four_bits(columns: int, depth: int, seed: int) -> None:
    """Read as rows.py describes them: of 64 inputs byte i holds input i low and input 32 + i high."""
    codes = np.random.default_rng(seed).integers(0, 16, (columns, depth)).astype(np.uint8)
    format = WeightFormat("uint4", 32, "float16", False)
    out = np.full(rows.packed_tensors(columns, depth, format)[0].shape, 255, np.uint8)
    rows.pack_codes(codes, format, out)
    for k in range(depth):
        byte = out[:, k // 64 * 32 + k % 32]
        np.testing.assert_array_equal(byte >> 4 if k % 64 >= 32 else byte & 15, codes[:, k])
    assert out.shape[1] == -(-depth // 64) * 32


def test_more_rows_than_are_packed_at_once() -> None:
    codes = np.random.default_rng(1).integers(0, 16, (2500, 64)).astype(np.uint8)
    format = WeightFormat("uint4", 64, "float16", False)
    out = np.empty((2500, 32), np.uint8)
    rows.pack_codes(codes, format, out)
    np.testing.assert_array_equal(out & 15, codes[:, :32])
    np.testing.assert_array_equal(out >> 4, codes[:, 32:])


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(("dtype", "width"), [("uint8", 100), ("uint4", 64)])
def test_tensors_of_codes(dtype: str, width: int, zeros: bool) -> None:
    tensors = rows.packed_tensors(7, 100, WeightFormat(dtype, 32, "float16", zeros))
    expected = [TensorType("uint8", (7, width)), TensorType("float16", (7, 4)), TensorType("uint8", (7, 4))]
    assert list(tensors) == expected[: 3 if zeros else 2]


def test_floats_are_copied() -> None:
    assert rows.packed_tensors(3, 5, WeightFormat("bfloat16")) == (TensorType("bfloat16", (3, 5)),)
    weight, out = np.arange(15, dtype=np.float32).reshape(5, 3), np.empty((3, 5), np.float32)
    rows.pack_floats(weight.T, WeightFormat("float32"), out)
    np.testing.assert_array_equal(out, weight.T)
    assert rows.extent(3, TensorType("float32", (9, 5))) == 3


def test_codes_without_a_block_are_refused() -> None:
    with pytest.raises(ValueError, match="need a block"):
        rows.packed_tensors(3, 5, WeightFormat("uint4", 0, "float16", False))
