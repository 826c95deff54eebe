"""What is run to measure a kernel of a GPU: the function that launches it, and its operands."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any, Final

import ml_dtypes
import numpy as np
from tvm import tirx

from kvc_passes.kernel_sets import TensorType
from kvc_passes.sites import AttentionSite, MaskFact

from ..cuda_machine import CudaMachine
from ..kernels.attention import AttentionShape
from ..kernels.cuda import rows
from ..kernels.cuda.host_attention import CudaAttention
from ..kernels.cuda.host_pages import PAGE_SIZE, most_parts
from ..kernels.cuda.knobs import (
    DECODE,
    PREFILL,
    PRODUCT,
    DecodeKnobs,
    PrefillKnobs,
    Product,
    ProductKnobs,
)
from ..kernels.knobs import AttentionTimes
from .programs import Array, Operands, pages_of, queries_of, sequences_of, tiles_of
from .tasks import Bucket, Task
from .tasks import product_of as weight_of

_COLD_BYTES: Final = 256 * 2**20
"""Operands of so many bytes are out of the second-level cache when their turn comes again: 50 MB of an H200,
126 MB of a B200."""


@dataclass(frozen=True)
class Given:
    """The parameters of one candidate; implements kvc.kernels.cuda.knobs.Knobs for its kernel alone."""

    knobs: Any

    def product(self, arch: int, product: Product) -> ProductKnobs:
        return self.knobs if isinstance(self.knobs, ProductKnobs) else PRODUCT

    def prefill(self, arch: int, shape: AttentionShape, tile: int) -> PrefillKnobs:
        return self.knobs if isinstance(self.knobs, PrefillKnobs) else PREFILL

    def decode(self, arch: int, shape: AttentionShape, splits: int) -> DecodeKnobs:
        return self.knobs if isinstance(self.knobs, DecodeKnobs) else DECODE

    def attention_times(self, arch: int, shape: AttentionShape) -> AttentionTimes:
        return (), ()


def product_of(task: Task) -> Product:
    data = json.loads(task.parameters)
    columns, depth, format = weight_of(task.parameters)
    names = ("bias", "residual", "flat", "dtype", "most")
    return Product(columns, depth, format, **{name: data[name] for name in names})


def kernel_of(task: Task, machine: CudaMachine, usual: dict[str, int]) -> tirx.PrimFunc:
    """The function that launches a candidate, whose parameters are the machine's, for its one architecture.

    usual: what its parameters are where the machine has 0.
    """
    if task.kernel == "gpu_product":
        return machine.products.variant(product_of(task))
    shape = task.shape()
    site, dtype = site_of(shape), shape.kv_dtype
    knobs = machine.variants.knobs
    assert isinstance(knobs, Given)
    if task.kernel == "gpu_prefill":
        tile = knobs.knobs.tile or usual["tile"]
        return CudaAttention(machine.variants, tile, 1 << 20).prefill(site, dtype)
    shares = knobs.knobs.splits or usual["splits"]
    machine.variants.knobs = Given(replace(knobs.knobs, splits=shares))
    return CudaAttention(machine.variants, 1, 1 << 20).decode(site, dtype)


def site_of(shape: AttentionShape) -> AttentionSite:
    """An attention of this shape, which keeps keys and values."""
    window, chunk, sinks = shape.window, shape.chunk, shape.sink_keys
    kind: Any = (
        *(["memory"] if shape.whole else []),
        *(["predicate"] if shape.predicate is not None else []),
        *(["sinks"] if sinks is not None else []),
        *(["chunk"] if chunk is not None else []),
        *(["window"] if window is not None else []),
        "causal",
    )[0]
    return AttentionSite(
        index=0,
        node="",
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        value_dim=shape.value_dim,
        scale=shape.scale,
        softcap=shape.softcap,
        mask=MaskFact(kind, window, "", chunk, sinks, shape.predicate or "k <= q"),
        rope=None,
        slopes=(0.0,) * shape.heads if shape.slopes else None,
        bias=((0.0,) * shape.distances,) * shape.heads if shape.distances else None,
        sinks=(0.0,) * shape.heads if shape.sink_scores else None,
        guarded=shape.guarded,
        kv_dtype=shape.kv_dtype,  # type: ignore[arg-type]
        stored=shape.stored,  # type: ignore[arg-type]
    )


class _Numbers:
    """Random numbers of about 1, the same in every process."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)

    def __call__(self, dtype: str, *shape: int, scale: float = 1.0) -> Array:
        kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
        return (self.rng.standard_normal(shape, np.float32) * scale).astype(kind)


