# mypy: disable-error-code="no-untyped-def,misc,untyped-decorator,no-any-return"
# Triton is untyped, and the types of its functions' parameters are no Python types.
"""Attention over paged keys and values. See kvc.kernels.cuda.attention for arguments and grids.

Pools are [pages, HKV, PG, D]: the key of a token is contiguous. The rows of a program are query tokens
times the heads of a group, so that K and V are read once a group. Softmax runs online in base 2 over blocks
of BN keys. Only keys that some row sees are read, since everything else in the pools may be NaN, and the
table's entries for other pages anything.

D and DV are padded to powers of two DP and DVP. Matrices are multiplied in the queries' type or, for FLOAT32,
in float32. kscale and vscale are None where pools hold floats (STORED ""). Scores are in units of which
FACTOR make 1 in base 2: with nothing to add to the products, their scale is applied together with the
subtraction of the maximum. SOFTCAP 0, WINDOW 0, CHUNK 0, SINK_KEYS 0, PREDICATE None, DISTANCES 0 are none.
With WHOLE, tokens are all at one position: they see the same keys, those of an encoder's output.
VIEW, of queries, KVIEW and VVIEW are as triton_views says; cos and sin are None where nothing is turned.
"""

import triton
import triton.language as tl

from .triton_masks import oldest
from .triton_softmax import LOG2E, attend, attend_blocks, attend_boxes, normalized
from .triton_stored import store
from .triton_views import begin as begin_of
from .triton_views import elements


