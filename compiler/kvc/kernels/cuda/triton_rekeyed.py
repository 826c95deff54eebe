# mypy: disable-error-code="no-untyped-def,misc,untyped-decorator,no-any-return"
# Triton is untyped, and the types of its functions' parameters are no Python types.
"""Scores of keys that are made of kept values; kvc_passes.sites.Rekeyed says how these stand.

REKEYED holds, in this order: query heads of a KV head, elements of the values of all heads, elements DIM of
one value, HALF of those that may be turned, PAIRS of them that are, whether angles are fine, and the elements
of a key that a product takes at once: PC of turned ones, DC of others.
"""

import triton
import triton.language as tl

from .triton_remade import tokens_of


@triton.jit
def scaled(
    pool, row, there, factors, first, c, D: tl.constexpr, COUNT: tl.constexpr, DC: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Elements c .. of COUNT kept ones from `first` on, times their factors: float32 [DC, N], then zeros."""
    x = tokens_of(pool + first, row, there, c, D, COUNT, DC, MASKED).to(tl.float32)
    if factors is not None:
        r = c + tl.arange(0, DC)
        x *= tl.load(factors + first + r, mask=r < COUNT, other=0.0)[:, None]
    return x


@triton.jit
def met(x, query, inside, first, c, keys, COUNT: tl.constexpr, DC: tl.constexpr, TYPE: tl.constexpr):
    """x [M, N] and the products of elements first + c .. of the queries with those of keys [DC, N]."""
    r = c + tl.arange(0, DC)
    there = inside[:, None] & (r < COUNT)[None, :]
    own = tl.load(query[:, None] + first + r[None, :], mask=there, other=0.0).to(TYPE)
    return tl.dot(own, keys.to(TYPE), x, input_precision="tf32x3")


@triton.jit
def angle(
    pool, row, there, c, D: tl.constexpr, PAIRS: tl.constexpr, PC: tl.constexpr, FINE: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Cosines c .. of kept rows, or sines, float32 [PC, N]; their fine parts stand 2 * PAIRS behind them."""
    x = tokens_of(pool, row, there, c, D, PAIRS, PC, MASKED).to(tl.float32)
    if FINE:
        rest = tokens_of(pool + 2 * PAIRS, row, there, c, D, PAIRS, PC, MASKED).to(tl.float32)
        x += rest * (1.0 / 256.0)
    return x


@triton.jit
def rekeyed_scores(
    query, inside, xpool, row, there, factors, head, REKEYED: tl.constexpr, D: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """Products [BM, BN] of rows and the keys of KV head `head`, which are made of its values and turned."""
    VALUES: tl.constexpr = REKEYED[1]
    DIM: tl.constexpr = REKEYED[2]
    HALF: tl.constexpr = REKEYED[3]
    PAIRS: tl.constexpr = REKEYED[4]
    FINE: tl.constexpr = REKEYED[5]
    PC: tl.constexpr = REKEYED[6]
    DC: tl.constexpr = REKEYED[7]
    own = head * DIM
    x = tl.zeros((BM, BN), tl.float32)
    for c in range(0, PAIRS, PC):
        cosine = angle(xpool + VALUES, row, there, c, D, PAIRS, PC, FINE, MASKED)
        sine = angle(xpool + VALUES + PAIRS, row, there, c, D, PAIRS, PC, FINE, MASKED)
        low = scaled(xpool, row, there, factors, own, c, D, PAIRS, PC, MASKED)
        high = scaled(xpool, row, there, factors, own + HALF, c, D, PAIRS, PC, MASKED)
        x = met(x, query, inside, 0, c, low * cosine - high * sine, PAIRS, PC, TYPE)
        x = met(x, query, inside, HALF, c, high * cosine + low * sine, PAIRS, PC, TYPE)
    # What is not turned: behind the turned elements of the first half, and from those of the second on.
    for c in range(0, HALF - PAIRS, DC):
        keys = scaled(xpool, row, there, factors, own + PAIRS, c, D, HALF - PAIRS, DC, MASKED)
        x = met(x, query, inside, PAIRS, c, keys, HALF - PAIRS, DC, TYPE)
    for c in range(0, DIM - HALF - PAIRS, DC):
        last = scaled(xpool, row, there, factors, own + HALF + PAIRS, c, D, DIM - HALF - PAIRS, DC, MASKED)
        x = met(x, query, inside, HALF + PAIRS, c, last, DIM - HALF - PAIRS, DC, TYPE)
    return x
