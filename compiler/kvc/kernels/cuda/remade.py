"""Attention kernels for CUDA that make keys and values again from what is kept.

That is what kvc_passes.sites.Remade says, in both phases; or in prefill what one key of all heads is, with
W_K as the absorbed product of decode has it.

The pool xpool is [pages, 1, PG, width] of shape.kv_dtype; everything else is as in kvc.kernels.cuda.shared.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from kvc.kernels.attention import AttentionShape
from kvc_passes.sites import Remade

from .attention import TRITON_TYPES, attention_kernel, in_float32, options, power
from .device import DeviceKernel
from .shared import NOT_REKEYED, inputs


@dataclass(frozen=True)
class Making:
    """What keys and values are made from."""

    kept: Remade
    key_dtype: str
    value_dtype: str
    """Types of the weights W_K [Hkv * D, depth] and W_V [Hkv * Dv, depth]."""
    biases: tuple[bool, bool]
    """Whether keys [Hkv * D] and values [Hkv * Dv] have one, of the queries' type."""
    absorbed: bool = False
    """Whether W_K is [Hkv * depth, D] instead."""
    extra: int = 0
    """Elements of a key, its last, that stand behind the depth elements of what is kept."""

    @property
    def width(self) -> int:
        """Elements that are kept of a token."""
        return self.kept.width + self.extra


def rebuilt_shape(latent: AttentionShape, heads: int, key: int, value: int) -> tuple[AttentionShape, int]:
    """The attention of `heads` KV heads that is made of `latent`, one key of all heads; and Making.extra."""
    extra = latent.head_dim - latent.value_dim
    return replace(latent, kv_heads=heads, head_dim=key + extra, value_dim=value), extra


def kept_shape(shape: AttentionShape, kept: Remade) -> AttentionShape:
    """What pages hold: one key of all heads."""
    return replace(shape, kv_heads=1, head_dim=kept.width, value_dim=kept.depth, shared=True)


def prefill_kernel(shape: AttentionShape, making: Making, x_dtype: str, arch: int = 80) -> DeviceKernel:
    """Attention of many tokens a sequence.

    Arguments: q [1, H, n, D], xpool, positions i64[n], tiles i32[t, 3] (table row, first token, tokens),
    table i32[b, width], extras, wkey, wvalue, bkey and bvalue (where there are some), out [1, n, H, Dv], n,
    width. Grid (t, Hkv). Keys and values are made once for prefill_rows rows.
    """
    x, rows = f"*{TRITON_TYPES[x_dtype]}", prefill_rows(shape, making, x_dtype, arch)
    constants = {**_constants(shape, making, x_dtype, rows, arch), "GUARDED": shape.guarded, "WHOLE": False}
    kept = kept_shape(shape, making.kept)
    rest = [("out", x), ("n", "i32"), ("width", "i32")]
    return attention_kernel("shared.prefill", _types(shape, making, x, True, rest), constants, kept, 8, 2)


def decode_kernel(shape: AttentionShape, making: Making, x_dtype: str, arch: int = 80) -> DeviceKernel:
    """Attention of one token a sequence, every sequence's keys in shares.

    Arguments: q [1, H, b, D], xpool, positions i64[b], table i32[b, width], extras, weights as
    prefill_kernel, part f32[b, shares, H, Dv + 2] (as for attention.decode_kernel), b, width. Grid
    (b, Hkv, shares).
    """
    x, rows = f"*{TRITON_TYPES[x_dtype]}", max(power(shape.group), 16)
    constants = _constants(shape, making, x_dtype, rows, arch)
    kept = kept_shape(shape, making.kept)
    rest = [("part", "*fp32"), ("b", "i32"), ("width", "i32")]
    return attention_kernel("shared.decode", _types(shape, making, x, False, rest), constants, kept, 8, 2)


def rebuilds(key: int, value: int, x_dtype: str) -> bool:
    """Whether prefill makes keys and values of so many elements again, as `absorbed` has W_K."""
    return x_dtype != "float32" and max(key, value) <= 128  # others spill registers


def prefill_rows(shape: AttentionShape, making: Making, x_dtype: str, arch: int) -> int:
    """Query rows that share what is made: fewer where what else a program holds takes its registers."""
    half, ample = making.kept.half, _ample(shape, making, x_dtype, arch)
    rows = 128 if ample else 32 if _in_float32(shape, making, x_dtype) else 64
    masks = (shape.window, shape.chunk, shape.predicate)
    costly = (
        _wide(shape, making),
        bool(half) and shape.head_dim > 2 * half and not ample,  # keys in three parts
        bool(shape.slopes or shape.sink_scores or shape.softcap or shape.distances)
        or any(m is not None for m in masks),
    )
    return max(rows >> sum(costly), power(shape.group), 16)


def _wide(shape: AttentionShape, making: Making) -> bool:
    return max(shape.head_dim - making.extra, shape.value_dim) > 128


def _ample(shape: AttentionShape, making: Making, x_dtype: str, arch: int) -> bool:
    """Whether operands stay in shared memory, as sm_90 and sm_100 have it."""
    return 90 <= arch < 120 and not _in_float32(shape, making, x_dtype)


def _in_float32(shape: AttentionShape, making: Making, x_dtype: str) -> bool:
    same = {making.key_dtype, making.value_dtype} == {x_dtype}
    return in_float32(shape, x_dtype) or not same


def _constants(shape: AttentionShape, making: Making, x_dtype: str, rows: int, arch: int) -> dict[str, Any]:
    kept, float32 = making.kept, _in_float32(shape, making, x_dtype)
    spacious = _ample(shape, making, x_dtype, arch) and not _wide(shape, making)
    keys = 16 if float32 else 64 if spacious else 32
    key, half, deep = shape.head_dim - making.extra, kept.half, 32 if float32 else 64
    parts = [max(power(size), 16) for size in (half, key - 2 * half, making.extra)]
    made = (shape.group, kept.depth, key, half, kept.fine, *parts[:2], deep)
    made += (making.absorbed, making.extra, parts[2])
    absent = {"bkey": making.biases[0], "bvalue": making.biases[1]}
    return {
        "H": shape.heads,
        "D": making.width,
        "QD": shape.head_dim,
        "DV": shape.value_dim,
        "DC": 16,
        "VB": max(power(shape.value_dim), 16),
        "PG": shape.page_size,
        "BM": rows,
        "BH": shape.group,
        **options(shape, keys, x_dtype, stored=False),
        "FLOAT32": float32,
        "SLICED": None,
        "MADE": made,
        **NOT_REKEYED,
        **{name: None for name, has in absent.items() if not has},
    }


def _types(
    shape: AttentionShape, making: Making, x: str, tiles: bool, rest: list[tuple[str, str]]
) -> list[tuple[str, str]]:
    wanted = {
        ("wkey", f"*{TRITON_TYPES[making.key_dtype]}"): True,
        ("wvalue", f"*{TRITON_TYPES[making.value_dtype]}"): True,
        ("bkey", x): making.biases[0],
        ("bvalue", x): making.biases[1],
    }
    made = [parameter for parameter, has in wanted.items() if has]
    return [*inputs(shape, x, tiles=tiles), *made, *rest]
