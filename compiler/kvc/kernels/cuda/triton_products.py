# mypy: disable-error-code="no-untyped-def,misc,untyped-decorator,no-any-return"
# Triton is untyped, and the types of its functions' parameters are no Python types.
"""Products with stored weights, and rows of them. See kvc.kernels.cuda.products for arguments and grids.

BITS is 0 for weights that are floats, else of their codes. Four-bit codes of 64 inputs are 32 bytes, the
first 32 inputs in the low halves and the others in the high ones: a product runs over either half with inputs
that stand together. BLOCK consecutive inputs share a scale, 0 for all inputs of a row.
"""

import triton
import triton.language as tl


@triton.jit
def product(
    x, w, scales, zeros, bias, residual, y, m, columns, depth,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr,
    WHOLE: tl.constexpr, UNIT: tl.constexpr, FLOAT32: tl.constexpr,
):  # fmt: skip
    """BM rows and BN columns of y = x w^T + bias + residual."""
    tile(
        x, w, scales, zeros, bias, residual, y, m, columns, depth, 1,
        BM, BN, BK, BITS, BLOCK, WHOLE, UNIT, FLOAT32,
    )  # fmt: skip


@triton.jit
def head_product(
    x, w, y, m, columns, depth,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr,
    WHOLE: tl.constexpr, UNIT: tl.constexpr, FLOAT32: tl.constexpr,
    HEADS: tl.constexpr, GROUP: tl.constexpr, ABSORBED: tl.constexpr,
):  # fmt: skip
    """BM rows and BN columns of y_h = x_h w_(h // GROUP)^T for a head; ABSORBED ones stand together."""
    head = tl.program_id(1).to(tl.int64)
    depth = depth // UNIT * UNIT
    w += head // GROUP * columns * depth
    apart = 1 if ABSORBED else HEADS
    before = head * m if ABSORBED else head
    tile(
        x + before * depth, w, None, None, None, None, y + before * columns, m, columns, depth, apart,
        BM, BN, BK, BITS, BLOCK, WHOLE, UNIT, FLOAT32,
    )  # fmt: skip


