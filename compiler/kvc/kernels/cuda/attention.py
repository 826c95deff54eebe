"""Attention kernels for CUDA: which Triton function a shape takes, compiled with what.

Pools are kpool [pages, Hkv, PG, D] and vpool [pages, Hkv, PG, Dv] of shape.form.dtype; for codes also kscale
and vscale bf16[pages, Hkv, PG]. q, k, v and out are of x_dtype, "float16", "bfloat16" or "float32". Extras
are the pointers slopes f32[H], sinks f32[H] and bias f32[H * distances], where the shape has them. Integers
are i32. Pointers are multiples of 16 bytes, and head dimensions of 8.

With a kvc_passes.views.View, q, k or v is [1, n, columns] in the place of [1, heads, n, D], and cosines and
sines [1, n, ..], cos and sin, are behind it (behind v for k), where it is turned.
"""

from __future__ import annotations

import math
from typing import Any

from kvc.kernels.attention import AttentionShape
from kvc_passes.views import View

from . import boxes, predicates
from .device import DeviceKernel
from .knobs import BY_ENGINE, DECODE, PREFILL, DecodeKnobs, PrefillKnobs, chosen

TRITON_TYPES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32", "int8": "i8", "uint8": "u8"}
SCALES = ("kscale", "vscale")
ANGLES = ("cos", "sin")
_LOG2E = 1.4426950408889634


