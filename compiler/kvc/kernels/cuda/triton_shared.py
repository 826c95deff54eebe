# mypy: disable-error-code="no-untyped-def,misc,untyped-decorator,no-any-return"
# Triton is untyped, and the types of its functions' parameters are no Python types.
"""Attention over what is key and value in one. See kvc.kernels.cuda.shared for arguments and grids.

The pool is [pages, PG, D]: what is kept of a token is the key of all H heads, and its first DV elements are
their value. Rows are too wide for registers: scores are summed up over DC elements at a time, and a program
computes VB elements of its rows' values. Programs of the same rows compute their scores each. Queries have QD
elements. SLICED is None, or says how a query meets its own part of the key (triton_sliced). MADE is None, or
says how keys and values are made again with wkey and wvalue [KV heads * elements, x's elements] and biases
(triton_remade): then a program's rows are of one KV head. REKEYED is None, or says how keys are made of
values, times `factors` f32 [KV heads * elements] (triton_rekeyed): the rows are of one KV head, too.
Everything else is as in triton_attention.
"""

import triton
import triton.language as tl

from .triton_masks import oldest
from .triton_rekeyed import rekeyed_scores
from .triton_remade import made_scores, made_values
from .triton_sliced import scores
from .triton_softmax import LOG2E, normalized, weigh
from .triton_stored import load


