"""Parameters of CUDA's kernels: by default those of the tables, and what is tuned in their place."""

from __future__ import annotations

from typing import Any

import pytest
from tvm import IRModule

from kvc.kernels.attention import AttentionShape
from kvc.kernels.cuda import attention, products
from kvc.kernels.cuda.device import DeviceKernel
from kvc.kernels.cuda.host_attention import CudaAttention
from kvc.kernels.cuda.host_products import CudaProducts
from kvc.kernels.cuda.knobs import DEFAULTS, DecodeKnobs, Defaults, PrefillKnobs, Product, ProductKnobs
from kvc.kernels.cuda.launches import Variants, launched
from kvc.kernels.shapes import attention_shape
from kvc_passes.weight_format import WeightFormat
from support import site

PREFILL = {
    # (head, type, architecture): rows, keys, warps, stages
    (64, "float16", 80): (128, 64, 8, 3),
    (64, "float16", 90): (128, 64, 8, 3),
    (128, "float16", 86): (128, 32, 8, 3),
    (128, "bfloat16", 90): (128, 64, 8, 2),
    (256, "float16", 89): (64, 32, 8, 2),
    (256, "float16", 100): (64, 64, 8, 2),
    (64, "float32", 80): (32, 32, 8, 2),
    (64, "float32", 90): (64, 32, 8, 2),
    (256, "float32", 90): (16, 16, 8, 2),
}
DECODE = {
    (128, "float16"): (64, 4, 3),
    (256, "bfloat16"): (32, 4, 3),
    (128, "float32"): (32, 8, 2),
    (256, "float32"): (16, 4, 2),
}
HALF = WeightFormat("float16")
PRODUCTS = {
    # (columns, depth, format, type, architecture): most rows, rows, columns, depth, warps, stages
    (28672, 4096, HALF, "float16", 90): [
        (16, 16, 64, 128, 4, 4),
        (32, 32, 64, 128, 4, 3),
        (64, 64, 64, 128, 4, 3),
        (256, 64, 128, 64, 4, 3),
        (None, 128, 128, 64, 8, 3),
    ],
    (4096, 4096, WeightFormat("uint4", 32, "float16"), "float16", 80): [
        (16, 16, 16, 128, 4, 4),
        (32, 32, 32, 128, 4, 5),  # 128 programs
        (64, 64, 32, 128, 4, 5),
        (256, 64, 128, 64, 4, 3),
        (None, 128, 64, 64, 8, 3),
    ],
    (4096, 4096, HALF, "float16", 80): [
        (16, 16, 16, 256, 4, 4),
        (32, 32, 32, 128, 4, 5),  # 128 programs
        (64, 64, 32, 128, 4, 5),
        (256, 64, 128, 64, 4, 3),
        (None, 128, 128, 64, 8, 3),
    ],
    (4096, 4096, WeightFormat(), "float32", 90): [(16, 16, 32, 64, 4, 3), (None, 64, 64, 32, 4, 2)],
    (4096, 1020, HALF, "float16", 90): [(16, 16, 32, 64, 4, 1), (None, 64, 64, 32, 8, 1)],
}


def shape(dim: int, dtype: str) -> AttentionShape:
    return AttentionShape(8, 2, dim, dim, 0.1, kv_dtype=dtype, page_size=64)


def blocks_of(kernel: DeviceKernel, *names: str) -> tuple[int, ...]:
    constants = dict(kernel.constants)
    return (*(constants[name] for name in names), kernel.warps, kernel.stages)


@pytest.mark.parametrize("case", PREFILL, ids=str)
def test_prefill_is_by_default_as_its_table_says(case: tuple[int, str, int]) -> None:
    dim, dtype, arch = case
    kernel = attention.prefill_kernel(shape(dim, dtype), 64, dtype, arch)  # 64 tokens of 4 heads: enough rows
    assert blocks_of(kernel, "BM", "BN") == PREFILL[case]


@pytest.mark.parametrize("case", DECODE, ids=str)
def test_decode_is_by_default_as_its_table_says(case: tuple[int, str]) -> None:
    dim, dtype = case
    assert blocks_of(attention.decode_kernel(shape(dim, dtype), 8, dtype), "BN") == DECODE[case]


@pytest.mark.parametrize("case", PRODUCTS, ids=str)
def test_products_are_by_default_as_their_table_says(case: tuple[int, int, WeightFormat, str, int]) -> None:
    columns, depth, format, dtype, arch = case
    found = products.product_kernels(columns, depth, format, dtype, dtype, False, arch)
    assert [(most, *blocks_of(kernel, "BM", "BN", "BK")) for most, kernel, *_ in found] == PRODUCTS[case]
    assert [tuple(program) for *_, kernel, tall, wide in found for program in [(tall, wide)]] == [
        row[1:3] for row in PRODUCTS[case]
    ]


