"""The kernels that tools/gpu_check.py runs one by one: shapes, random inputs, and the outputs in float64."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

PAGE: Final = 64
Array = NDArray[Any]


@dataclass(frozen=True)
class AttentionCase:
    """One attention kernel over pages, prefill or decode."""

    name: str
    phase: str
    heads: int
    kv_heads: int
    dim: int
    dtype: str = "float16"
    options: dict[str, Any] = field(default_factory=dict)
    """Fields of kvc_passes.sites.MaskFact and AttentionSite: window, softcap."""


@dataclass(frozen=True)
class ProductCase:
    """y [m, columns] = x [m, depth] w^T."""

    name: str
    columns: int
    depth: int
    dtype: str = "float16"
    stored: str = ""
    """Type of the weights, dtype by default; "uint4" and "uint8" with blocks of 32 and scales of dtype."""


ATTENTION: Final = [
    AttentionCase(f"{phase}_{name}_{short}", phase, *shape, dtype, options)
    for name, shape, options in (
        ("llama3", (32, 8, 128), {}),
        ("llama2", (32, 32, 128), {}),
        ("smollm2", (9, 3, 64), {}),
        ("gemma3", (4, 1, 256), {"window": 512}),
        ("gemma2", (8, 4, 256), {"softcap": 50.0}),
        ("phi2", (32, 32, 80), {}),
    )
    for phase in ("prefill", "decode")
    for dtype, short in (("float16", "fp16"), ("bfloat16", "bf16"))
]
PRODUCTS: Final = [
    ProductCase(f"product_{name}_{short}{'_' + stored if stored else ''}", columns, depth, dtype, stored)
    for name, columns, depth in (
        ("qkv_8b", 6144, 4096),
        ("up_8b", 28672, 4096),
        ("down_8b", 4096, 14336),
        ("smollm2", 1536, 576),
    )
    for dtype, short in (("float16", "fp16"), ("bfloat16", "bf16"))
    for stored in ("", "uint4", "uint8")
]


@dataclass
class Attention:
    """Inputs of an attention kernel by name, and the rows that are expected, float64 [n, H, D]."""

    inputs: dict[str, Array]
    expected: Array


def attention_inputs(case: AttentionCase, lengths: list[tuple[int, int]], seed: int) -> Attention:
    """Sequences of (tokens, of which new): their pages in any order, what must not be read NaN.

    A decode has one new token a sequence. All numbers are such as float16 and bfloat16 hold exactly.
    """
    rng = np.random.default_rng(seed)
    counts = [-(-length // PAGE) for length, _ in lengths]
    pages = sum(counts) + 1
    k, v = (
        np.full((pages, case.kv_heads, PAGE, case.dim), np.nan, np.float32) for _ in range(2)
    )  # page 0 stays NaN
    table = np.zeros((len(lengths), max(counts)), np.int32)
    order = list(rng.permutation(np.arange(1, pages)))
    positions, tiles, queries, expected, first = [], [], [], [], 0
    for row, ((length, new), count) in enumerate(zip(lengths, counts)):
        own = [order.pop() for _ in range(count)]
        table[row, :count] = own
        keys, values = (rounded(rng.standard_normal((length, case.kv_heads, case.dim))) for _ in range(2))
        for i, page in enumerate(own):
            part = slice(i * PAGE, min((i + 1) * PAGE, length))
            for pool, numbers in ((k, keys), (v, values)):
                pool[page, :, : part.stop - part.start] = numbers[part].transpose(1, 0, 2)
        q = rounded(rng.standard_normal((new, case.heads, case.dim)))
        queries.append(q)
        positions.append(np.arange(length - new, length))
        expected.append(reference(case, q, keys, values))
        tiles.append((row, first, new))
        first += new
    query = np.concatenate(queries).transpose(1, 0, 2)[None]
    inputs = {
        "q": query,
        "k": k,
        "v": v,
        "positions": np.concatenate(positions).astype(np.int64),
        "tiles": np.array(tiles, np.int32),
        "table": table,
    }
    return Attention(inputs, np.concatenate(expected))


def reference(case: AttentionCase, q: Array, k: Array, v: Array) -> Array:
    """float64 attention of the last queries [new, H, D] on keys and values [length, Hkv, D]."""
    new, length, group = len(q), len(k), case.heads // case.kv_heads
    q, k, v = (x.astype(np.float64) for x in (q, np.repeat(k, group, 1), np.repeat(v, group, 1)))
    scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(case.dim)
    cap = case.options.get("softcap")
    if cap:
        scores = cap * np.tanh(scores / cap)
    place, key = np.arange(length - new, length)[:, None], np.arange(length)[None]
    seen = key <= place
    if "window" in case.options:
        seen &= key > place - case.options["window"]
    scores = np.where(seen, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    result: Array = np.einsum("hqk,khd->qhd", weights, v)
    return result


def rounded(x: Array) -> Array:
    """float32 numbers that float16 and bfloat16 hold exactly: 8 bits of mantissa."""
    bits = x.astype(np.float32).view(np.uint32)
    result: Array = ((bits + 0x8000) & np.uint32(0xFFFF0000)).view(np.float32)
    return np.where(np.abs(result) < 2.0**-14, np.float32(0), result)