@triton.jit
def append(
    k, v, cos, sin, slots, kpool, vpool, kscale, vscale, n,
    HKV: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr,
    PG: tl.constexpr, BT: tl.constexpr, STORED: tl.constexpr, KVIEW: tl.constexpr, VVIEW: tl.constexpr,
):  # fmt: skip
    """Write the keys and values of BT tokens and a KV head into their pages."""
    head = tl.program_id(1)
    token = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)
    inside = token < n
    slot = tl.load(slots + token, mask=inside, other=0)
    row = ((slot // PG).to(tl.int64) * HKV + head) * PG + slot % PG
    first = begin_of(head, token, n.to(tl.int64), D, KVIEW)
    store(k, first, token, cos, sin, kpool, kscale, row, inside, D, DP, STORED, KVIEW)
    first = begin_of(head, token, n.to(tl.int64), DV, VVIEW)
    store(v, first, token, cos, sin, vpool, vscale, row, inside, DV, DVP, STORED, VVIEW)


@triton.jit
def prefill(
    q, cos, sin, kpool, vpool, kscale, vscale, positions, tiles, table, slopes, sinks, bias, kbox, vbox,
    out, n, width,
    H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    DP: tl.constexpr, DVP: tl.constexpr, PG: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    FLOAT32: tl.constexpr, SCALE: tl.constexpr, FACTOR: tl.constexpr, SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr, CHUNK: tl.constexpr, SINK_KEYS: tl.constexpr, PREDICATE: tl.constexpr,
    DISTANCES: tl.constexpr, STORED: tl.constexpr,
    GUARDED: tl.constexpr, SPLIT: tl.constexpr, WHOLE: tl.constexpr, VIEW: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Attention of a tile of at most TILE query tokens and a KV head, BM rows at a time."""
    STEP: tl.constexpr = BM // (H // HKV)
    # Tiles of later tokens take longer: they begin first.
    tiles += (tl.num_programs(0) - 1 - tl.program_id(0)) * 3
    columns = table + tl.load(tiles).to(tl.int64) * width
    first = tl.load(tiles + 1)
    tokens = tl.load(tiles + 2)
    if TILE <= STEP:
        prefill_rows(
            q, cos, sin, kpool, vpool, kscale, vscale, positions, columns, slopes, sinks, bias, kbox, vbox,
            out, n, first, tokens,
            H, HKV, D, DV, DP, DVP, PG, BM, BN, FLOAT32, SCALE, FACTOR, SOFTCAP,
            WINDOW, CHUNK, SINK_KEYS, PREDICATE, DISTANCES, STORED, GUARDED, SPLIT, WHOLE, VIEW,
        )  # fmt: skip
    else:
        for done in range(0, tokens, STEP):
            prefill_rows(
                q, cos, sin, kpool, vpool, kscale, vscale, positions, columns, slopes, sinks, bias,
                kbox, vbox, out, n, first + done, tl.minimum(tokens - done, STEP),
                H, HKV, D, DV, DP, DVP, PG, BM, BN, FLOAT32, SCALE, FACTOR, SOFTCAP,
                WINDOW, CHUNK, SINK_KEYS, PREDICATE, DISTANCES, STORED, GUARDED, SPLIT, WHOLE, VIEW,
            )  # fmt: skip


@triton.jit
def prefill_rows(
    q, cos, sin, kpool, vpool, kscale, vscale, positions, columns, slopes, sinks, bias, kbox, vbox,
    out, n, first, tokens,
    H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    DP: tl.constexpr, DVP: tl.constexpr, PG: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    FLOAT32: tl.constexpr, SCALE: tl.constexpr, FACTOR: tl.constexpr, SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr, CHUNK: tl.constexpr, SINK_KEYS: tl.constexpr, PREDICATE: tl.constexpr,
    DISTANCES: tl.constexpr, STORED: tl.constexpr,
    GUARDED: tl.constexpr, SPLIT: tl.constexpr, WHOLE: tl.constexpr, VIEW: tl.constexpr,
):  # fmt: skip
    """Attention of `tokens` query tokens from `first` and a KV head, in at most BM rows.

    With SPLIT, blocks that every row sees whole have a loop of their own, without masks; keys and values come
    in boxes there, unless kbox is None.
    """
    G: tl.constexpr = H // HKV
    TYPE: tl.constexpr = tl.float32 if FLOAT32 else q.dtype.element_ty
    head = tl.program_id(1)
    begin = tl.load(positions + first).to(tl.int32)
    last = begin if WHOLE else begin + tokens - 1

    rm = tl.arange(0, BM)
    rd = tl.arange(0, DP)
    rv = tl.arange(0, DVP)
    inside = rm < tokens * G
    token = (first + rm // G).to(tl.int64)
    h = head * G + rm % G
    position = begin + (tl.arange(0, 1) if WHOLE else rm // G)
    there = inside[:, None]
    if D < DP:
        there = there & (rd < D)[None, :]
    given = begin_of(h, token, n.to(tl.int64), D, VIEW)[:, None]
    query = elements(q, given, rd[None, :], token[:, None], there, cos, sin, VIEW).to(TYPE)
    slope = None
    if slopes is not None:
        slope = tl.load(slopes + h, mask=inside, other=0.0)
    line = None
    if bias is not None:
        line = bias + tl.where(inside, h, 0) * DISTANCES
    acc = tl.zeros((BM, DVP), tl.float32)
    if sinks is not None:
        top = tl.load(sinks + h, mask=inside, other=0.0) * (LOG2E / FACTOR)
        total = tl.full((BM,), 1.0, tl.float32)
    else:
        top = tl.full((BM,), float("-inf"), tl.float32)
        total = tl.zeros((BM,), tl.float32)

    low = oldest(begin, WINDOW, CHUNK)
    high = last + 1
    block = low // BN
    end = tl.cdiv(high, BN)
    if SINK_KEYS > 0:
        apart = tl.minimum(tl.cdiv(SINK_KEYS, BN), end)
        acc, total, top = attend_blocks(
            acc, total, top, query, position, h, slope, line,
            kpool, vpool, kscale, vscale, columns, head, 0, apart, low, high,
            HKV, D, DV, DP, DVP, PG, BN, True, FLOAT32,
            SCALE, FACTOR, SOFTCAP, WINDOW, CHUNK, SINK_KEYS, PREDICATE, DISTANCES, STORED,
        )  # fmt: skip
        block = tl.maximum(block, apart)
    if SPLIT:
        # Every row sees the keys from the last row's oldest one to the first row's own.
        whole = tl.maximum(tl.cdiv(oldest(last, WINDOW, CHUNK), BN), block)
        rest = tl.maximum((begin + 1) // BN, whole)
        if WINDOW > 0 or CHUNK > 0:
            whole = tl.minimum(whole, end)
            rest = tl.minimum(rest, end)
            acc, total, top = attend_blocks(
                acc, total, top, query, position, h, slope, line, kpool, vpool, kscale, vscale, columns, head,
                block, whole, low, high, HKV, D, DV, DP, DVP, PG, BN, True, FLOAT32,
                SCALE, FACTOR, SOFTCAP, WINDOW, CHUNK, SINK_KEYS, PREDICATE, DISTANCES, STORED,
            )  # fmt: skip
        if kbox is not None:
            acc, total, top = attend_boxes(
                acc, total, top, query, position, h, slope, line, kbox, vbox, columns, head, whole, rest,
                HKV, PG, BN, SCALE, FACTOR, SOFTCAP, WINDOW, CHUNK, SINK_KEYS, PREDICATE, DISTANCES,
            )  # fmt: skip
        else:
            acc, total, top = attend_blocks(
                acc, total, top, query, position, h, slope, line,
                kpool, vpool, kscale, vscale, columns, head, whole, rest, low, high,
                HKV, D, DV, DP, DVP, PG, BN, False, FLOAT32,
                SCALE, FACTOR, SOFTCAP, WINDOW, CHUNK, SINK_KEYS, PREDICATE, DISTANCES, STORED,
            )  # fmt: skip
        block = rest
    acc, total, top = attend_blocks(
        acc, total, top, query, position, h, slope, line,
        kpool, vpool, kscale, vscale, columns, head, block, end, low, high,
        HKV, D, DV, DP, DVP, PG, BN, True, FLOAT32,
        SCALE, FACTOR, SOFTCAP, WINDOW, CHUNK, SINK_KEYS, PREDICATE, DISTANCES, STORED,
    )  # fmt: skip
    result = normalized(acc, total[:, None], GUARDED)
    there = inside[:, None]
    if DV < DVP:
        there = there & (rv < DV)[None, :]
    tl.store(out + (token * H + h)[:, None] * DV + rv[None, :], result.to(out.dtype.element_ty), mask=there)


@triton.jit
def decode(
    q, cos, sin, kpool, vpool, kscale, vscale, positions, table, slopes, sinks, bias, part, b, width,
    H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    DP: tl.constexpr, DVP: tl.constexpr, PG: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    FLOAT32: tl.constexpr, SCALE: tl.constexpr, FACTOR: tl.constexpr, SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr, CHUNK: tl.constexpr, SINK_KEYS: tl.constexpr, PREDICATE: tl.constexpr,
    DISTANCES: tl.constexpr, STORED: tl.constexpr, VIEW: tl.constexpr,
):  # fmt: skip
    """A share of the attention of a sequence's token and a KV head, not normalised.

    A share that has no key writes only its sum, 0.
    """
    G: tl.constexpr = H // HKV
    TYPE: tl.constexpr = tl.float32 if FLOAT32 else q.dtype.element_ty
    sequence = tl.program_id(0)
    head = tl.program_id(1)
    share = tl.program_id(2)
    shares = tl.num_programs(2)
    columns = table + sequence.to(tl.int64) * width
    own = tl.load(positions + sequence).to(tl.int32)

    rm = tl.arange(0, BM)
    rd = tl.arange(0, DP)
    rv = tl.arange(0, DVP)
    inside = rm < G
    h = head * G + rm
    position = own + rm * 0
    there = inside[:, None]
    if D < DP:
        there = there & (rd < D)[None, :]
    token = sequence.to(tl.int64)
    given = begin_of(h, token, b, D, VIEW)[:, None]
    query = elements(q, given, rd[None, :], token, there, cos, sin, VIEW).to(TYPE)
    slope = None
    if slopes is not None:
        slope = tl.load(slopes + h, mask=inside, other=0.0)
    line = None
    if bias is not None:
        line = bias + tl.where(inside, h, 0) * DISTANCES
    acc = tl.zeros((BM, DVP), tl.float32)
    top = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    if sinks is not None:
        # The first share has the score that has no key.
        top = tl.where(share == 0, tl.load(sinks + h, mask=inside, other=0.0) * (LOG2E / FACTOR), top)
        total = tl.where(share == 0, 1.0, total)

    # Blocks that are read, counted without those between the sink keys and the window.
    low = oldest(own, WINDOW, CHUNK)
    high = own + 1
    block = low // BN
    end = tl.cdiv(high, BN)
    if SINK_KEYS > 0:
        hole = tl.maximum(block - tl.cdiv(SINK_KEYS, BN), 0)
        block = 0
        end -= hole
    each = tl.cdiv(end - block, shares)
    block += share * each
    end = tl.minimum(block + each, end)
    for j in range(block, end):
        start = j * BN
        if SINK_KEYS > 0:
            start += tl.where(j >= tl.cdiv(SINK_KEYS, BN), hole * BN, 0)
        acc, total, top = attend(
            acc, total, top, query, position, h, slope, line,
            kpool, vpool, kscale, vscale, columns, head, start, low, high,
            HKV, D, DV, DP, DVP, PG, BN, True, FLOAT32,
            SCALE, FACTOR, SOFTCAP, WINDOW, CHUNK, SINK_KEYS, PREDICATE, DISTANCES, STORED,
        )  # fmt: skip
    part += ((sequence.to(tl.int64) * shares + share) * H + h) * (DV + 2)
    tl.store(part + DV, top * FACTOR, mask=inside)
    tl.store(part + DV + 1, total, mask=inside)
    there = (inside & (block < end))[:, None]
    if DV < DVP:
        there = there & (rv < DV)[None, :]
    tl.store(part[:, None] + rv[None, :], acc, mask=there)


@triton.jit
def merge(
    part, out, b, shares,
    H: tl.constexpr, DV: tl.constexpr, VB: tl.constexpr, SP: tl.constexpr, GUARDED: tl.constexpr,
):  # fmt: skip
    """The shares, SP at most, of a sequence's token and a head put together, VB elements of them."""
    sequence = tl.program_id(0)
    h = tl.program_id(1)
    rs = tl.arange(0, SP)
    rv = tl.program_id(2) * VB + tl.arange(0, VB)
    share = part + ((sequence.to(tl.int64) * shares + rs) * H + h) * (DV + 2)
    top = tl.load(share + DV, mask=rs < shares, other=float("-inf"))
    total = tl.load(share + DV + 1, mask=rs < shares, other=0.0)
    highest = tl.max(top, 0)
    weight = tl.exp2(top - tl.where(highest == float("-inf"), 0.0, highest))
    # The values of a share without keys were not written. A sum of NaN is not 0.
    there = (total != 0.0)[:, None] & (rv < DV)[None, :]
    values = tl.load(share[:, None] + rv[None, :], mask=there, other=0.0)
    result = normalized(tl.sum(values * weight[:, None], 0), tl.sum(total * weight, 0), GUARDED)
    tl.store(out + (sequence.to(tl.int64) * H + h) * DV + rv, result.to(out.dtype.element_ty), mask=rv < DV)
