"""What the passes get from a site and a format: the kernels' arguments, and a mask that reaches them."""

from dataclasses import replace

import numpy as np
import pytest
from kernel_machines import MACHINES
from tvm.tirx import PrimFunc
from weight_cases import FORMATS

from kvc.kernels.cpu import CpuAttention, CpuProducts
from kvc.kernels.emit import compiled
from kvc_passes.sites import AttentionSite, MaskFact
from kvc_passes.weight_format import WeightFormat

MACHINE = MACHINES["native"]
CAUSAL = MaskFact("causal", None, "given")
SITE = AttentionSite(0, "n", 4, 2, 16, 16, 0.25, None, CAUSAL, None)
MASKS = {
    "causal": (CAUSAL, lambda q, k: k <= q),
    "window": (MaskFact("window", 5, "given"), lambda q, k: k > q - 5),
    "chunk": (MaskFact("chunk", None, "given", chunk=6), lambda q, k: k // 6 == q // 6),
    "sinks": (MaskFact("sinks", 5, "given", sinks=3), lambda q, k: (k < 3) | (k > q - 5)),
    "predicate": (
        MaskFact("predicate", None, "given", predicate="k <= q and q - k != 2"),
        lambda q, k: q - k != 2,
    ),
}


def arguments(kernel: PrimFunc) -> list[tuple[str, str, int]]:
    """(name, dtype, dimensions) of a kernel's arguments."""
    return [(b.name, str(b.dtype), len(b.shape)) for b in kernel.params]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_arguments_are_in_the_order_of_the_protocol(dtype: str) -> None:
    site = replace(SITE, slopes=(0.5, 0.25, 0.1, 0.0), sinks=(0.0,) * 4, kv_dtype=dtype)
    kernels = CpuAttention.for_sites(MACHINE.target, (site,))
    pools = [("kpool", dtype, 4), ("vpool", dtype, 4)]
    q, positions, table = ("q", "float32", 4), ("positions", "int64", 1), ("block_table", "int32", 2)
    extras, out = [("slopes", "float32", 1), ("sinks", "float32", 1)], ("out", "float32", 4)
    assert arguments(kernels.prefill(site)) == [
        q,
        *pools,
        positions,
        ("tiles", "int32", 2),
        table,
        *extras,
        out,
    ]
    part = ("part", "float32", 4)
    assert arguments(kernels.decode(site)) == [q, *pools, positions, table, *extras, part, out]
    kv = [(name, "float32", 4) for name in "kv"]
    assert arguments(kernels.append(site)) == [*kv, ("slots", "int32", 1), *pools]
    assert len(arguments(kernels.decode(replace(site, slopes=None, sinks=None)))) == 7


@pytest.mark.parametrize("name", MASKS)
def test_the_mask_of_a_site_is_the_mask_of_its_kernels(name: str) -> None:
    fact, sees = MASKS[name]
    site = replace(SITE, mask=fact)
    kernels = CpuAttention.for_sites(MACHINE.target, (site,))
    rng, length = np.random.default_rng(1), 15
    k, v, q = (rng.standard_normal((1, heads, length, 16)).astype(np.float32) for heads in (2, 2, 4))
    pools = [np.zeros(shape, np.float32) for shape in ((1, 2, 16, 16), (1, 2, 16, 16))]
    slots = np.arange(length, dtype=np.int32)
    *_, kpool, vpool = MACHINE.call(compiled(kernels.append(site), MACHINE.target), k, v, slots, *pools)
    tiles = [(0, at, min(kernels.tile, length - at)) for at in range(0, length, kernels.tile)]
    out = MACHINE.call(
        compiled(kernels.prefill(site), MACHINE.target),
        q,
        kpool,
        vpool,
        np.arange(length),
        np.array(tiles, np.int32),
        np.zeros((1, 1), np.int32),
        np.zeros((1, length, 4, 16), np.float32),
    )[-1]
    query, key = np.arange(length)[:, None], np.arange(length)[None]
    for h in range(4):
        scores = np.where((key <= query) & sees(query, key), q[0, h] @ k[0, h // 2].T * 0.25, -np.inf)
        p = np.exp(scores - scores.max(axis=1, keepdims=True))
        np.testing.assert_allclose(out[0, :, h], p / p.sum(axis=1, keepdims=True) @ v[0, h // 2], atol=2e-6)


@pytest.mark.parametrize("name", FORMATS)
def test_a_product_takes_the_tensors_that_packed_names(name: str) -> None:
    products, format = CpuProducts(MACHINE.traits), FORMATS[name]
    packed = [(t.dtype, len(t.shape)) for t in products.packed(70, 24, format)]
    for kernel, own in (
        (products.matmul(70, 24, format, bias=True, flat=False), slice(1, -2)),
        (products.embedding(70, 24, format), slice(0, -2)),
    ):
        assert [(dtype, rank) for _, dtype, rank in arguments(kernel)][own] == packed


def test_kernels_of_one_shape_are_built_once() -> None:
    products = CpuProducts(MACHINE.traits)
    first, again, other = (
        products.matmul(70, 24, format, bias=False, flat=False)
        for format in (WeightFormat("uint4", 8), WeightFormat("uint4", 8), WeightFormat("uint4", 12))
    )
    assert first is again
    assert first is not other