def product_operands(product: Product, count: int) -> Operands:
    """Of a product of `count` rows; every copy has a weight of its own."""
    numbers, columns, dtype = _Numbers(), product.columns, product.dtype
    # Codes are of about 100: sums have to stay below 65504.
    warm = {"x": numbers(dtype, 1, count, product.depth, scale=product.depth**-0.5)}
    if product.bias:
        warm["bias"] = numbers(dtype, columns)
    if product.residual:
        warm["residual"] = numbers(dtype, 1, count, columns)
    tensors = rows.packed_tensors(columns, product.depth, product.format)
    cold = {f"w{i}": tensor for i, tensor in enumerate(tensors)}
    shape = (count, columns) if product.flat else (1, count, columns)
    result = TensorType("float32" if product.flat else dtype, shape)
    added = (name for name in ("bias", "residual") if name in warm)
    return Operands(warm, cold, (result,), ("x", *cold, *added), True, _COLD_BYTES)


def prefill_operands(shape: AttentionShape, bucket: Bucket, tile: int) -> Operands:
    """Of prefill attention in tiles of `tile` tokens."""
    warm, cold, own, extras = _attention(shape, bucket, "prefill")
    warm["tiles"] = tiles_of(own, tile)
    result = TensorType(shape.kv_dtype, (1, bucket.rows, shape.heads, shape.value_dim))
    order = ("q", *cold, "positions", "tiles", "table", *extras)
    return Operands(warm, cold, (result,), order, True, _COLD_BYTES)


def decode_operands(shape: AttentionShape, bucket: Bucket, splits: int) -> Operands:
    """Of decode attention, in `splits` shares where a sequence is alone, and their workspace."""
    warm, cold, _, extras = _attention(shape, bucket, "decode")
    part = TensorType("float32", (most_parts(splits, bucket.rows), shape.heads, shape.value_dim + 2))
    result = TensorType(shape.kv_dtype, (1, bucket.rows, shape.heads, shape.value_dim))
    order = ("q", *cold, "positions", "table", *extras)
    return Operands(warm, cold, (part, result), order, True, _COLD_BYTES)


def _attention(
    shape: AttentionShape, bucket: Bucket, kernel: str
) -> tuple[dict[str, Array], dict[str, TensorType], list[int], list[str]]:
    """Warm and cold operands, how many tokens each sequence has, and the names of further arguments."""
    numbers, tokens, length = _Numbers(), bucket.rows, bucket.length
    sequences = sequences_of(tokens, length, kernel)
    table = pages_of(sequences, length, PAGE_SIZE, numbers.rng)
    state = site_of(shape).state(PAGE_SIZE, False)
    cold = {name: TensorType(dtype, (table.size, *sizes)) for name, (dtype, sizes) in state.items()}
    own, positions = queries_of(tokens, sequences, length, shape)
    more = {
        name: -np.abs(numbers("float32", shape.heads * count, scale=0.1))
        for name, count in (
            ("slopes", shape.slopes),
            ("sinks", shape.sink_scores),
            ("bias", shape.distances),
        )
        if count
    }
    warm = {"q": numbers(shape.kv_dtype, 1, shape.heads, tokens, shape.head_dim), "positions": positions}
    return {**warm, "table": table, **more}, cold, own, list(more)
