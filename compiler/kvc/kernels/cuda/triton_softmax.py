# mypy: disable-error-code="no-untyped-def,misc,untyped-decorator,no-any-return"
# Triton is untyped, and the types of its functions' parameters are no Python types.
"""Blocks of keys and values in an online softmax; triton_attention says what its constants are."""

import triton
import triton.language as tl

from .triton_masks import seen
from .triton_stored import load, scales

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def weigh(
    x, total, top, position, key, h, slope, line,
    MASKED: tl.constexpr, SCALE: tl.constexpr, FACTOR: tl.constexpr, SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr, CHUNK: tl.constexpr, SINK_KEYS: tl.constexpr, PREDICATE: tl.constexpr,
    DISTANCES: tl.constexpr,
):  # fmt: skip
    """Products x [M, N] of rows and keys as weights; what rows had fades by `fade`; new sums and maxima.

    slope: of each row's head, or None. line: pointers [M] to the rows' biases, one for each of DISTANCES
    distances of a key, the last for all further ones; or None.
    """
    if SOFTCAP > 0:
        # tanh(y) is 1 - 2 / (e^2y + 1)
        x = tl.exp2(x * (SCALE / SOFTCAP * 2.0 * LOG2E))
        x = (1.0 - 2.0 / (x + 1.0)) * (SOFTCAP * LOG2E)
    elif FACTOR == 1.0:
        x = x * (SCALE * LOG2E)
    if slope is not None:
        x += (slope * LOG2E)[:, None] * (key[None, :] - position[:, None]).to(tl.float32)
    if line is not None:
        behind = tl.maximum(position[:, None] - key[None, :], 0)
        x += tl.load(line[:, None] + tl.minimum(behind, DISTANCES - 1)) * LOG2E
    if MASKED:
        visible = seen(position[:, None], key[None, :], h[:, None], WINDOW, CHUNK, SINK_KEYS, PREDICATE)
        x = tl.where(visible, x, float("-inf"))
    # Maxima leave NaN out, and the sums keep it.
    highest = tl.maximum(top, tl.max(x, 1))
    base = tl.where(highest == float("-inf"), 0.0, highest) * FACTOR
    weight = tl.exp2(x * FACTOR - base[:, None])
    fade = tl.exp2(top * FACTOR - base)
    total = total * fade + tl.sum(weight, 1)
    return weight, fade, total, highest


@triton.jit
def attend(
    acc, total, top, query, position, h, slope, line, kpool, vpool, kscale, vscale, columns, head,
    start, low, high,
    HKV: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr,
    PG: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr, FLOAT32: tl.constexpr,
    SCALE: tl.constexpr, FACTOR: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr,
    CHUNK: tl.constexpr, SINK_KEYS: tl.constexpr, PREDICATE: tl.constexpr, DISTANCES: tl.constexpr,
    STORED: tl.constexpr,
):  # fmt: skip
    """Take the block of keys from `start` into the rows' values, sums and maxima.

    Rows are at `position` and of head `h`, [M]. Keys of low .. high - 1 and the sink keys may be read.
    """
    TYPE: tl.constexpr = tl.float32 if FLOAT32 else query.dtype
    rn = tl.arange(0, BN)
    rd = tl.arange(0, DP)
    rv = tl.arange(0, DVP)
    key = start + rn
    there = key >= low
    if SINK_KEYS > 0:
        there = there | (key < SINK_KEYS)
    there = there & (key < high)
    if PG >= BN:
        page = tl.load(columns + start // PG).to(tl.int64)
        row = (page * HKV + head) * PG + start % PG + rn
    else:
        if MASKED:
            page = tl.load(columns + key // PG, mask=there, other=0).to(tl.int64)
        else:
            page = tl.load(columns + key // PG).to(tl.int64)
        row = (page * HKV + head) * PG + key % PG
    keys = load(kpool, row[None, :], rd[:, None], there[None, :], D, D < DP, MASKED, STORED, TYPE)
    x = tl.dot(query, keys, input_precision="tf32x3")
    if STORED != "":
        x = x * scales(kscale, row, there, MASKED, STORED)[None, :]
    weight, fade, total, highest = weigh(
        x,
        total,
        top,
        position,
        key,
        h,
        slope,
        line,
        MASKED,
        SCALE,
        FACTOR,
        SOFTCAP,
        WINDOW,
        CHUNK,
        SINK_KEYS,
        PREDICATE,
        DISTANCES,
    )
    values = load(vpool, row[:, None], rv[None, :], there[:, None], DV, DV < DVP, MASKED, STORED, TYPE)
    if STORED != "":
        # Not the weights: what is small there would be rounded away.
        values = (values.to(tl.float32) * scales(vscale, row, there, MASKED, STORED)[:, None]).to(TYPE)
    acc = tl.dot(weight.to(TYPE), values, acc * fade[:, None], input_precision="tf32x3")
    return acc, total, highest


@triton.jit
def attend_blocks(
    acc, total, top, query, position, h, slope, line,
    kpool, vpool, kscale, vscale, columns, head, begin, end, low, high,
    HKV: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr,
    PG: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr, FLOAT32: tl.constexpr,
    SCALE: tl.constexpr, FACTOR: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr,
    CHUNK: tl.constexpr, SINK_KEYS: tl.constexpr, PREDICATE: tl.constexpr, DISTANCES: tl.constexpr,
    STORED: tl.constexpr,
):  # fmt: skip
    """Take blocks begin .. end - 1 of BN keys each, as `attend` does."""
    for block in range(begin, end):
        acc, total, top = attend(
            acc, total, top, query, position, h, slope, line,
            kpool, vpool, kscale, vscale, columns, head, block * BN, low, high,
            HKV, D, DV, DP, DVP, PG, BN, MASKED, FLOAT32,
            SCALE, FACTOR, SOFTCAP, WINDOW, CHUNK, SINK_KEYS, PREDICATE, DISTANCES, STORED,
        )  # fmt: skip
    return acc, total, top


@triton.jit
def attend_boxes(
    acc, total, top, query, position, h, slope, line, kbox, vbox, columns, head, begin, end,
    HKV: tl.constexpr, PG: tl.constexpr, BN: tl.constexpr,
    SCALE: tl.constexpr, FACTOR: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr,
    CHUNK: tl.constexpr, SINK_KEYS: tl.constexpr, PREDICATE: tl.constexpr, DISTANCES: tl.constexpr,
):  # fmt: skip
    """As `attend_blocks` of blocks that every row sees whole, each in a page, copied in boxes.

    kbox and vbox are the pools as matrices [pages * HKV * PG, elements].
    """
    for block in range(begin, end):
        start = block * BN
        row = (tl.load(columns + start // PG) * HKV + head) * PG + start % PG
        x = tl.dot(query, kbox.load([row, 0]).T)
        weight, fade, total, top = weigh(
            x, total, top, position, start + tl.arange(0, BN), h, slope, line, False,
            SCALE, FACTOR, SOFTCAP, WINDOW, CHUNK, SINK_KEYS, PREDICATE, DISTANCES,
        )  # fmt: skip
        acc = tl.dot(weight.to(query.dtype), vbox.load([row, 0]), acc * fade[:, None])
    return acc, total, top


@triton.jit
def normalized(values, total, GUARDED: tl.constexpr):
    """Values over the sum of their weights: NaN where that is NaN or 0, and for GUARDED 0."""
    result = values / total
    if GUARDED:
        # Comparisons with NaN are false.
        result = tl.where(total > 0, result, 0.0)
    return result
