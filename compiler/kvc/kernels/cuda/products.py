"""Products with weights for CUDA: which Triton functions a weight takes, compiled with what.

Weights are stored as kvc.kernels.cuda.rows says. Pointers are multiples of 16 bytes; integers are i32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from kvc_passes.weight_format import WeightFormat

from . import boxes
from .device import DeviceKernel
from .knobs import BY_ENGINE, PRODUCT, ProductKnobs, chosen

TRITON_TYPES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32", "uint8": "u8", "uint4": "u8"}

_PROCESSORS = 132
"""Of a large GPU."""

Variant = tuple[int | None, DeviceKernel, int, int]
"""Most rows of x that it is meant for, the kernel, and the rows and columns of y that a program computes."""


def product_kernels(
    columns: int,
    depth: int,
    format: WeightFormat,
    x_dtype: str,
    out_dtype: str,
    bias: bool,
    arch: int = 80,
    residual: bool = False,
    knobs: Callable[[int], ProductKnobs] = lambda most: PRODUCT,
) -> tuple[Variant, ...]:
    """y = x w^T + bias + residual, for few rows, more, and any number of them.

    Arguments: x [m, depth] of x_dtype, w, scales and zeros (as the format has them), bias [columns] of
    x_dtype if `bias`, residual [m, columns] of x_dtype if `residual`, y [m, columns] of out_dtype, m,
    columns, depth. Where they are tuned to be copied in boxes and `boxable`, xbox and wbox for x and w.
    Grid (ceil(m / rows) * ceil(columns / columns of a program)), with both from the variant.
    knobs: what is tuned of the variant for at most so many rows of x, 0 for any number.
    Raises ValueError for blocks of codes that are neither a power of two of at least 16 nor all of depth.
    """
    block = _block(depth, format)
    if block and (block < 16 or block & (block - 1)):
        raise ValueError(f"codes in blocks of {block} of {depth} inputs")
    float32 = in_float32(format, x_dtype)
    variants: list[Variant] = []
    for most, *row in blocks(columns, depth, format, x_dtype, arch):
        tuned = knobs(most or 0)
        rows, wide, deep, warps, stages = chosen(tuned, tuple(row))
        engine = tuned.copy == BY_ENGINE and boxable(depth, format, x_dtype, arch)
        absent = [(name, None) for name, there in (("bias", bias), ("residual", residual)) if not there]
        x, sizes = TRITON_TYPES[x_dtype], {"columns": columns, "depth": depth}
        if engine:
            operands = [("xbox", boxes.type_of(x, rows, deep)), ("wbox", boxes.type_of(x, wide, deep))]
            constants = (*absent, ("BM", rows), ("BN", wide), ("BK", deep))
        else:
            operands = [("x", f"*{x}"), *_weight(format)]
            constants = (
                *_absent(format),
                *absent,
                *_sizes(rows, wide, deep, depth, format),
                ("FLOAT32", float32),
            )
        types = (
            *operands,
            *([("bias", f"*{x}")] if bias else []),
            *([("residual", f"*{x}")] if residual else []),
            ("y", f"*{TRITON_TYPES[out_dtype]}"),
            ("m", "i32"),
            ("columns", "i32"),
            ("depth", "i32"),
        )
        aligned = (*_pointers(types), *(name for name, size in sizes.items() if size % 16 == 0))
        function = "products.boxed" if engine else "products.product"
        variants.append((most, DeviceKernel(function, types, constants, aligned, warps, stages), rows, wide))
    return tuple(variants)


def boxable(depth: int, format: WeightFormat, x_dtype: str, arch: int) -> bool:
    """Whether the copy engine can bring both operands: 16-bit floats of one type, rows of whole 16 bytes."""
    plain = not format.coded and not in_float32(format, x_dtype)
    return plain and boxes.legal(arch, depth)


def head_product_kernels(
    heads: int,
    group: int,
    columns: int,
    depth: int,
    format: WeightFormat,
    dtype: str,
    absorbed: bool,
    arch: int = 80,
) -> tuple[Variant, ...]:
    """y_h = x_h w_(h // group)^T for every head, by the number of rows, as `product_kernels`.

    Arguments: x [m, heads, depth], w [heads // group * columns, depth] of floats, y [m, heads, columns], m,
    columns, depth; absorbed: x [heads, m, depth], y [heads, m, columns]. x and y are of `dtype`.
    Grid (ceil(m / rows) * ceil(columns / columns of a program), heads).
    """
    float32 = in_float32(format, dtype)
    variants: list[Variant] = []
    for most, rows, wide, deep, warps, stages in blocks(heads * columns, depth, format, dtype, arch):
        constants = (
            *_sizes(rows, wide, deep, depth, format),
            ("FLOAT32", float32),
            ("HEADS", heads),
            ("GROUP", group),
            ("ABSORBED", absorbed),
        )
        x = f"*{TRITON_TYPES[dtype]}"
        types = (("x", x), *_weight(format), ("y", x), ("m", "i32"), ("columns", "i32"), ("depth", "i32"))
        sizes = {"columns": columns, "depth": depth}
        aligned = (*_pointers(types), *(name for name, size in sizes.items() if size % 16 == 0))
        kernel = DeviceKernel("products.head_product", types, constants, aligned, warps, stages)
        variants.append((most, kernel, rows, wide))
    return tuple(variants)


def _sizes(rows: int, wide: int, deep: int, depth: int, format: WeightFormat) -> list[tuple[str, Any]]:
    """Constants of a program's blocks."""
    return [
        ("BM", rows),
        ("BN", wide),
        ("BK", deep),
        ("BITS", _bits(format)),
        ("BLOCK", _block(depth, format)),
        ("WHOLE", depth % deep == 0),
        ("UNIT", math.gcd(depth, 16)),
    ]


def embedding_kernel(depth: int, format: WeightFormat, dtype: str) -> tuple[DeviceKernel, int]:
    """Rows of a weight [rows, depth], and how many numbers of one a program writes.

    Arguments: w, scales and zeros (as the format has them), ids i64[n], y [n, depth] of dtype, n, depth.
    Grid (n, ceil(depth / numbers of a program)).
    """
    wide = 1024
    types = (
        *_weight(format),
        ("ids", "*i64"),
        ("y", f"*{TRITON_TYPES[dtype]}"),
        ("n", "i32"),
        ("depth", "i32"),
    )
    constants = (
        *_absent(format),
        ("WIDE", wide),
        ("BITS", _bits(format)),
        ("BLOCK", _block(depth, format)),
    )
    aligned = (*_pointers(types), *(["depth"] if depth % 16 == 0 else []))
    return DeviceKernel("products.embedding", types, constants, aligned, warps=4), wide


def in_float32(format: WeightFormat, x_dtype: str) -> bool:
    """Whether both sides are multiplied in float32."""
    return x_dtype == "float32" or (not format.coded and format.dtype != x_dtype)


def blocks(
    columns: int, depth: int, format: WeightFormat, x_dtype: str, arch: int
) -> list[tuple[int | None, int, int, int, int, int]]:
    """Most rows, rows, columns and depth of a program's blocks, warps and stages, by the number of rows.

    Few rows wait for memory: programs are narrow, so that there are some for every processor of a large GPU,
    and have much of the weight under way: more where a processor has one program at most.
    """
    float32 = in_float32(format, x_dtype)
    narrow = next((wide for wide in (64, 32) if columns >= 256 * wide), 16)
    middle = 64 if columns >= 128 * 64 else 32
    # A step has to take whole groups of 64 inputs of four bits.
    least = 64 if format.dtype == "uint4" else 32
    if depth % 8:  # numbers are loaded one by one, through registers
        return [(16, 16, 32, 64, 4, 1), (None, 32 if float32 else 64, 64, least, 8, 1)]
    if float32:
        return [(16, 16, max(narrow, 32), 64, 4, 3), (None, 64 if least == 32 else 32, 64, least, 4, 2)]
    ample = 90 <= arch < 120
    ahead = 5 if columns <= _PROCESSORS * middle else 3
    return [
        (16, 16, narrow, 128 if format.coded or narrow == 64 else 256, 4, 4),
        (32, 32, middle, 128, 4, ahead),
        (64, 64, middle, 128, 4, ahead),
        (256, 64, 128, 64, 4, 3),
        # Codes become numbers in registers: fewer columns, where those have to hold the operands too.
        (None, 128, 64 if format.coded and not ample else 128, 64, 8, 3),
    ]


def _block(depth: int, format: WeightFormat) -> int:
    """Inputs of a scale; 0 if one is for all of them, or for floats."""
    return format.block if format.coded and format.block < depth else 0


def _bits(format: WeightFormat) -> int:
    return {"uint4": 4, "uint8": 8}.get(format.dtype, 0)


def _weight(format: WeightFormat) -> list[tuple[str, str]]:
    tensors = [("w", f"*{TRITON_TYPES[format.dtype]}")]
    if format.coded:
        tensors.append(("scales", f"*{TRITON_TYPES[format.scales]}"))
    if format.zeros:
        tensors.append(("zeros", "*u8"))
    return tensors


def _absent(format: WeightFormat) -> list[tuple[str, None]]:
    has = {"scales": format.coded, "zeros": format.zeros}
    return [(name, None) for name, there in has.items() if not there]


def _pointers(types: tuple[tuple[str, str], ...]) -> tuple[str, ...]:
    return tuple(name for name, type in types if type.startswith("*"))
