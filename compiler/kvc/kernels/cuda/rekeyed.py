"""Attention kernels for CUDA over kept values, of which keys are made: kvc_passes.sites.Rekeyed.

The pool xpool is [pages, 1, PG, width] of shape.kv_dtype; everything else is as in kvc.kernels.cuda.shared.
"""

from __future__ import annotations

from typing import Any

from kvc.kernels.attention import AttentionShape
from kvc.kernels.rekeyed import row_of
from kvc_passes.sites import Rekeyed

from .attention import TRITON_TYPES, attention_kernel, in_float32, options, power
from .device import DeviceKernel
from .shared import NOT_MADE, inputs


def prefill_kernel(
    shape: AttentionShape, kept: Rekeyed, x_dtype: str, arch: int = 80
) -> tuple[DeviceKernel, int]:
    """Attention of many tokens a sequence; and programs a tile.

    Arguments: q [1, H, n, D], xpool, positions i64[n], tiles i32[t, 3] (table row, first token, tokens),
    table i32[b, width], extras, factors f32[Hkv * D] where keys are scaled, out [1, n, H, D], n, width. Grid
    (t, programs a tile).
    """
    x, blocks = f"*{TRITON_TYPES[x_dtype]}", _prefill_blocks(shape, x_dtype, arch)
    constants = {
        **_constants(shape, kept, x_dtype, blocks),
        "GUARDED": shape.guarded,
        "WHOLE": shape.whole,
    }
    types = [*_inputs(shape, kept, x, tiles=True), ("out", x), ("n", "i32"), ("width", "i32")]
    kernel = attention_kernel("shared.prefill", types, constants, row_of(shape, kept), 8, 2)
    return kernel, shape.kv_heads * scored(shape, x_dtype, decodes=False, arch=arch)


def decode_kernel(shape: AttentionShape, kept: Rekeyed, x_dtype: str) -> tuple[DeviceKernel, int]:
    """Attention of one token a sequence, every sequence's keys in shares; and programs a share.

    Arguments: q [1, H, b, D], xpool, positions i64[b], table i32[b, width], extras, factors as
    prefill_kernel, part f32[b, shares, H, D + 2] (as for attention.decode_kernel), b, width. Grid (b,
    programs a share, shares).
    """
    x, blocks = f"*{TRITON_TYPES[x_dtype]}", _decode_blocks(shape, x_dtype)
    constants = _constants(shape, kept, x_dtype, blocks)
    types = [*_inputs(shape, kept, x, tiles=False), ("part", "*fp32"), ("b", "i32"), ("width", "i32")]
    kernel = attention_kernel("shared.decode", types, constants, row_of(shape, kept), 8, 2)
    return kernel, shape.kv_heads * scored(shape, x_dtype, decodes=True)


def choose_tile(shape: AttentionShape, arch: int) -> int:
    """Query tokens of a tile, which share the keys that are made."""
    return max(_prefill_blocks(shape, shape.kv_dtype, arch)[0] // shape.group, 1)


def scored(shape: AttentionShape, x_dtype: str, *, decodes: bool, arch: int = 80) -> int:
    """How often a key is made and multiplied with a query: programs of its value's elements do so each."""
    blocks = _decode_blocks(shape, x_dtype) if decodes else _prefill_blocks(shape, x_dtype, arch)
    return -(-shape.value_dim // blocks[2])


def _prefill_blocks(shape: AttentionShape, x_dtype: str, arch: int) -> tuple[int, int, int, int]:
    """Rows, keys and elements of their values of a block, and elements of a product's step; nothing spills.

    Where values are wide, fewer rows make their keys once, and not for each part of the values.
    """
    wide = shape.value_dim > 128
    if in_float32(shape, x_dtype):
        rows, keys, values, deep = 32, 32, 128, 16
    elif 90 <= arch < 120:
        rows, keys, values, deep = (64, 32, 512, 32) if wide else (64, 64, 128, 32)
    else:
        rows, keys, values, deep = (32, 32, 512, 16) if wide else (64, 32, 128, 32)
    keys = min(keys, 32) if shape.distances else keys  # as attention.prefill_blocks
    return max(rows, power(shape.group)), keys, _values(shape, values), deep


def _decode_blocks(shape: AttentionShape, x_dtype: str) -> tuple[int, int, int, int]:
    rows = max(power(shape.group), 16)
    if in_float32(shape, x_dtype):
        return rows, 16, _values(shape, 256), 32
    return rows, 32, _values(shape, 512), 64


def _values(shape: AttentionShape, most: int) -> int:
    return min(max(power(shape.value_dim), 16), most)


def _constants(
    shape: AttentionShape, kept: Rekeyed, x_dtype: str, blocks: tuple[int, int, int, int]
) -> dict[str, Any]:
    rows, keys, values, deep = blocks
    steps = [min(max(power(size), 16), deep) for size in (kept.pairs, kept.dim - 2 * kept.pairs)]
    return {
        "H": shape.heads,
        "D": kept.width,
        "QD": shape.head_dim,
        "DV": shape.value_dim,
        "DC": 16,
        "VB": values,
        "PG": shape.page_size,
        "BM": rows,
        "BH": shape.group,
        **options(shape, keys, x_dtype, stored=False),
        "SLICED": None,
        **NOT_MADE,
        "REKEYED": (shape.group, kept.values, kept.dim, kept.half, kept.pairs, kept.fine, *steps),
        **({} if kept.scaled else {"factors": None}),
    }


def _inputs(shape: AttentionShape, kept: Rekeyed, x: str, *, tiles: bool) -> list[tuple[str, str]]:
    return [*inputs(shape, x, tiles=tiles), *([("factors", "*fp32")] if kept.scaled else [])]