@triton.jit
def append(
    x, slots, xpool, n,
    D: tl.constexpr, DC: tl.constexpr, PG: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Write DC elements of BT tokens into their pages."""
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    column = tl.program_id(1) * DC + tl.arange(0, DC)
    inside = token < n
    slot = tl.load(slots + token, mask=inside, other=0)
    row = (slot // PG).to(tl.int64) * PG + slot % PG
    there = inside[:, None] & (column < D)[None, :]
    value = tl.load(x + token.to(tl.int64)[:, None] * D + column[None, :], mask=there)
    tl.store(xpool + row[:, None] * D + column[None, :], value.to(xpool.dtype.element_ty), mask=there)


@triton.jit
def attend(
    acc, total, top, query, inside, position, h, slope, line, xpool, wkey, wvalue, bkey, bvalue,
    factors, columns, head, block, start, low, high,
    H: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DC: tl.constexpr, VB: tl.constexpr,
    PG: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BH: tl.constexpr, MASKED: tl.constexpr,
    FLOAT32: tl.constexpr, SCALE: tl.constexpr, FACTOR: tl.constexpr, SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr, CHUNK: tl.constexpr, SINK_KEYS: tl.constexpr, PREDICATE: tl.constexpr,
    DISTANCES: tl.constexpr, SLICED: tl.constexpr, MADE: tl.constexpr, REKEYED: tl.constexpr,
):  # fmt: skip
    """Take the block of keys from `start` into elements block * VB .. of the rows' values, sums and maxima.

    query: pointers to the rows' queries [M], of heads from `head` on, BH at most. Keys of low .. high - 1 and
    the sink keys may be read.
    """
    TYPE: tl.constexpr = tl.float32 if FLOAT32 else query.dtype.element_ty
    rn = tl.arange(0, BN)
    key = start + rn
    there = key >= low
    if SINK_KEYS > 0:
        there = there | (key < SINK_KEYS)
    there = there & (key < high)
    if PG >= BN:
        page = tl.load(columns + start // PG).to(tl.int64)
        row = page * PG + start % PG + rn
    else:
        if MASKED:
            page = tl.load(columns + key // PG, mask=there, other=0).to(tl.int64)
        else:
            page = tl.load(columns + key // PG).to(tl.int64)
        row = page * PG + key % PG
    if MADE is not None:
        own = head // MADE[0]
        x = made_scores(query, inside, xpool, row, there, wkey, bkey, own, MADE, D, BM, BN, MASKED, TYPE)
    elif REKEYED is not None:
        own = head // REKEYED[0]
        x = rekeyed_scores(
            query, inside, xpool, row, there, factors, own, REKEYED, D, BM, BN, MASKED, TYPE
        )  # fmt: skip
    elif SLICED is not None:
        x = scores(query, inside, h, xpool, row, there, head, SLICED, H, D, DV, BM, BN, BH, MASKED, TYPE)
    else:
        x = tl.zeros((BM, BN), tl.float32)
        for c in range(0, D, DC):
            rd = c + tl.arange(0, DC)
            shown = inside[:, None] if D % DC == 0 else inside[:, None] & (rd < D)[None, :]
            part = tl.load(query[:, None] + rd[None, :], mask=shown, other=0.0)
            keys = load(xpool, row[None, :], rd[:, None], there[None, :], D, D % DC != 0, MASKED, "", TYPE)
            x = tl.dot(part.to(TYPE), keys, x, input_precision="tf32x3")
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
    if MADE is not None:
        values = made_values(xpool, row, there, wvalue, bvalue, own, MADE, D, DV, VB, BN, MASKED, TYPE)
    else:
        rv = block * VB + tl.arange(0, VB)
        if REKEYED is not None:
            rv += own * DV
        before: tl.constexpr = REKEYED[1] - DV if REKEYED is not None else 0  # values of other heads
        beyond: tl.constexpr = before + (DV + VB - 1) // VB * VB > D
        values = load(xpool, row[:, None], rv[None, :], there[:, None], D, beyond, MASKED, "", TYPE)
    acc = tl.dot(weight.to(TYPE), values, acc * fade[:, None], input_precision="tf32x3")
    return acc, total, highest


@triton.jit
def prefill(
    q, xpool, positions, tiles, table, slopes, sinks, bias, wkey, wvalue, bkey, bvalue, factors, out,
    n, width,
    H: tl.constexpr, D: tl.constexpr, QD: tl.constexpr, DV: tl.constexpr, DC: tl.constexpr,
    VB: tl.constexpr, PG: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BH: tl.constexpr,
    FLOAT32: tl.constexpr, SCALE: tl.constexpr, FACTOR: tl.constexpr, SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr, CHUNK: tl.constexpr, SINK_KEYS: tl.constexpr, PREDICATE: tl.constexpr,
    GUARDED: tl.constexpr, WHOLE: tl.constexpr, SLICED: tl.constexpr, MADE: tl.constexpr,
    REKEYED: tl.constexpr, DISTANCES: tl.constexpr,
):  # fmt: skip
    """Attention of a tile of query tokens and BH heads, BM // BH tokens at a time, and VB elements of it."""
    STEP: tl.constexpr = BM // BH
    BLOCKS: tl.constexpr = (DV + VB - 1) // VB
    # Tiles of later tokens take longer: they begin first.
    tiles += (tl.num_programs(0) - 1 - tl.program_id(0)) * 3
    columns = table + tl.load(tiles).to(tl.int64) * width
    first = tl.load(tiles + 1)
    tokens = tl.load(tiles + 2)
    block = tl.program_id(1) % BLOCKS
    rm = tl.arange(0, BM)
    head = tl.program_id(1) // BLOCKS * BH
    h = head + rm % BH
    rv = block * VB + tl.arange(0, VB)
    for done in range(0, tokens, STEP):
        count = tl.minimum(tokens - done, STEP)
        begin = tl.load(positions + first + done).to(tl.int32)
        inside = (rm // BH < count) & (h < H)
        token = (first + done + rm // BH).to(tl.int64)
        position = begin + (tl.arange(0, 1) if WHOLE else rm // BH)
        query = q + (h * n.to(tl.int64) + token) * QD
        slope = None
        if slopes is not None:
            slope = tl.load(slopes + h, mask=inside, other=0.0)
        line = None
        if bias is not None:
            line = bias + tl.where(inside, h, 0) * DISTANCES
        acc = tl.zeros((BM, VB), tl.float32)
        if sinks is not None:
            top = tl.load(sinks + h, mask=inside, other=0.0) * (LOG2E / FACTOR)
            total = tl.full((BM,), 1.0, tl.float32)
        else:
            top = tl.full((BM,), float("-inf"), tl.float32)
            total = tl.zeros((BM,), tl.float32)
        low = oldest(begin, WINDOW, CHUNK)
        high = begin + (1 if WHOLE else count)
        at = low // BN
        end = tl.cdiv(high, BN)
        if SINK_KEYS > 0:
            apart = tl.minimum(tl.cdiv(SINK_KEYS, BN), end)
            for j in range(0, apart):
                acc, total, top = attend(
                    acc, total, top, query, inside, position, h, slope, line,
                    xpool, wkey, wvalue, bkey, bvalue, factors, columns, head, block, j * BN, low, high,
                    H, D, DV, DC, VB, PG, BM, BN, BH, True, FLOAT32,
                    SCALE, FACTOR, SOFTCAP, WINDOW, CHUNK, SINK_KEYS, PREDICATE, DISTANCES,
                    SLICED, MADE, REKEYED,
                )  # fmt: skip
            at = tl.maximum(at, apart)
        if PREDICATE is None and WINDOW == 0 and CHUNK == 0:
            # Blocks that every row sees whole.
            whole = (begin + 1) // BN
            for j in range(at, whole):
                acc, total, top = attend(
                    acc, total, top, query, inside, position, h, slope, line,
                    xpool, wkey, wvalue, bkey, bvalue, factors, columns, head, block, j * BN, low, high,
                    H, D, DV, DC, VB, PG, BM, BN, BH, False, FLOAT32,
                    SCALE, FACTOR, SOFTCAP, WINDOW, CHUNK, SINK_KEYS, PREDICATE, DISTANCES,
                    SLICED, MADE, REKEYED,
                )  # fmt: skip
            at = whole
        for j in range(at, end):
            acc, total, top = attend(
                acc, total, top, query, inside, position, h, slope, line,
                xpool, wkey, wvalue, bkey, bvalue, factors, columns, head, block, j * BN, low, high,
                H, D, DV, DC, VB, PG, BM, BN, BH, True, FLOAT32,
                SCALE, FACTOR, SOFTCAP, WINDOW, CHUNK, SINK_KEYS, PREDICATE, DISTANCES, SLICED, MADE, REKEYED,
            )  # fmt: skip
        result = normalized(acc, total[:, None], GUARDED)
        there = inside[:, None] & (rv < DV)[None, :]
        tl.store(
            out + (token * H + h)[:, None] * DV + rv[None, :], result.to(out.dtype.element_ty), mask=there
        )


@triton.jit
def decode(
    q, xpool, positions, table, slopes, sinks, bias, wkey, wvalue, bkey, bvalue, factors, part, b, width,
    H: tl.constexpr, D: tl.constexpr, QD: tl.constexpr, DV: tl.constexpr, DC: tl.constexpr,
    VB: tl.constexpr, PG: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BH: tl.constexpr,
    FLOAT32: tl.constexpr, SCALE: tl.constexpr, FACTOR: tl.constexpr, SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr, CHUNK: tl.constexpr, SINK_KEYS: tl.constexpr, PREDICATE: tl.constexpr,
    DISTANCES: tl.constexpr, SLICED: tl.constexpr, MADE: tl.constexpr, REKEYED: tl.constexpr,
):  # fmt: skip
    """A share of the attention of a sequence's token and BH heads, VB elements of it, not normalised.

    A share that has no key writes only its sum, 0.
    """
    BLOCKS: tl.constexpr = (DV + VB - 1) // VB
    sequence = tl.program_id(0)
    block = tl.program_id(1) % BLOCKS
    share = tl.program_id(2)
    shares = tl.num_programs(2)
    columns = table + sequence.to(tl.int64) * width
    own = tl.load(positions + sequence).to(tl.int32)
    rm = tl.arange(0, BM)
    head = tl.program_id(1) // BLOCKS * BH
    h = head + rm
    rv = block * VB + tl.arange(0, VB)
    inside = (rm < BH) & (h < H)
    position = own + h * 0
    query = q + (h * b.to(tl.int64) + sequence) * QD
    slope = None
    if slopes is not None:
        slope = tl.load(slopes + h, mask=inside, other=0.0)
    line = None
    if bias is not None:
        line = bias + tl.where(inside, h, 0) * DISTANCES
    acc = tl.zeros((BM, VB), tl.float32)
    top = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    if sinks is not None:
        # The first share has the score that has no key.
        top = tl.where(share == 0, tl.load(sinks + h, mask=inside, other=0.0) * (LOG2E / FACTOR), top)
        total = tl.where(share == 0, 1.0, total)
    low = oldest(own, WINDOW, CHUNK)
    high = own + 1
    first = low // BN
    end = tl.cdiv(high, BN)
    if SINK_KEYS > 0:
        hole = tl.maximum(first - tl.cdiv(SINK_KEYS, BN), 0)
        first = 0
        end -= hole
    each = tl.cdiv(end - first, shares)
    first += share * each
    end = tl.minimum(first + each, end)
    for j in range(first, end):
        start = j * BN
        if SINK_KEYS > 0:
            start += tl.where(j >= tl.cdiv(SINK_KEYS, BN), hole * BN, 0)
        acc, total, top = attend(
            acc, total, top, query, inside, position, h, slope, line,
            xpool, wkey, wvalue, bkey, bvalue, factors, columns, head, block, start, low, high,
            H, D, DV, DC, VB, PG, BM, BN, BH, True, FLOAT32,
            SCALE, FACTOR, SOFTCAP, WINDOW, CHUNK, SINK_KEYS, PREDICATE, DISTANCES, SLICED, MADE, REKEYED,
        )  # fmt: skip
    part += ((sequence.to(tl.int64) * shares + share) * H + h) * (DV + 2)
    if block == 0:
        tl.store(part + DV, top * FACTOR, mask=inside)
        tl.store(part + DV + 1, total, mask=inside)
    there = (inside & (first < end))[:, None] & (rv < DV)[None, :]
    tl.store(part[:, None] + rv[None, :], acc, mask=there)
