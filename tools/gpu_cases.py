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
    state: str = "paged_kv"
    """The form, by kvc_passes.sites.FormName."""
    rest: int = 0
    """Elements that are kept beside keys, or behind what they are made of."""
    depth: int = 0
    """Elements of what keys and values are made of again."""
    of_memory: bool = False
    """Whether keys and values are those of an encoder's output."""
    turned: bool = False
    """Whether queries stand in a product with keys and values, and are turned when they are read."""


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
FORMS: Final = [
    AttentionCase(f"{phase}_{name}_{short}", phase, *shape, dtype, state=state, **options)
    for name, shape, state, options in (
        ("turned", (32, 8, 128), "paged_kv", {"turned": True}),
        ("whisper_cross", (12, 12, 64), "paged_kv", {"of_memory": True}),
        ("whisper_encoder", (12, 1, 768), "encoder_output", {"of_memory": True}),
        ("gpt2_x", (12, 1, 768), "x_absorbed", {}),
        ("keys", (8, 8, 128), "k_plus_r", {"rest": 112}),
        ("made", (8, 8, 128), "x_gemm", {"depth": 1024}),
    )
    for phase in ("prefill", "decode")
    for dtype, short in (("float16", "fp16"), ("bfloat16", "bf16"))
] + [
    AttentionCase(f"prefill_latent_{short}", "prefill", 16, 16, 192, dtype, {}, "mla_latent", 64, 512)
    for dtype, short in (("float16", "fp16"), ("bfloat16", "bf16"))
]
"""Other forms of the state, and an encoder's output."""
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
BOXED: Final = [case for case in PRODUCTS if not case.stored]
BOXED_ATTENTION: Final = [
    case for case in ATTENTION if case.phase == "prefill" and "window" not in case.options
]
"""What the copy engine of sm_90 can bring, too: the same kernels in another library."""


@dataclass
class Attention:
    """Inputs of an attention kernel by name, in order, and the rows expected, float64 [n, H, F]."""

    inputs: dict[str, Array]
    expected: Array


@dataclass(frozen=True)
class Kept:
    """What pools hold of a sequence's tokens [length, heads, elements], and the keys and values it means."""

    rows: dict[str, Array]
    keys: Array
    values: Array


