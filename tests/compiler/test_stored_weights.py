"""Codes, scales and zero points as ONNX files hold them, against numpy's own reading of the same bytes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvc.kernels import packing
from kvc.kernels.cpu import CpuProducts
from kvc.kernels.traits import CpuTraits
from kvc.stored_weights import codes_of, scales_of, stored, zeros_of
from kvc_passes.markers import Dequantize
from kvc_passes.weight_format import WeightFormat
from kvc_passes.weights import PackedWeight, Source, WeightPart

PRODUCTS = CpuProducts(CpuTraits(lanes=4, registers=16, threads=2))


@dataclass(frozen=True)
class Case:
    """A weight of codes with its blocks, zero points and their place in the bytes."""

    rows: int
    columns: int
    bits: int
    signed: bool
    axis: int
    block: int
    padding: int
    zeros: bool

    @property
    def attrs(self) -> Dequantize:
        along = -(-self.columns // self.block)
        return Dequantize(
            self.rows,
            self.columns,
            self.bits,  # type: ignore[arg-type]
            self.signed,
            self.axis,  # type: ignore[arg-type]
            self.block,
            self.columns + self.padding,
            (along + along % 2) if self.axis else self.columns,
            0 if self.signed else 1 << (self.bits - 1),
        )


cases = st.builds(
    Case,
    st.integers(1, 9),
    st.integers(1, 19),
    st.sampled_from([4, 8]),
    st.booleans(),
    st.sampled_from([0, 1]),
    st.integers(1, 8),
    st.integers(0, 3),
    st.booleans(),
)


def in_bytes(codes: np.ndarray, bits: int) -> np.ndarray:
    """Signed or unsigned codes, row by row, as an ONNX file holds them."""
    flat = codes.reshape(-1).astype(np.int16) & (15 if bits == 4 else 255)
    if bits == 8:
        return flat.astype(np.uint8)
    flat = np.append(flat, np.zeros(flat.size % 2, flat.dtype))
    return (flat[0::2] | flat[1::2] << 4).astype(np.uint8)


def make(case: Case, seed: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The parameters of a random weight, and the weight as float64 [rows, columns]."""
    rng, attrs = np.random.default_rng(seed), case.attrs
    low, high = (-(1 << (case.bits - 1)), 1 << (case.bits - 1)) if case.signed else (0, 1 << case.bits)
    whole = rng.integers(low, high, (case.rows, attrs.stored))
    blocks = (
        (case.rows, -(-case.columns // case.block))
        if case.axis
        else (-(-case.rows // case.block), case.columns)
    )
    scales = rng.uniform(0.5, 2, blocks).astype(np.float32)
    wide = (blocks[0], attrs.zeros_stored)
    zeros = rng.integers(low, high, wide) if case.zeros else np.full(wide, attrs.middle)
    weights = {"codes": in_bytes(whole, case.bits), "scales": scales}
    if case.zeros:
        kept = zeros if case.bits == 4 else zeros[:, : blocks[1]]
        weights["zeros"] = in_bytes(kept, case.bits)

    def spread(table: np.ndarray) -> np.ndarray:
        return np.repeat(table, case.block, case.axis)[: case.rows, : case.columns].astype(np.float64)

    value = (whole[:, : case.columns] - spread(zeros[:, : blocks[1]])) * spread(scales)
    return weights, value


@settings(max_examples=150, deadline=None)
@given(cases, st.integers(0, 1000))
def test_codes_scales_and_zeros_are_read_as_they_stand(case: Case, seed: int) -> None:
    weights, expected = make(case, seed)
    source = Source("codes", case.rows, False, case.attrs, "scales", "zeros" if case.zeros else "")
    codes, scales, zeros = (f(source, weights).astype(np.float64) for f in (codes_of, scales_of, zeros_of))
    scales, zeros = (
        np.repeat(t, case.block, case.axis)[: case.rows, : case.columns] for t in (scales, zeros)
    )
    np.testing.assert_array_equal((codes - zeros) * scales, expected)


@pytest.mark.parametrize("transposed", [False, True])
def test_two_weights_of_codes_stand_side_by_side(transposed: bool) -> None:
    """q and k as one weight: 8 and 16 columns in panels of 8, 5 inputs in blocks of 2."""
    axis = 0 if transposed else 1
    shapes = [(5, 8), (5, 16)] if transposed else [(8, 5), (16, 5)]
    weights, dense, sources = {}, [], []
    for i, (rows, columns) in enumerate(shapes):
        case = Case(rows, columns, 4, False, axis, 2, 0, True)
        made, value = make(case, i)
        weights |= {f"{name}{i}": array for name, array in made.items()}
        dense.append(value.T if transposed else value)
        sources.append(
            Source(f"codes{i}", dense[-1].shape[0], transposed, case.attrs, f"scales{i}", f"zeros{i}")
        )
    format = WeightFormat("uint4", 2, "float32", True)
    weight = PackedWeight(tuple(sources), 5, format)
    tensors = PRODUCTS.packed(24, 5, format)
    data, scales, zeros = (stored(WeightPart(weight, i), t, weights, packing) for i, t in enumerate(tensors))
    codes = np.stack([data & 15, data >> 4], 2).reshape(3, 6, 8)[:, :5]  # [panel, input, column]
    blocks = np.arange(5) // 2
    got = (codes - zeros[:, blocks].astype(np.float64)) * scales[:, blocks]
    np.testing.assert_array_equal(got.transpose(0, 2, 1).reshape(24, 5), np.concatenate(dense))


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_one_scale_and_one_zero_point_serve_all(bits: int, signed: bool) -> None:
    attrs = Dequantize(6, 5, bits, signed, 1, 5, 5, 0)  # type: ignore[arg-type]
    source = Source("codes", 6, False, attrs, "scales", "zeros")
    zero = -3 if signed else 3
    weights = {"scales": np.array(0.5, np.float32), "zeros": in_bytes(np.array([zero]), bits)}
    assert zeros_of(source, weights).tolist() == [[zero + (1 << (bits - 1) if signed else 0)]] * 6
    assert scales_of(source, weights).tolist() == [[0.5]] * 6
