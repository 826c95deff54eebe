# mypy: disable-error-code="no-untyped-def,misc,untyped-decorator,no-any-return"
# Triton is untyped, and the types of its functions' parameters are no Python types.
"""Scores of kept keys that are turned when they are read; kvc_passes.sites.Sliced says how they stand.

A key is taken in three parts, since products want whole powers of two: the first HALF elements, as many that
are turned with them, and what is not turned.
"""

import triton
import triton.language as tl


@triton.jit
def part(
    pool, row, there, first, D: tl.constexpr, COUNT: tl.constexpr, WIDE: tl.constexpr, MASKED: tl.constexpr
):
    """Elements first .. first + COUNT - 1 of kept rows as columns, float32 [WIDE, N], zeros behind them."""
    r = tl.arange(0, WIDE)
    at = pool + row[None, :] * D + first + r[:, None]
    if MASKED:
        x = tl.load(at, mask=there[None, :] & (r < COUNT)[:, None], other=0.0)
    elif COUNT < WIDE:
        x = tl.load(at, mask=(r < COUNT)[:, None], other=0.0)
    else:
        x = tl.load(at)
    return x.to(tl.float32)


@triton.jit
def angles(
    pool, row, there, FIRST: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, WIDE: tl.constexpr,
    FINE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Cosines and sines [WIDE, N] that stand in kept rows from element FIRST on."""
    cosine = part(pool, row, there, FIRST, D, HALF, WIDE, MASKED)
    sine = part(pool, row, there, FIRST + HALF, D, HALF, WIDE, MASKED)
    if FINE:
        cosine += part(pool, row, there, FIRST + 2 * HALF, D, HALF, WIDE, MASKED) * (1.0 / 256.0)
        sine += part(pool, row, there, FIRST + 3 * HALF, D, HALF, WIDE, MASKED) * (1.0 / 256.0)
    return cosine, sine


@triton.jit
def asked(query, rows, first, COUNT: tl.constexpr, WIDE: tl.constexpr, TYPE: tl.constexpr):
    """Elements of the queries [M, WIDE], zeros for other rows than `rows`."""
    r = tl.arange(0, WIDE)
    at = query[:, None] + first + r[None, :]
    return tl.load(at, mask=rows[:, None] & (r < COUNT)[None, :], other=0.0).to(TYPE)


@triton.jit
def met(
    x, query, rows, low, high, rest, DIM: tl.constexpr, HALF: tl.constexpr, HP: tl.constexpr,
    RP: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """x [M, N] and the products of the queries of `rows` with keys, whose parts are turned already."""
    if HALF > 0:
        x = tl.dot(asked(query, rows, 0, HALF, HP, TYPE), low.to(TYPE), x, input_precision="tf32x3")
        x = tl.dot(asked(query, rows, HALF, HALF, HP, TYPE), high.to(TYPE), x, input_precision="tf32x3")
    if DIM > 2 * HALF:
        own = asked(query, rows, 2 * HALF, DIM - 2 * HALF, RP, TYPE)
        x = tl.dot(own, rest.to(TYPE), x, input_precision="tf32x3")
    return x


@triton.jit
def scores(
    query, inside, h, xpool, row, there, first, SLICED: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
    DV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BH: tl.constexpr, MASKED: tl.constexpr,
    TYPE: tl.constexpr,
):  # fmt: skip
    """Products [BM, BN] of rows and their own turned keys. Rows are of heads h, from `first` on, BH at most.

    SLICED: query heads of a key, elements of a key, HALF, whether angles are fine, and the powers of two that
    HALF and what is not turned are padded to.
    """
    GROUP: tl.constexpr = SLICED[0]
    DIM: tl.constexpr = SLICED[1]
    HALF: tl.constexpr = SLICED[2]
    FINE: tl.constexpr = SLICED[3]
    HP: tl.constexpr = SLICED[4]
    RP: tl.constexpr = SLICED[5]
    cosine, sine = angles(xpool, row, there, DV, D, HALF, HP, FINE, MASKED)
    x = tl.zeros((BM, BN), tl.float32)
    for g in range(first // GROUP, tl.minimum((first + BH - 1) // GROUP + 1, H // GROUP)):
        rows = inside & (h // GROUP == g)
        low = part(xpool, row, there, g * DIM, D, HALF, HP, MASKED)
        high = part(xpool, row, there, g * DIM + HALF, D, HALF, HP, MASKED)
        rest = low
        if DIM > 2 * HALF:
            rest = part(xpool, row, there, g * DIM + 2 * HALF, D, DIM - 2 * HALF, RP, MASKED)
        turned = low * cosine - high * sine
        x = met(x, query, rows, turned, high * cosine + low * sine, rest, DIM, HALF, HP, RP, TYPE)
    return x
