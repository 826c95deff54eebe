"""Pages as numpy sees them: empty ones that must not be read, and the numbers that stand in them."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from kvc.kernels.attention import AttentionShape

LARGEST = {"int8": 127, "fp8": 448, "int4": 7}


def numpy_type(name: str) -> np.dtype:
    """The numpy type of a stored dtype."""
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def poisoned(dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """A pool whose pages must not be read: NaN, or codes beside scales that are NaN."""
    kind = numpy_type(dtype)
    return np.full(shape, 0x5A if kind.kind in "iu" else np.nan, kind)


def numbers(shape: AttentionShape, codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Codes [..., D or bytes] and their scales [...] as float64 [..., D]."""
    if shape.stored == "fp8":
        values = codes.view(ml_dtypes.float8_e4m3fn).astype(float)
    elif shape.stored == "int4":
        values = np.concatenate([codes & 15, codes >> 4], axis=-1).astype(float) - 8
    else:
        values = codes.astype(float)
    return values * scales.astype(float)[..., None]


def check_codes(
    shape: AttentionShape, x: np.ndarray, kept: np.ndarray, scales: np.ndarray, unit: float = 2.0**-8
) -> None:
    """What is kept of x [..., D] is the nearest that its scale allows, which is as small as it can be.

    unit: the largest relative error of a number as bfloat16.
    """
    largest, scale = LARGEST[str(shape.stored)], scales.astype(float)[..., None]
    needed = np.abs(x).max(-1, keepdims=True) / largest
    assert (np.abs(scale - needed) <= needed * unit).all()
    step = scale if shape.stored != "fp8" else np.maximum(np.abs(kept) / 8, scale * 2.0**-9)
    # Half a step; where the scale was rounded down, the largest numbers lie beyond the range.
    assert (np.abs(kept - x) <= step / 2 * 1.001 + scale * largest * unit).all()


def mask_of(shape: AttentionShape, positions: np.ndarray, length: int) -> np.ndarray:
    """The mask [heads, queries, keys], from its definition in kvc_passes.sites."""
    q, k = positions[None, :, None], np.arange(length)[None, None]
    h = np.arange(shape.heads)[:, None, None]
    if shape.predicate is not None:
        return np.vectorize(eval(f"lambda q, k, h: {shape.predicate}"), otypes=[bool])(q, k, h)
    if shape.whole:
        return np.ones((shape.heads, len(positions), length), bool)
    shown = np.broadcast_to(k <= q, (shape.heads, len(positions), length))
    if shape.window is not None:
        shown = shown & ((k > q - shape.window) | (k < (shape.sink_keys or 0)))
    if shape.chunk is not None:
        shown = shown & (k // shape.chunk == q // shape.chunk)
    return shown


def attended(
    shape: AttentionShape,
    queries: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    positions: np.ndarray,
    slopes: np.ndarray,
    sinks: np.ndarray,
) -> np.ndarray:
    """Attention [n, H, Dv] in float64 of queries [H, n, D] at `positions`.

    keys [t, Hkv, D], values [t, Hkv, Dv]; slopes and sinks [H] count where the shape has such.
    """
    masks, found = mask_of(shape, positions, len(keys)), []
    for h in range(shape.heads):
        s = queries[h].astype(float) @ keys[:, h // shape.group].T * shape.scale
        s = shape.softcap * np.tanh(s / shape.softcap) if shape.softcap else s
        if shape.slopes:
            s = s + float(slopes[h]) * (np.arange(len(keys)) - positions[:, None])
        s = np.where(masks[h], s, -np.inf)
        top = s.max(axis=1, keepdims=True)
        p = np.exp(s - top)
        total = p.sum(axis=1, keepdims=True)
        if shape.sink_scores:
            total = total + np.exp(float(sinks[h]) - top)
        found.append(p / total @ values[:, h // shape.group])
    return np.stack(found, axis=1)
