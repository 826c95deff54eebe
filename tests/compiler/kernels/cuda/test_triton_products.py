"""The products on Triton's interpreter, against float64."""

import numpy as np
import pytest
import torch
from triton_interpreter import run

from kvc.kernels.cuda import rows
from kvc.kernels.cuda.knobs import BY_ENGINE, ProductKnobs
from kvc.kernels.cuda.products import embedding_kernel, head_product_kernels, product_kernels
from kvc_passes.weight_format import WeightFormat

pytest.importorskip("triton")

DTYPES = {"float32": torch.float32, "float16": torch.float16}
FORMATS = [
    WeightFormat("float16"),
    WeightFormat("float32"),
    WeightFormat("uint4", 32, "float16"),
    WeightFormat("uint4", 16, "float16", zeros=True),
    WeightFormat("uint4", 64, "float32", zeros=True),
    WeightFormat("uint4", 128, "float16", zeros=True),
    WeightFormat("uint4", 256, "float32"),
    WeightFormat("uint4", 10**6, "float32", zeros=True),
    WeightFormat("uint8", 32, "float32", zeros=True),
    WeightFormat("uint8", 16, "float16"),
    WeightFormat("uint8", 10**6, "float16"),
]
SIZES = [(1, 48, 512), (3, 33, 100), (17, 70, 200), (18, 40, 101), (65, 130, 192), (260, 140, 72)]
"""Rows of x, columns and depth: every variant, and sizes that its blocks do not divide."""