def attention_inputs(case: AttentionCase, lengths: list[tuple[int, int]], seed: int) -> Attention:
    """Sequences of (tokens, of which new): their pages in any order, what must not be read NaN.

    A decode has one new token a sequence. All numbers are such as float16 and bfloat16 hold exactly. Of an
    encoder's output the first number is its rows, all of which the new tokens see.
    """
    rng = np.random.default_rng(seed)
    counts = [-(-length // PAGE) for length, _ in lengths]
    pages = sum(counts) + 1
    weights = weights_of(case, rng)
    table = np.zeros((len(lengths), max(counts)), np.int32)
    order = list(rng.permutation(np.arange(1, pages)))
    pools: dict[str, Array] = {}
    positions, tiles, queries, angles, expected, first = [], [], [], [], [], 0
    for row, ((length, new), count) in enumerate(zip(lengths, counts)):
        own = [order.pop() for _ in range(count)]
        table[row, :count] = own
        kept = kept_of(case, rng, length, weights)
        for name, numbers in kept.rows.items():
            shape = (pages, numbers.shape[1], PAGE, numbers.shape[2])
            pool = pools.setdefault(name, np.full(shape, np.nan, np.float32))  # page 0 stays NaN
            for i, page in enumerate(own):
                part = numbers[i * PAGE : (i + 1) * PAGE]
                pool[page, :, : len(part)] = part.transpose(1, 0, 2)
        q = rounded(rng.standard_normal((new, case.heads, case.dim)))
        queries.append(q)
        where = np.full(new, length - 1) if case.of_memory else np.arange(length - new, length)
        positions.append(where)
        angle = rng.uniform(0, 2 * np.pi, (new, 1, case.dim // 2))
        angles.append(np.stack([np.cos(angle), np.sin(angle)]).astype(np.float32))
        asked = turned(q, *angles[-1]) if case.turned else q
        expected.append(reference(case, asked, kept.keys, kept.values, where))
        tiles.append((row, first, new))
        first += new
    inputs = {
        **query_inputs(case, np.concatenate(queries), np.concatenate(angles, 1)),
        **pools,
        "positions": np.concatenate(positions).astype(np.int64),
        "tiles": np.array(tiles, np.int32),
        "table": table,
        **weights,
    }
    return Attention(inputs, np.concatenate(expected))


def query_inputs(case: AttentionCase, q: Array, angles: Array) -> dict[str, Array]:
    """Queries [n, H, D] as the kernel is given them, with cosines and sines where it turns them."""
    if not case.turned:
        return {"q": q.transpose(1, 0, 2)[None]}
    rows = np.full((1, len(q), query_columns(case)), np.nan, np.float32)
    rows[0, :, : case.heads * case.dim] = q.reshape(len(q), -1)
    cosine, sine = angles.transpose(0, 2, 1, 3)
    return {"q": rows, "cos": cosine, "sin": sine}


def query_columns(case: AttentionCase) -> int:
    """Columns of a product of queries, keys and values."""
    return (case.heads + 2 * case.kv_heads) * case.dim


def weights_of(case: AttentionCase, rng: np.random.Generator) -> dict[str, Array]:
    """What a kernel makes keys and values with, of a form in which it does."""
    return {name: rounded(rng.standard_normal(shape) / 16) for name, shape in weight_shapes(case).items()}


def weight_shapes(case: AttentionCase) -> dict[str, tuple[int, int]]:
    """W_K and W_V [Hkv * D, depth]; of latent attention W_K is [Hkv * depth, D]."""
    if not case.depth:
        return {}
    size = case.dim - case.rest
    value = (case.kv_heads * size, case.depth)
    key = (case.kv_heads * case.depth, size) if case.state == "mla_latent" else value
    return {"w_key": key, "w_value": value}


def kept_of(case: AttentionCase, rng: np.random.Generator, length: int, weights: dict[str, Array]) -> Kept:
    """Random tokens in the case's form."""

    def numbers(heads: int, width: int) -> Array:
        return rounded(rng.standard_normal((length, heads, width)))

    if case.state == "paged_kv":
        k, v = (numbers(case.kv_heads, case.dim) for _ in range(2))
        return Kept({"k": k, "v": v}, k, v)
    if case.state == "k_plus_r":
        return _sliced(case, numbers(1, case.kv_heads * case.dim + case.rest), rng)
    if case.state == "mla_latent":
        return _latent(case, numbers(1, case.depth + case.rest), weights)
    if case.state == "x_gemm":
        return _made(case, numbers(1, case.depth), rng, weights)
    x = numbers(1, case.dim)
    return Kept({"x": x}, x, x)


def _sliced(case: AttentionCase, values: Array, rng: np.random.Generator) -> Kept:
    """Keys before they are turned, other elements, and angles, as kvc_passes.sites.Sliced says."""
    length = len(values)
    angles, (cosine, sine) = angles_of(rng, length, case.dim // 2)
    keys = values[:, 0, : case.kv_heads * case.dim].reshape(length, case.kv_heads, case.dim)
    return Kept({"x": np.concatenate([values, angles], 2)}, turned(keys, cosine, sine), values)


def _made(case: AttentionCase, x: Array, rng: np.random.Generator, weights: dict[str, Array]) -> Kept:
    """What keys and values are made of, and angles, as kvc_passes.sites.Remade says."""
    angles, (cosine, sine) = angles_of(rng, len(x), case.dim // 2)
    keys, values = (
        (x[:, 0].astype(np.float64) @ weights[name].T).reshape(len(x), case.kv_heads, case.dim)
        for name in ("w_key", "w_value")
    )
    return Kept({"x": np.concatenate([x, angles], 2)}, turned(keys, cosine, sine), values)


def _latent(case: AttentionCase, row: Array, weights: dict[str, Array]) -> Kept:
    """What keys and values are made of, and the last elements of every key."""
    heads, size = case.kv_heads, case.dim - case.rest
    x, behind = row[:, 0, : case.depth].astype(np.float64), row[:, :, case.depth :]
    key = weights["w_key"].reshape(heads, case.depth, size)
    keys = np.concatenate([np.einsum("nd,hde->nhe", x, key), np.repeat(behind, heads, 1)], 2)
    values = (x @ weights["w_value"].T).reshape(len(x), heads, size)
    return Kept({"x": row}, keys, values)


def angles_of(rng: np.random.Generator, length: int, half: int) -> tuple[Array, tuple[Array, Array]]:
    """What is kept of angles [length, 1, 4 * half], and the cosines and sines [length, 1, half] it means."""
    angle = rng.uniform(0, 2 * np.pi, (length, 1, half))
    scaled = [256 * f(angle) for f in (np.cos, np.sin)]
    coarse = [np.floor(x) / 256 for x in scaled]
    fine = [rounded(x - np.floor(x)) for x in scaled]
    cosine, sine = (c + f.astype(np.float64) / 256 for c, f in zip(coarse, fine))
    return np.concatenate([*coarse, *fine], 2).astype(np.float32), (cosine, sine)


def turned(keys: Array, cosine: Array, sine: Array) -> Array:
    """float64 keys [length, heads, dim] as their positions turn them."""
    low, high = np.split(keys.astype(np.float64), 2, axis=2)
    return np.concatenate([low * cosine - high * sine, high * cosine + low * sine], 2)


def reference(case: AttentionCase, q: Array, k: Array, v: Array, place: Array) -> Array:
    """float64 attention of queries [new, H, D] at `place` on keys and values [length, Hkv, D]."""
    q, k, v = (
        x.astype(np.float64) for x in (q, *(np.repeat(x, case.heads // x.shape[1], 1) for x in (k, v)))
    )
    scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(case.dim)
    cap = case.options.get("softcap")
    if cap:
        scores = cap * np.tanh(scores / cap)
    key = np.arange(len(k))[None]
    seen = key <= place[:, None]
    if "window" in case.options:
        seen &= key > place[:, None] - case.options["window"]
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
