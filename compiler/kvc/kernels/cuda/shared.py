"""Attention kernels for CUDA where what is kept of a token is its key and its value in one.

The pool xpool is [pages, 1, PG, D] of shape.kv_dtype; everything else is as in kvc.kernels.cuda.attention.
"""

from __future__ import annotations

from kvc.kernels.attention import AttentionShape

from .attention import TRITON_TYPES, attention_kernel, extras, in_float32, options, out_dtype, power
from .device import DeviceKernel

APPEND_TOKENS = 16
APPEND_ELEMENTS = 256
"""Tokens and elements of a program of the append kernel."""


NOT_MADE = dict.fromkeys(("wkey", "wvalue", "bkey", "bvalue", "MADE"))
"""Parameters that kvc.kernels.cuda.remade has."""
NOT_REKEYED = dict.fromkeys(("factors", "REKEYED"))
"""Those of kvc.kernels.cuda.rekeyed."""


def choose_tile(shape: AttentionShape) -> int:
    """Query tokens of a tile that a program of prefill does at once."""
    rows, heads, _ = _blocks(shape, in_float32(shape, shape.kv_dtype), decodes=False)
    return rows // heads


def append_kernel(shape: AttentionShape, x_dtype: str) -> DeviceKernel:
    """Writes what is kept of a call's tokens into their pages, in place.

    Arguments: k [1, 1, n, D] of x_dtype, slots i32[n] (page * PG + offset), xpool, n.
    Grid (ceil(n / APPEND_TOKENS), ceil(D / APPEND_ELEMENTS)).
    """
    types = (("x", f"*{TRITON_TYPES[x_dtype]}"), ("slots", "*i32"), _pool(shape), ("n", "i32"))
    constants = {"D": shape.head_dim, "DC": APPEND_ELEMENTS, "PG": shape.page_size, "BT": APPEND_TOKENS}
    return DeviceKernel("shared.append", types, tuple(constants.items()), ("x", "slots", "xpool"))


def prefill_kernel(shape: AttentionShape, x_dtype: str, arch: int = 80) -> tuple[DeviceKernel, int]:
    """Attention of many tokens a sequence, which must be in the pages; and programs a tile.

    Arguments: q [1, H, n, query_dim], xpool, positions i64[n], tiles i32[t, 3] (table row, first token,
    tokens), table i32[b, width], extras, out [1, n, H, DV] of out_dtype, n, width. Grid (t, programs a tile).
    """
    float32 = in_float32(shape, x_dtype)
    rows, heads, block = _blocks(shape, float32, decodes=False)
    # sm_90 and sm_100 keep operands in shared memory; elsewhere larger blocks would spill registers.
    ample = 90 <= arch < 120 and not float32
    constants = {
        **_sizes(shape, block, 128 if ample else 32 if float32 else 64),
        "BM": rows,
        "BH": heads,
        # A learned bias has an address for every score of a block.
        **options(shape, 64 if ample and not shape.distances else 32, x_dtype, stored=False),
        "GUARDED": shape.guarded,
        "WHOLE": shape.whole,
        "SLICED": _sliced(shape),
        **NOT_MADE,
        **NOT_REKEYED,
    }
    x, out = (f"*{TRITON_TYPES[kind]}" for kind in (x_dtype, out_dtype(shape, x_dtype)))
    types = [*inputs(shape, x, tiles=True), ("out", out), ("n", "i32"), ("width", "i32")]
    kernel = attention_kernel("shared.prefill", types, constants, shape, 8, 2)
    return kernel, -(-shape.heads // heads) * -(-shape.value_dim // block)


def decode_kernel(shape: AttentionShape, x_dtype: str) -> tuple[DeviceKernel, int]:
    """Attention of one token a sequence, every sequence's keys in shares; and programs a share.

    Arguments: q [1, H, b, query_dim], xpool, positions i64[b], table i32[b, width], extras, part f32[b,
    shares, H, DV + 2] (as for attention.decode_kernel), b, width. Grid (b, programs a share, shares).
    """
    float32 = in_float32(shape, x_dtype)
    rows, heads, block = _blocks(shape, float32, decodes=True)
    constants = {
        **_sizes(shape, block, 32 if float32 else 128),
        "BM": rows,
        "BH": heads,
        **options(shape, 16 if float32 else 32, x_dtype, stored=False),
        "SLICED": _sliced(shape),
        **NOT_MADE,
        **NOT_REKEYED,
    }
    x = f"*{TRITON_TYPES[x_dtype]}"
    types = [*inputs(shape, x, tiles=False), ("part", "*fp32"), ("b", "i32"), ("width", "i32")]
    kernel = attention_kernel("shared.decode", types, constants, shape, 8, 2)
    return kernel, -(-shape.heads // heads) * -(-shape.value_dim // block)


def scored(shape: AttentionShape, x_dtype: str, decodes: bool) -> int:
    """How often a query is multiplied with its own key, or another: programs of its values do so each."""
    _, heads, block = _blocks(shape, in_float32(shape, x_dtype), decodes)
    keys = max(1, heads // _group(shape)) if shape.sliced is not None else 1
    return keys * -(-shape.value_dim // block)


def _blocks(shape: AttentionShape, float32: bool, decodes: bool) -> tuple[int, int, int]:
    """Rows of a program, heads among them, and elements of their values.

    Queries that meet keys of their own: prefill takes those of one key, so that no other is read, decode
    whole groups.
    """
    group = _group(shape)
    if decodes:
        rows = min(max(power(shape.heads), 16), 16 if float32 else 32)
        wide, heads = 256 if float32 else 512, rows
        if shape.sliced is not None:
            rows = max(rows, power(group))
            heads = rows // group * group
    else:
        rows = 32 if float32 else 64
        wide = 256 if not float32 else 128 if shape.sliced is None else 64
        heads = min(power(shape.heads), rows) if shape.sliced is None else group
        rows = max(rows, power(heads))
    return rows, heads, min(max(power(shape.value_dim), 16), wide)


def _group(shape: AttentionShape) -> int:
    """Query heads that meet the same part of a kept key."""
    return 1 if shape.sliced is None else shape.heads // shape.sliced.count


def _sliced(shape: AttentionShape) -> tuple[int | bool, ...] | None:
    """What triton_sliced.scores has to know of keys."""
    if shape.sliced is None:
        return None
    dim, half = shape.sliced.dim, shape.sliced.half
    parts = (max(power(size), 16) for size in (half, dim - 2 * half))
    return (_group(shape), dim, half, shape.sliced.fine, *parts)


def _pool(shape: AttentionShape) -> tuple[str, str]:
    return ("xpool", f"*{TRITON_TYPES[shape.kv_dtype]}")


def inputs(shape: AttentionShape, x: str, *, tiles: bool) -> list[tuple[str, str]]:
    """Parameters before those that some kernels alone have; x: the type of queries."""
    wanted = {
        ("q", x): True,
        _pool(shape): True,
        ("positions", "*i64"): True,
        ("tiles", "*i32"): tiles,
        ("table", "*i32"): True,
    }
    return [*(parameter for parameter, has in wanted.items() if has), *extras(shape)]


def _sizes(shape: AttentionShape, block: int, deep: int) -> dict[str, int]:
    return {
        "H": shape.heads,
        "D": shape.head_dim,
        "QD": shape.query_dim,
        "DV": shape.value_dim,
        "DC": min(max(power(shape.head_dim), 16), deep),
        "VB": block,
        "PG": shape.page_size,
    }