def with_surroundings(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor between values that must not reach a result."""
    poison = torch.nan if tensor.is_floating_point() else 255
    around = torch.full((tensor.numel() + 512,), poison, dtype=tensor.dtype)
    around[256:-256] = tensor.flatten()
    return around[256:-256].reshape(tensor.shape)


def stored(
    columns: int, depth: int, format: WeightFormat, random: np.random.Generator
) -> tuple[list[torch.Tensor], np.ndarray]:
    """A random weight in a format, and its numbers [columns, depth] in float64."""
    tensors = rows.packed_tensors(columns, depth, format)
    arrays = [np.zeros(t.shape, t.dtype) for t in tensors]
    if not format.coded:
        arrays[0][...] = random.standard_normal((columns, depth))
        return [with_surroundings(torch.from_numpy(a)) for a in arrays], arrays[0].astype(float)
    most = 16 if format.dtype == "uint4" else 256
    codes = random.integers(0, most, (columns, depth)).astype(np.uint8)
    rows.pack_codes(codes, format, arrays[0])
    arrays[1][...] = random.uniform(-1, 1, arrays[1].shape) / most
    zeros = np.full(arrays[1].shape, most // 2)
    if format.zeros:
        zeros = arrays[2][...] = random.integers(0, most, arrays[1].shape)
    block = np.arange(depth) // format.block
    numbers = (codes.astype(float) - zeros[:, block]) * arrays[1].astype(float)[:, block]
    return [with_surroundings(torch.from_numpy(a)) for a in arrays], numbers


def unit(dtype: str) -> float:
    """The largest relative error of a rounding."""
    return 2.0**-11 if dtype == "float16" else 2.0**-24


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", FORMATS)
def test_products(format: WeightFormat, dtype: str, size: tuple[int, int, int]) -> None:
    m, columns, depth = size
    random = np.random.default_rng(m)
    weight, numbers = stored(columns, depth, format, random)
    x = with_surroundings(torch.from_numpy(random.standard_normal((m, depth))).to(DTYPES[dtype]))
    shift = torch.from_numpy(random.standard_normal(columns)).to(DTYPES[dtype])
    out_dtype, bias = ("float32", False) if m % 2 else (dtype, True)
    extra = with_surroundings(torch.from_numpy(random.standard_normal((m, columns))).to(DTYPES[dtype]))
    residual = m % 3 != 0
    expected = x.double().numpy() @ numbers.T + (shift.double().numpy() if bias else 0)
    expected += extra.double().numpy() if residual else 0
    # A weight of codes is rounded to x's type, the sum in float32 with an error for each term, the result.
    magnitude = np.abs(x.double().numpy()) @ np.abs(numbers).T + np.abs(shift.double().numpy())
    magnitude += np.abs(extra.double().numpy())
    bound = (depth + 8) * 2.0**-24 * magnitude + unit(out_dtype) * np.abs(expected) + 1e-6
    if format.coded:
        bound += unit(dtype) * magnitude + 2.0**-25 * np.abs(x.double().numpy()).sum(axis=1, keepdims=True)
    variants = product_kernels(columns, depth, format, dtype, out_dtype, bias, residual=residual)
    assert [most for most, *_ in variants] == [*sorted(most for most, *_ in variants[:-1]), None]
    for _, kernel, tall, wide in variants if m == 65 else [fitting(m, variants)]:
        y = with_surroundings(torch.full((m, columns), torch.nan, dtype=DTYPES[out_dtype]))
        grid = (-(-m // tall) * -(-columns // wide),)
        added = [*([shift] if bias else []), *([extra] if residual else [])]
        run(kernel, grid, x, *weight, *added, y, m, columns, depth)
        assert (np.abs(y.double().numpy() - expected) <= bound).all()


@pytest.mark.parametrize("size", [(1, 48, 512), (70, 130, 200), (300, 140, 72)])
@pytest.mark.parametrize("added", [False, True])
def test_products_of_boxes(added: bool, size: tuple[int, int, int]) -> None:
    """Of the same sums as of pointers; what surrounds the matrices is NaN, and read as zeros."""
    m, columns, depth = size
    random = np.random.default_rng(m)
    (weight,), numbers = stored(columns, depth, WeightFormat("float16"), random)
    x = with_surroundings(torch.from_numpy(random.standard_normal((m, depth))).half())
    shift, extra = (torch.from_numpy(random.standard_normal(s)).half() for s in (columns, (m, columns)))
    more = [shift, with_surroundings(extra)] if added else []
    expected = x.double().numpy() @ numbers.T + sum(t.double().numpy() for t in more)
    magnitude = np.abs(x.double().numpy()) @ np.abs(numbers).T + sum(np.abs(t.double().numpy()) for t in more)
    bound = (depth + 8) * 2.0**-24 * magnitude + unit("float16") * np.abs(expected) + 1e-6
    kernels = product_kernels(
        columns, depth, WeightFormat("float16"), "float16", "float16", added, 90, added, by_engine
    )
    for _, kernel, tall, wide in kernels if m == 70 else [fitting(m, kernels)]:
        assert kernel.function == "products.boxed"
        y = with_surroundings(torch.full((m, columns), torch.nan, dtype=torch.float16))
        run(kernel, (-(-m // tall) * -(-columns // wide),), x, weight, *more, y, m, columns, depth)
        assert (np.abs(y.double().numpy() - expected) <= bound).all()


def by_engine(most: int) -> ProductKnobs:
    return ProductKnobs(copy=BY_ENGINE)


@pytest.mark.parametrize(
    ("format", "dtype", "depth", "arch"),
    [
        (WeightFormat("float16"), "float16", 4096, 80),  # no copy engine
        (WeightFormat("float16"), "float16", 100, 90),  # rows of 200 bytes
        (WeightFormat("float16"), "bfloat16", 4096, 90),  # multiplied in float32
        (WeightFormat("float32"), "float32", 4096, 90),
        (WeightFormat("uint8", 32, "float16"), "float16", 4096, 90),  # codes become numbers in registers
    ],
)
def test_what_the_engine_cannot_copy_is_loaded(
    format: WeightFormat, dtype: str, depth: int, arch: int
) -> None:
    tuned = product_kernels(64, depth, format, dtype, dtype, False, arch, knobs=by_engine)
    assert tuned == product_kernels(64, depth, format, dtype, dtype, False, arch)


@pytest.mark.parametrize("size", [(16, 40, 64), (65, 200, 96), (300, 130, 32)])
def test_a_sum_may_lie_over_what_is_added(size: tuple[int, int, int]) -> None:
    """The same numbers, though the last rows and columns are read again by programs that stand at the end."""
    m, columns, depth = size
    random = np.random.default_rng(m)
    (weight,), _ = stored(columns, depth, WeightFormat("float16"), random)
    x, extra = (
        with_surroundings(torch.from_numpy(random.standard_normal(shape)).to(torch.float16))
        for shape in ((m, depth), (m, columns))
    )
    arguments = (columns, depth, WeightFormat("float16"), "float16", "float16", False)
    for _, kernel, tall, wide in product_kernels(*arguments, residual=True):
        grid = (-(-m // tall) * -(-columns // wide),)
        y, over = (with_surroundings(extra.clone()) for _ in range(2))
        run(kernel, grid, x, weight, extra, y, m, columns, depth)
        run(kernel, grid, x, weight, over, over, m, columns, depth)
        assert torch.equal(over, y)
        assert not torch.equal(y, extra)


def fitting(m: int, variants: tuple) -> tuple:
    return next(v for v in variants if v[0] is None or m <= v[0])


@pytest.mark.parametrize("columns", [16384, 4096])
def test_variants_for_few_rows_have_programs_for_a_large_gpu(columns: int) -> None:
    _, _, _, wide = product_kernels(columns, 4096, WeightFormat("float16"), "float16", "float16", False)[0]
    assert columns / wide >= 132


@pytest.mark.parametrize("size", [(1, 160, 48), (20, 48, 160), (70, 33, 100)])
@pytest.mark.parametrize("absorbed", [False, True])
@pytest.mark.parametrize(("dtype", "stored_in"), [("float32", "float16"), ("float16", "float16")])
def test_products_of_heads(dtype: str, stored_in: str, absorbed: bool, size: tuple[int, int, int]) -> None:
    """Six heads, of which two share a matrix each."""
    m, columns, depth = size
    random = np.random.default_rng(m)
    (weight,), numbers = stored(3 * columns, depth, WeightFormat(stored_in), random)
    shape = (lambda d: (6, m, d)) if absorbed else (lambda d: (m, 6, d))
    x = with_surroundings(torch.from_numpy(random.standard_normal(shape(depth))).to(DTYPES[dtype]))
    given = x.double().numpy().transpose((0, 1, 2) if absorbed else (1, 0, 2))
    matrices = numbers.reshape(3, columns, depth)[np.arange(6) // 2].transpose(0, 2, 1)
    expected, magnitude = given @ matrices, np.abs(given) @ np.abs(matrices)
    bound = (depth + 8) * 2.0**-24 * magnitude + unit(dtype) * np.abs(expected) + 1e-6
    for _, kernel, tall, wide in head_product_kernels(
        6, 2, columns, depth, WeightFormat(stored_in), dtype, absorbed
    ):
        y = with_surroundings(torch.full(shape(columns), torch.nan, dtype=DTYPES[dtype]))
        run(kernel, (-(-m // tall) * -(-columns // wide), 6), x, weight, y, m, columns, depth)
        found = y.double().numpy().transpose((0, 1, 2) if absorbed else (1, 0, 2))
        assert (np.abs(found - expected) <= bound).all()


@pytest.mark.parametrize("depth", [100, 1088, 2048])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", FORMATS)
def test_rows_of_tokens(format: WeightFormat, dtype: str, depth: int) -> None:
    weight, numbers = stored(20, depth, format, np.random.default_rng(depth))
    ids = torch.tensor([3, 19, 0, 3])
    y = with_surroundings(torch.full((4, depth), torch.nan, dtype=DTYPES[dtype]))
    kernel, wide = embedding_kernel(depth, format, dtype)
    run(kernel, (4, -(-depth // wide)), *weight, ids, y, 4, depth)
    expected = numbers[ids.numpy()]
    # Rounded as a float32, then as y.
    bound = (unit(dtype) + 2.0**-24) * np.abs(expected) + (2.0**-25 if dtype == "float16" else 0)
    assert (np.abs(y.double().numpy() - expected) <= bound).all()


@pytest.mark.parametrize("block", [8, 48])
def test_blocks_that_no_kernel_has_are_refused(block: int) -> None:
    with pytest.raises(ValueError, match=f"blocks of {block}"):
        product_kernels(64, 4096, WeightFormat("uint4", block), "float16", "float16", False)
