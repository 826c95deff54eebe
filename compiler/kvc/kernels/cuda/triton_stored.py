# mypy: disable-error-code="no-untyped-def,misc,untyped-decorator,no-any-return"
# Triton is untyped, and the types of its functions' parameters are no Python types.
"""Keys and values as they stand in pages, inside Triton kernels; kvc.kernels.stored says what the codes are.

STORED is "" for floats, "int8", "fp8" or "int4". Scales are bfloat16, one for every row of elements.
"""

import triton
import triton.language as tl

from .triton_views import elements


@triton.jit
def load(
    pool, row, column, there, D: tl.constexpr, PADDED: tl.constexpr, MASKED: tl.constexpr,
    STORED: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """Elements of rows, without their scales: `row` and `column` broadcast, rows of `there` may be read."""
    if STORED == "int4":
        at = pool + row * (D // 2) + column % (D // 2)
    else:
        at = pool + row * D + column
    if MASKED and PADDED:
        raw = tl.load(at, mask=there & (column < D), other=0)
    elif MASKED:
        raw = tl.load(at, mask=there, other=0)
    elif PADDED:
        raw = tl.load(at, mask=column < D, other=0)
    else:
        raw = tl.load(at)
    if STORED == "fp8":
        bits = raw.to(tl.int16)
        bits = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
        result = bits.to(tl.float16, bitcast=True).to(TYPE)
    elif STORED == "int4":
        shift = tl.where(column < D // 2, 0, 4)
        result = (((raw.to(tl.int32) >> shift) & 15) - 8).to(TYPE)
        if PADDED:
            result = tl.where(column < D, result, 0.0)
    else:
        result = raw.to(TYPE)
    return result


@triton.jit
def scales(pool, row, there, MASKED: tl.constexpr, STORED: tl.constexpr):
    """The factors of rows, float32."""
    if MASKED:
        scale = tl.load(pool + row, mask=there, other=0.0).to(tl.float32)
    else:
        scale = tl.load(pool + row).to(tl.float32)
    if STORED == "fp8":
        scale = scale * 256.0
    return scale


@triton.jit
def code(x, inverse, STORED: tl.constexpr):
    """float32 numbers as codes."""
    if STORED == "fp8":
        x = tl.minimum(tl.maximum(x * inverse, -448.0), 448.0)
        bits = (x * (1.0 / 256.0)).to(tl.float16).to(tl.int16, bitcast=True)
        size = bits & 0x7FFF
        rounded = (size + 0x3F + ((size >> 7) & 1)) >> 7
        result = (rounded | tl.where(bits < 0, 0x80, 0)).to(tl.uint8)
    elif STORED == "int8":
        result = tl.floor(tl.minimum(tl.maximum(x * inverse, -127.0), 127.0) + 0.5).to(tl.int8)
    else:
        result = (tl.floor(tl.minimum(tl.maximum(x * inverse, -7.0), 7.0) + 0.5) + 8.0).to(tl.uint8)
    return result


@triton.jit
def store(
    x, start, token, cos, sin, pool, scale_pool, row, inside,
    D: tl.constexpr, DP: tl.constexpr, STORED: tl.constexpr, VIEW: tl.constexpr,
):  # fmt: skip
    """Rows of D elements that begin at `start` of x are written to rows `row` of a pool, those of `inside`
    alone. triton_views says what a VIEW is."""
    rd = tl.arange(0, DP)
    start, token = start[:, None], token[:, None]
    if STORED == "":
        there = inside[:, None] & (rd < D)[None, :]
        value = elements(x, start, rd[None, :], token, there, cos, sin, VIEW)
        tl.store(pool + row[:, None] * D + rd[None, :], value.to(pool.dtype.element_ty), mask=there)
    else:
        BYTES: tl.constexpr = D // 2 if STORED == "int4" else D
        there = inside[:, None] & (rd < BYTES)[None, :]
        low = elements(x, start, rd[None, :], token, there, cos, sin, VIEW).to(tl.float32)
        largest = tl.max(tl.abs(low), 1)
        if STORED == "int4":
            high = elements(x, start, rd[None, :] + BYTES, token, there, cos, sin, VIEW).to(tl.float32)
            largest = tl.maximum(largest, tl.max(tl.abs(high), 1))
            scale = (largest * (1.0 / 7.0)).to(tl.bfloat16)
        elif STORED == "fp8":
            scale = (largest * (1.0 / 448.0)).to(tl.bfloat16)
        else:
            scale = (largest * (1.0 / 127.0)).to(tl.bfloat16)
        tl.store(scale_pool + row, scale, mask=inside)
        wide = scale.to(tl.float32)
        inverse = tl.where(wide > 0.0, 1.0 / tl.where(wide > 0.0, wide, 1.0), 0.0)[:, None]
        result = code(low, inverse, STORED)
        if STORED == "int4":
            result = result | (code(high, inverse, STORED) << 4)
        tl.store(pool + row[:, None] * BYTES + rd[None, :], result, mask=there)