def test_what_is_tuned_takes_the_place_of_its_number_alone() -> None:
    of = shape(128, "float16")
    prefill = attention.prefill_kernel(of, 64, "float16", 90, PrefillKnobs(keys=32, stages=4, tile=7))
    assert blocks_of(prefill, "BM", "BN") == (128, 32, 8, 4)
    assert dict(prefill.constants)["TILE"] == 64  # which the caller gives
    decode = attention.decode_kernel(of, 8, "float16", DecodeKnobs(warps=8, splits=3))
    assert blocks_of(decode, "BN") == (64, 8, 3)

    def knobs(most: int) -> ProductKnobs:
        return {16: ProductKnobs(columns=64), 0: ProductKnobs(256, 64, 32, 4, 5)}.get(most, ProductKnobs())

    tuned = products.product_kernels(4096, 4096, HALF, "float16", "float16", False, 90, knobs=knobs)
    assert [blocks_of(kernel, "BM", "BN", "BK") for _, kernel, *_ in tuned] == [
        (16, 64, 256, 4, 4),
        (32, 32, 128, 4, 5),
        (64, 32, 128, 4, 5),
        (64, 128, 64, 4, 3),
        (256, 64, 32, 4, 5),
    ]
    assert [(tall, wide) for *_, tall, wide in tuned] == [(16, 64), (32, 32), (64, 32), (64, 128), (256, 64)]


class Some(Defaults):
    """Other blocks for sm_90 alone; another tile and number of shares, if `shared`."""

    def __init__(self, shared: bool = False) -> None:
        self.tile, self.splits = (8, 3) if shared else (0, 0)
        self.asked: list[Product] = []

    def product(self, arch: int, product: Product) -> ProductKnobs:
        self.asked.append(product)
        return ProductKnobs(stages=2 if arch == 90 else 0)

    def prefill(self, arch: int, shape: AttentionShape, tile: int) -> PrefillKnobs:
        assert tile == 32  # the usual one
        return PrefillKnobs(keys=16 if arch == 90 else 0, tile=self.tile)

    def decode(self, arch: int, shape: AttentionShape, splits: int) -> DecodeKnobs:
        assert splits == 33
        return DecodeKnobs(keys=16 if arch == 90 else 0, splits=self.splits)


LLAMA = site(heads=32, kv_heads=8, head_dim=128, value_dim=128, kv_dtype="float16")
OPTIONS: dict[str, Any] = {"bias": True, "flat": False, "dtype": "float16"}


def functions(variants: Variants) -> IRModule:
    kernels = CudaAttention.for_sites((LLAMA,), 1 << 15, variants)
    made = {
        "prefill": kernels.prefill(LLAMA, "float16"),
        "decode": kernels.decode(LLAMA, "float16"),
        "product": CudaProducts(variants).matmul(4096, 4096, HALF, **OPTIONS),
    }
    return IRModule({name: f.with_attr("global_symbol", name) for name, f in made.items()})


def test_an_architecture_has_its_own_parameters() -> None:
    """What is tuned for sm_90 leaves sm_80's kernels as they are."""
    tuned, plain = Variants(80, Some()), Variants(80)
    made, usual = functions(tuned), functions(plain)
    for arch in (80, 90):
        for name in ("prefill", "decode", "product"):
            own, other = (launched(v.remade(m, arch)[name]) for v, m in ((tuned, made), (plain, usual)))
            assert (own == other) is (arch == 80)


def test_kernels_that_are_refused_are_made_as_by_default() -> None:
    tuned, plain = Variants(90, Some()), Variants(90)
    made, usual = functions(tuned), functions(plain)
    (refused,) = launched(made["prefill"])
    found = tuned.remade(made, 90, {refused})
    assert launched(found["prefill"]) == launched(usual["prefill"])
    assert launched(found["decode"]) == launched(made["decode"]) != launched(usual["decode"])


def test_tiles_and_shares_are_the_whole_artifacts() -> None:
    variants = Variants(90, Some(shared=True))
    kernels = CudaAttention.for_sites((LLAMA,), 1 << 15, variants)
    assert (kernels.tile, kernels.splits(LLAMA)) == (8, 3)
    (prefill,) = launched(kernels.prefill(LLAMA, "float16"))
    assert dict(variants.kernels[prefill].constants)["TILE"] == 8
    plain = CudaAttention.for_sites((LLAMA,), 1 << 15, Variants(90))
    assert (plain.tile, plain.splits(LLAMA)) == (32, 33)


def test_functions_say_what_they_are() -> None:
    variants = Variants(90, Some())
    made = functions(variants)
    of = attention_shape(LLAMA, 64)
    assert variants.key_of(made["prefill"])[:4] == ("prefill", of, None, 32)  # type: ignore[index]
    assert variants.key_of(made["decode"])[:4] == ("decode", of, None, 33)  # type: ignore[index]
    assert variants.key_of(made["product"]) == (
        "matmul", 4096, 4096, HALF, True, False, False, "float16",
    )  # fmt: skip
    assert isinstance(variants.knobs, Some)
    assert [p.most for p in variants.knobs.asked] == [16, 32, 64, 256, 0]
    assert variants.key_of(IRModule()) is None


def test_one_variant_of_a_product_takes_any_number_of_rows() -> None:
    variants = Variants(90, DEFAULTS)
    every = launched(functions(variants)["product"])
    found = [
        launched(
            CudaProducts(variants).variant(Product(4096, 4096, HALF, True, False, False, "float16", most))
        )
        for most in (16, 32, 64, 256, 0)
    ]
    assert all(len(names) == 1 for names in found)
    assert set().union(*found) == every
