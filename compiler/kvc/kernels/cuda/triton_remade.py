# mypy: disable-error-code="no-untyped-def,misc,untyped-decorator,no-any-return"
# Triton is untyped, and the types of its functions' parameters are no Python types.
"""Keys and values that are made again from what is kept; kvc_passes.sites.Remade says how it stands.

MADE holds, in this order: query heads of a KV head, DEPTH elements of x, elements of a key, HALF of those
that are turned, whether angles are fine, the powers of two that HALF and what is not turned are padded to,
the elements of x that a step of a product takes, whether W_K is ABSORBED, that is [KV heads * DEPTH, KEY],
and how many elements of the row behind x are the end of every key, with the power of two for them.
"""

import triton
import triton.language as tl

from .triton_sliced import angles, asked, met, part


@triton.jit
def rows_of(
    w, first, c, DEPTH: tl.constexpr, DC: tl.constexpr, COUNT: tl.constexpr, WIDE: tl.constexpr,
    STRIDE: tl.constexpr, APART: tl.constexpr,
):  # fmt: skip
    """Elements c .. of COUNT rows of a weight from `first` on, [WIDE, DC], zeros behind them.

    Rows are STRIDE numbers apart, elements of a row APART.
    """
    r = tl.arange(0, WIDE)
    rd = c + tl.arange(0, DC)
    at = w + (first + r)[:, None] * STRIDE + rd[None, :] * APART
    return tl.load(at, mask=(r < COUNT)[:, None] & (rd < DEPTH)[None, :], other=0.0)


@triton.jit
def tokens_of(
    pool, row, there, c, D: tl.constexpr, DEPTH: tl.constexpr, DC: tl.constexpr, MASKED: tl.constexpr
):
    """Elements c .. of x of kept rows as columns, [DC, N]."""
    rd = c + tl.arange(0, DC)
    at = pool + row[None, :] * D + rd[:, None]
    if MASKED:
        x = tl.load(at, mask=there[None, :] & (rd < DEPTH)[:, None], other=0.0)
    elif DEPTH % DC != 0:
        x = tl.load(at, mask=(rd < DEPTH)[:, None], other=0.0)
    else:
        x = tl.load(at)
    return x


@triton.jit
def biased(x, bias, first, COUNT: tl.constexpr, WIDE: tl.constexpr):
    """x [WIDE, N] and its rows' biases."""
    if bias is not None:
        r = tl.arange(0, WIDE)
        x += tl.load(bias + first + r, mask=r < COUNT, other=0.0).to(tl.float32)[:, None]
    return x


@triton.jit
def made_scores(
    query, inside, xpool, row, there, wkey, bkey, head, MADE: tl.constexpr, D: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """Products [BM, BN] of rows and the keys of KV head `head`, which are made and turned."""
    DEPTH: tl.constexpr = MADE[1]
    KEY: tl.constexpr = MADE[2]
    HALF: tl.constexpr = MADE[3]
    FINE: tl.constexpr = MADE[4]
    HP: tl.constexpr = MADE[5]
    RP: tl.constexpr = MADE[6]
    DC: tl.constexpr = MADE[7]
    ABSORBED: tl.constexpr = MADE[8]
    EXTRA: tl.constexpr = MADE[9]
    EP: tl.constexpr = MADE[10]
    STRIDE: tl.constexpr = 1 if ABSORBED else DEPTH
    APART: tl.constexpr = KEY if ABSORBED else 1
    first = head * KEY
    wkey += head.to(tl.int64) * KEY * DEPTH
    low = tl.zeros((HP, BN), tl.float32)
    high = tl.zeros((HP, BN), tl.float32)
    rest = tl.zeros((RP, BN), tl.float32)
    for c in range(0, DEPTH, DC):
        x = tokens_of(xpool, row, there, c, D, DEPTH, DC, MASKED).to(TYPE)
        if HALF > 0:
            w = rows_of(wkey, 0, c, DEPTH, DC, HALF, HP, STRIDE, APART).to(TYPE)
            low = tl.dot(w, x, low, input_precision="tf32x3")
            w = rows_of(wkey, HALF, c, DEPTH, DC, HALF, HP, STRIDE, APART).to(TYPE)
            high = tl.dot(w, x, high, input_precision="tf32x3")
        if KEY > 2 * HALF:
            w = rows_of(wkey, 2 * HALF, c, DEPTH, DC, KEY - 2 * HALF, RP, STRIDE, APART).to(TYPE)
            rest = tl.dot(w, x, rest, input_precision="tf32x3")
    if HALF > 0:
        low = biased(low, bkey, first, HALF, HP)
        high = biased(high, bkey, first + HALF, HALF, HP)
        cosine, sine = angles(xpool, row, there, DEPTH, D, HALF, HP, FINE, MASKED)
        turned = low * cosine - high * sine
        high = high * cosine + low * sine
        low = turned
    if KEY > 2 * HALF:
        rest = biased(rest, bkey, first + 2 * HALF, KEY - 2 * HALF, RP)
    scores = tl.zeros((BM, BN), tl.float32)
    scores = met(scores, query, inside, low, high, rest, KEY, HALF, HP, RP, TYPE)
    if EXTRA > 0:
        end = part(xpool, row, there, DEPTH, D, EXTRA, EP, MASKED).to(TYPE)
        scores = tl.dot(asked(query, inside, KEY, EXTRA, EP, TYPE), end, scores, input_precision="tf32x3")
    return scores


@triton.jit
def made_values(
    xpool, row, there, wvalue, bvalue, head, MADE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    VB: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """The values [BN, VB] of KV head `head`."""
    DEPTH: tl.constexpr = MADE[1]
    DC: tl.constexpr = MADE[7]
    wvalue += head.to(tl.int64) * DV * DEPTH
    values = tl.zeros((VB, BN), tl.float32)
    for c in range(0, DEPTH, DC):
        x = tokens_of(xpool, row, there, c, D, DEPTH, DC, MASKED).to(TYPE)
        w = rows_of(wvalue, 0, c, DEPTH, DC, DV, VB, DEPTH, 1).to(TYPE)
        values = tl.dot(w, x, values, input_precision="tf32x3")
    return tl.trans(biased(values, bvalue, head * DV, DV, VB).to(TYPE))