def choose_tile(group: int, head_dim: int = 128) -> int:
    """Query tokens of a prefill tile: times the group 128 rows, or 64 for heads that take many registers."""
    return max((64 if head_dim >= 192 else 128) // group, 1)


def append_kernel(
    shape: AttentionShape, x_dtype: str, key: View | None = None, value: View | None = None
) -> DeviceKernel:
    """Writes the keys and values of a call's tokens into their pages, in place.

    Arguments: k [1, Hkv, n, D], v [1, Hkv, n, Dv] of x_dtype, slots i32[n] (page * PG + offset), pools, n.
    Grid (ceil(n / 16), Hkv).
    """
    x, state = f"*{TRITON_TYPES[x_dtype]}", _state(shape)
    pointers = (("k", x), ("v", x), *angles(key), ("slots", "*i32"), *state)
    absent = [(name, None) for name in (*ANGLES, *SCALES) if name not in dict(pointers)]
    views = (("KVIEW", numbers(key)), ("VVIEW", numbers(value)))
    return DeviceKernel(
        "attention.append",
        (*pointers, ("n", "i32")),
        (*absent, *_sizes(shape).items(), ("BT", APPEND_TOKENS), ("STORED", shape.stored or ""), *views),
        tuple(name for name, _ in pointers),
    )


def angles(view: View | None) -> list[tuple[str, str]]:
    """The parameters that a view adds."""
    given = () if view is None else view.angles
    return [(name, f"*{TRITON_TYPES[angle.dtype]}") for name, angle in zip(ANGLES, given)]


def numbers(view: View | None) -> tuple[int, ...]:
    """What triton_views takes."""
    view = view or View()
    turned = [n for angle in view.angles for n in (angle.columns, angle.first)] or [0] * 4
    return (view.columns or 0, view.first, view.stride, view.half, *turned)


APPEND_TOKENS = 16
"""Tokens of a program of the append kernel."""


def prefill_kernel(
    shape: AttentionShape,
    tile: int,
    x_dtype: str,
    arch: int = 80,
    knobs: PrefillKnobs = PREFILL,
    view: View | None = None,
) -> DeviceKernel:
    """Attention of many tokens a sequence, whose own keys must be in the pages.

    Arguments: q [1, H, n, D], pools, positions i64[n], tiles i32[t, 3] (table row, first token,
    tokens <= tile), table i32[b, width], extras, out [1, n, H, Dv], n, width; before out the pools as
    `matrices`, too, where they are tuned to be copied in boxes and `boxable`. Grid (t, Hkv). Any tile works;
    one of choose_tile is done at once. The blocks are of a size that is good for sm_<arch> and works on later
    architectures of its kind.
    """
    most, keys, warps, stages = chosen(knobs, prefill_blocks(shape, x_dtype, arch))
    rows = max(min(max(power(tile * shape.group), 16), most), power(shape.group))  # a token's heads at least
    constants = {
        "H": shape.heads,
        **_sizes(shape),
        "BM": rows,
        **options(shape, keys, x_dtype),
        "GUARDED": shape.guarded,
        "SPLIT": _split(shape),
        "WHOLE": shape.whole,
        "VIEW": numbers(view),
        "TILE": tile,
    }
    x = TRITON_TYPES[x_dtype]
    pools: list[tuple[str, str]] = []
    if knobs.copy == BY_ENGINE and boxable(shape, keys, x_dtype, arch):
        pools = [(name, boxes.type_of(x, keys, power(size))) for name, size in matrices(shape).items()]
    else:
        constants |= dict.fromkeys(matrices(shape))
    types = [*_inputs(shape, x, view, tiles=True), *pools, ("out", f"*{x}"), ("n", "i32"), ("width", "i32")]
    return attention_kernel("attention.prefill", types, constants, shape, warps, stages)


def boxable(shape: AttentionShape, keys: int, x_dtype: str, arch: int) -> bool:
    """Whether the copy engine can bring the blocks of `keys` keys that every row sees whole.

    Other blocks have keys that must not be read, which a box would bring.
    """
    plain = _split(shape) and shape.stored is None and not in_float32(shape, x_dtype)
    return plain and keys <= shape.page_size and boxes.legal(arch, *matrices(shape).values())


def matrices(shape: AttentionShape) -> dict[str, int]:
    """Elements of a row of the pools as matrices [pages * Hkv * PG, elements], by their parameters' names."""
    return {"kbox": shape.head_dim, "vbox": shape.value_dim}


def _split(shape: AttentionShape) -> bool:
    """Whether blocks without masks have a loop of their own: behind a narrow window few are seen whole."""
    return shape.predicate is None and min(shape.window or 2**30, shape.chunk or 2**30) >= 1024


def decode_kernel(
    shape: AttentionShape,
    splits: int,
    x_dtype: str,
    knobs: DecodeKnobs = DECODE,
    view: View | None = None,
) -> DeviceKernel:
    """Attention of one token a sequence, every sequence's keys in shares.

    Arguments: q [1, H, b, D], pools, positions i64[b], table i32[b, width], extras,
    part f32[b, shares, H, Dv + 2] (workspace: unnormalised values, maximum and sum of each share), b, width.
    Grid (b, Hkv, shares): how many there are is not compiled in.
    """
    keys, warps, stages = chosen(knobs, decode_blocks(shape, x_dtype))
    constants = {
        "H": shape.heads,
        **_sizes(shape),
        "BM": max(power(shape.group), 16),
        **options(shape, keys, x_dtype),
        "VIEW": numbers(view),
    }
    types = [
        *_inputs(shape, TRITON_TYPES[x_dtype], view, tiles=False),
        ("part", "*fp32"),
        ("b", "i32"),
        ("width", "i32"),
    ]
    return attention_kernel("attention.decode", types, constants, shape, warps, stages)


def merge_kernel(shape: AttentionShape, splits: int, x_dtype: str) -> DeviceKernel:
    """The shares of decode_kernel, at most `splits`, put together.

    Arguments: part f32[b, shares, H, Dv + 2], out [1, b, H, Dv] of out_dtype, b, shares.
    Grid (b, H, merge_blocks).
    """
    wide = _merged(shape, splits)
    return DeviceKernel(
        "attention.merge",
        (
            ("part", "*fp32"),
            ("out", f"*{TRITON_TYPES[out_dtype(shape, x_dtype)]}"),
            ("b", "i32"),
            ("shares", "i32"),
        ),
        (
            ("H", shape.heads),
            ("DV", shape.value_dim),
            ("VB", wide),
            ("SP", power(splits)),
            ("GUARDED", shape.guarded),
        ),
        ("part", "out"),
        warps=max(2, power(splits) * wide // 2048),  # 64 numbers a thread
    )


def merge_blocks(shape: AttentionShape, splits: int) -> int:
    """Programs of merge_kernel for a sequence and a head."""
    return -(-shape.value_dim // _merged(shape, splits))


def _merged(shape: AttentionShape, splits: int) -> int:
    """Elements of a value that a program of merge_kernel puts together."""
    return min(power(shape.value_dim), max(16384 // power(splits), 16))


def attention_kernel(
    function: str,
    types: list[tuple[str, str]],
    constants: dict[str, Any],
    shape: AttentionShape,
    warps: int,
    stages: int,
) -> DeviceKernel:
    """The kernel with None for what the shape does not have."""
    optional = [*(name for name, _ in _extras(shape)), *([] if shape.shared else (*ANGLES, *SCALES))]
    absent = [(name, None) for name in optional if name not in dict(types)]
    pointers = tuple(name for name, type in types if type.startswith("*"))
    return DeviceKernel(
        function, tuple(types), (*absent, *constants.items()), pointers, warps=warps, stages=stages
    )


def _inputs(shape: AttentionShape, x: str, view: View | None, *, tiles: bool) -> list[tuple[str, str]]:
    wanted = {
        ("q", f"*{x}"): True,
        **dict.fromkeys(angles(view), True),
        **dict.fromkeys(_state(shape), True),
        ("positions", "*i64"): True,
        ("tiles", "*i32"): tiles,
        ("table", "*i32"): True,
    }
    return [*(parameter for parameter, has in wanted.items() if has), *extras(shape)]


def _extras(shape: AttentionShape) -> list[tuple[str, bool]]:
    """What stands behind the block table, in order, and whether a shape has it."""
    return [("slopes", shape.slopes), ("sinks", shape.sink_scores), ("bias", shape.distances > 0)]


def extras(shape: AttentionShape) -> list[tuple[str, str]]:
    """The parameters behind the block table that a shape has."""
    return [(name, "*fp32") for name, has in _extras(shape) if has]


def _state(shape: AttentionShape) -> list[tuple[str, str]]:
    """The pools."""
    kv = f"*{TRITON_TYPES[shape.form.dtype]}"
    return [("kpool", kv), ("vpool", kv), *((name, "*bf16") for name in SCALES if shape.stored)]


def _sizes(shape: AttentionShape) -> dict[str, Any]:
    return {
        "HKV": shape.kv_heads,
        "D": shape.head_dim,
        "DV": shape.value_dim,
        "DP": max(power(shape.head_dim), 16),
        "DVP": max(power(shape.value_dim), 16),
        "PG": shape.page_size,
    }


def options(shape: AttentionShape, keys: int, x_dtype: str, *, stored: bool = True) -> dict[str, Any]:
    """Constants of the scores, with blocks of `keys` keys; `stored` if the kernel takes codes."""
    apart = shape.softcap or shape.slopes or shape.distances or shape.scale <= 0
    return {
        "BN": keys,
        "FLOAT32": in_float32(shape, x_dtype),
        "SCALE": float(shape.scale),
        "FACTOR": 1.0 if apart else float(shape.scale) * _LOG2E,
        "SOFTCAP": float(shape.softcap or 0),
        "WINDOW": shape.window or 0,
        "CHUNK": shape.chunk or 0,
        "SINK_KEYS": shape.sink_keys or 0,
        **({"STORED": shape.stored or ""} if stored else {}),
        "PREDICATE": None if shape.predicate is None else predicates.tree(shape.predicate),
        "DISTANCES": shape.distances,
    }


def in_float32(shape: AttentionShape, x_dtype: str) -> bool:
    """Whether products are of float32: 16 bits are enough where q, k and v are of one such type, or codes."""
    if shape.stored:
        return x_dtype == "float32"
    return "float32" in (x_dtype, shape.kv_dtype) or x_dtype != shape.kv_dtype


def out_dtype(shape: AttentionShape, x_dtype: str) -> str:
    """The type of out: what values are made of from keys must not be rounded again."""
    return x_dtype if shape.sliced is None else "float32"


def prefill_blocks(shape: AttentionShape, x_dtype: str, arch: int) -> tuple[int, int, int, int]:
    """Most rows and keys of a block, warps and stages, such that nothing spills.

    sm_90 and sm_100 keep operands in shared memory, of which they have much; others keep them in registers.
    A learned bias has an address for every score of a block: half as many keys.
    """
    ample = 90 <= arch < 120
    wide, float32 = _wide(shape), in_float32(shape, x_dtype)
    if float32 and wide > 128:  # three products of tf32 each, of operands in two parts
        found = (16, 16, 8, 2)
    elif float32:
        found = (64, 32, 8, 2) if wide <= 64 and ample else (32, 32, 8, 2)
    elif wide <= 64:
        found = (128, 64, 8, 3)
    elif wide <= 128:
        found = (128, 64, 8, 2) if ample else (128, 32, 8, 3)
    else:
        found = (64, 64, 8, 2) if ample else (64, 32, 8, 2)
    rows, keys, warps, stages = found
    return rows, max(keys // 2, 16) if shape.distances else keys, warps, stages


def decode_blocks(shape: AttentionShape, x_dtype: str) -> tuple[int, int, int]:
    """Keys of a block, warps and stages of decode."""
    wide = _wide(shape)
    if in_float32(shape, x_dtype):
        return (32, 8, 2) if wide <= 128 else (16, 4, 2)
    return (64, 4, 3) if wide <= 128 else (32, 4, 3)


def _wide(shape: AttentionShape) -> int:
    return max(power(shape.head_dim), power(shape.value_dim))


def power(size: int) -> int:
    """The least power of two that is not below `size`."""
    return 1 << math.ceil(math.log2(size)) if size > 1 else 1