@triton.jit
def tile(
    x, w, scales, zeros, bias, residual, y, m, columns, depth, apart,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr,
    WHOLE: tl.constexpr, UNIT: tl.constexpr, FLOAT32: tl.constexpr,
):  # fmt: skip
    """BM rows and BN columns of y = x w^T + bias + residual; rows of x and y are `apart` rows apart.

    Computed transposed: the weight is the left operand. WHOLE says that depth is a multiple of BK, UNIT is a
    number that it is a multiple of; FLOAT32 says that both sides are multiplied in float32.
    """
    # The compiler can tell from this how many numbers of a row it can load at once.
    depth = depth // UNIT * UNIT
    TYPE: tl.constexpr = tl.float32 if FLOAT32 else x.dtype.element_ty
    HALVES: tl.constexpr = 2 if BITS == 4 else 1
    WIDTH: tl.constexpr = BK // HALVES
    first, above = place(m, columns, BM, BN)
    # Past the end the last row and column are taken again.
    row = tl.minimum(first + tl.arange(0, BM), m - 1).to(tl.int64)
    column = tl.minimum(above + tl.arange(0, BN), columns - 1).to(tl.int64)
    rk = tl.arange(0, WIDTH)
    inputs = x + row[None, :] * (apart * depth)
    stride = depth
    if BITS == 4:
        rx = rk // 32 * 64 + rk % 32
        stride = tl.cdiv(depth, 64) * 32
    else:
        rx = rk
    weights = w + column[:, None] * stride + rk[None, :]
    acc = tl.zeros((BN, BM), tl.float32)
    for k in range(0, depth, BK):
        if WHOLE:
            data = tl.load(weights)
        else:
            data = tl.load(weights, mask=(k // HALVES + rk < stride)[None, :], other=0)
        weights += WIDTH
        for half in tl.static_range(HALVES):
            at = k + rx + 32 * half
            if WHOLE:
                given = tl.load(inputs + at[:, None])
            else:
                given = tl.load(inputs + at[:, None], mask=(at < depth)[:, None], other=0.0)
            if BITS == 0:
                value = data.to(TYPE)
            else:
                code = data
                if BITS == 4 and half == 0:
                    code = data & 15
                elif BITS == 4:
                    code = data >> 4
                value = scaled(
                    code, scales, zeros, column, k, half, depth, TYPE, WIDTH, HALVES, BN, BITS, BLOCK, WHOLE
                )
            acc = tl.dot(value, given.to(TYPE), acc, input_precision="tf32x3")
    if BITS != 0 and BLOCK == 0:
        acc = acc * tl.load(scales + column).to(tl.float32)[:, None]
    finish(acc, bias, residual, y, first, above, m, columns, apart, BM, BN)


@triton.jit
def boxed(
    xbox, wbox, bias, residual, y, m, columns, depth,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """As `product` of floats of one type in 16 bits, of boxes of x [m, depth] and w [columns, depth]."""
    row, column = place(m, columns, BM, BN)
    acc = tl.zeros((BN, BM), tl.float32)
    for k in range(0, depth, BK):
        acc = tl.dot(wbox.load([column, k]), xbox.load([row, k]).T, acc)
    finish(acc, bias, residual, y, row, column, m, columns, 1, BM, BN)


@triton.jit
def place(m, columns, BM: tl.constexpr, BN: tl.constexpr):
    """The first row and column of y of a program.

    Programs that follow each other share columns of eight blocks of rows, while those are in the L2 cache.
    """
    tall = tl.cdiv(m, BM)
    first = tl.program_id(0) // (8 * tl.cdiv(columns, BN)) * 8
    many = tl.minimum(tall - first, 8)
    inner = tl.program_id(0) % (8 * tl.cdiv(columns, BN))
    return (first + inner % many) * BM, inner // many * BN


@triton.jit
def finish(acc, bias, residual, y, first, above, m, columns, apart, BM: tl.constexpr, BN: tl.constexpr):
    """Store sums [BN, BM] with bias and residual: rows from `first`, `apart` apart, columns from `above`."""
    rm = tl.arange(0, BM)
    rn = tl.arange(0, BN)
    there = (above + rn < columns)[:, None] & (first + rm < m)[None, :]
    # Within a program 32 bits are enough, and take half the registers.
    start = first.to(tl.int64) * (apart * columns) + above
    at = rm[None, :] * (apart * columns) + rn[:, None]
    if bias is not None:
        acc += tl.load(bias + tl.minimum(above + rn, columns - 1)).to(tl.float32)[:, None]
    if residual is not None:
        acc += tl.load(residual + start + at, mask=there, other=0.0).to(tl.float32)
    tl.store(y + start + at, acc.to(y.dtype.element_ty), mask=there)


@triton.jit
def scaled(
    code, scales, zeros, column, k, half, depth,
    TYPE: tl.constexpr, WIDTH: tl.constexpr, HALVES: tl.constexpr, BN: tl.constexpr, BITS: tl.constexpr,
    BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """(code - zero) * scale of WIDTH codes of each column; without the scale where a row has only one."""
    NEUTRAL: tl.constexpr = 1 << (BITS - 1)
    if BLOCK == 0:
        if zeros is None:
            value = (code.to(tl.int16) - NEUTRAL).to(TYPE)
        else:
            value = (code.to(tl.int16) - tl.load(zeros + column).to(tl.int16)[:, None]).to(TYPE)
        return value
    else:  # noqa: RET505 (Triton needs to see that only one of the two is there)
        # Codes side by side that share a scale. Of 4 bits, each half has 32 of every 64 inputs.
        ALIKE: tl.constexpr = BLOCK if HALVES == 1 else (BLOCK // 2 if BLOCK >= 64 else min(BLOCK, 32))
        SHARED: tl.constexpr = min(ALIKE, WIDTH)
        COUNT: tl.constexpr = WIDTH // SHARED
        first = tl.arange(0, COUNT) * SHARED
        if HALVES == 2:
            first = first // 32 * 64 + first % 32
        block = (k + first + 32 * half) // BLOCK
        blocks = tl.cdiv(depth, BLOCK)
        at = column[:, None] * blocks + block[None, :]
        if WHOLE:
            scale = tl.load(scales + at)
        else:
            scale = tl.load(scales + at, mask=(block < blocks)[None, :], other=0.0)
        if zeros is None:
            number = code.to(tl.int16) - NEUTRAL
        else:
            if WHOLE:
                zero = tl.load(zeros + at)
            else:
                zero = tl.load(zeros + at, mask=(block < blocks)[None, :], other=0)
            number = code.to(tl.int16) - spread(zero.to(tl.int16), BN, COUNT, SHARED)
        if scales.dtype.element_ty == TYPE:
            # The difference is exact in every type, and the product is rounded once.
            value = number.to(TYPE) * spread(scale, BN, COUNT, SHARED)
        else:
            value = (number.to(tl.float32) * spread(scale.to(tl.float32), BN, COUNT, SHARED)).to(TYPE)
        return value


@triton.jit
def spread(numbers, BN: tl.constexpr, COUNT: tl.constexpr, TIMES: tl.constexpr):
    """Every one of numbers [BN, COUNT] TIMES times, [BN, COUNT * TIMES]; as [BN, 1] if all are alike."""
    if COUNT == 1:
        result = numbers
    else:
        result = tl.broadcast_to(numbers[:, :, None], (BN, COUNT, TIMES)).reshape(BN, COUNT * TIMES)
    return result


@triton.jit
def embedding(
    w, scales, zeros, ids, y, n, depth,
    WIDE: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """WIDE numbers of the row of a token."""
    row = tl.load(ids + tl.program_id(0))
    k = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    there = k < depth
    if BITS == 0:
        value = tl.load(w + row * depth + k, mask=there)
    else:
        if BITS == 4:
            code = tl.load(w + row * (tl.cdiv(depth, 64) * 32) + k // 64 * 32 + k % 32, mask=there, other=0)
            code = (code >> (k % 64 // 32 * 4).to(tl.uint8)) & 15
        else:
            code = tl.load(w + row * depth + k, mask=there, other=0)
        at = row + k * 0
        if BLOCK > 0:
            at = row * tl.cdiv(depth, BLOCK) + k // BLOCK
        scale = tl.load(scales + at, mask=there, other=0.0).to(tl.float32)
        if zeros is None:
            number = code.to(tl.int32) - (1 << (BITS - 1))
        else:
            number = code.to(tl.int32) - tl.load(zeros + at, mask=there, other=0).to(tl.int32)
        value = number.to(tl.float32) * scale
    tl.store(y + tl.program_id(0).to(tl.int64) * depth + k, value.to(y.dtype.element_ty), mask=there)
