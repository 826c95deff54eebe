"""Products with a matrix for every head, against numpy in float64."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_machines import MACHINES, Machine
from page_cases import numpy_type

from kvc.kernels import packing
from kvc.kernels.head_product import head_product, packed_tensor
from kvc.stored_weights import stored
from kvc_passes.weight_format import WeightFormat
from kvc_passes.weights import HeadWeight, Source, WeightPart

# heads, group, columns, depth: full panels, a last panel that is not full, one that is small and serial.
PRODUCTS = [(12, 1, 64, 96), (6, 2, 100, 40), (3, 3, 7, 5)]


def _kernel(product: tuple[int, int, int, int], absorbed: bool, dtype: str, traits: object) -> object:
    return head_product(*product, traits, absorbed=absorbed, format=WeightFormat(dtype))


def check(
    machine: Machine, product: tuple[int, int, int, int], absorbed: bool, rows: int, dtype: str, seed: int = 0
) -> None:
    """The weight is a part of every head's share of a matrix, as the file has it."""
    heads, group, n, k = product
    rng, count = np.random.default_rng(seed), heads // group
    depth, width = (n, k) if absorbed else (k, n)
    first, stride = 3, width + 2
    matrix = rng.standard_normal((depth, first + count * stride)).astype(numpy_type(dtype))
    weight = HeadWeight(
        Source("w", matrix.shape[1], transposed=True), depth, count, width, first, stride, absorbed,
        WeightFormat(dtype),
    )  # fmt: skip
    assert (weight.columns, weight.inner) == (n, k)
    tensor = packed_tensor(count, n, k, WeightFormat(dtype), machine.traits)
    packed = stored(WeightPart(weight), tensor, {"w": matrix}, packing)
    x = rng.standard_normal((1, heads, rows, k) if absorbed else (1, rows, heads, k)).astype(np.float32)
    y = np.full((*x.shape[:3], n), np.nan, np.float32)
    result = machine.call(machine.build(_kernel, product, absorbed, dtype), x, packed, y)[-1]
    for h in range(heads):
        at = first + h // group * stride
        own = matrix[:, at : at + width].astype(float)
        given, got = (x[0, h], result[0, h]) if absorbed else (x[0, :, h], result[0, :, h])
        right = own.T if absorbed else own
        # k products and k sums, each rounded once: error below (k + 2) eps sum |x w|.
        bound = (k + 2) * 2.0**-24 * (np.abs(given) @ np.abs(right))
        assert (np.abs(got - given.astype(float) @ right) <= bound).all()


@pytest.mark.parametrize("absorbed", [False, True])
@pytest.mark.parametrize("product", PRODUCTS, ids=str)
def test_every_row_count_up_to_two_tiles(
    machine: Machine, product: tuple[int, int, int, int], absorbed: bool
) -> None:
    for rows in range(1, 2 * machine.traits.tile_rows + 2):
        check(machine, product, absorbed, rows, "float32")


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from(sorted(MACHINES)), st.sampled_from(PRODUCTS), st.booleans(), st.integers(1, 200),
    st.sampled_from(["float32", "float16", "bfloat16"]), st.integers(0, 99),
)  # fmt: skip
def test_any_row_count_and_type(
    name: str, product: tuple[int, int, int, int], absorbed: bool, rows: int, dtype: str, seed: int
) -> None:
    check(MACHINES[name], product, absorbed, rows, dtype, seed)
