# mypy: disable-error-code="no-untyped-def,misc,untyped-decorator,no-any-return"
# Triton is untyped, and the types of its functions' parameters are no Python types.
"""The next tokens from logits. See kvc.kernels.cuda.sampling for arguments, grids and what is exact.

A weight is exp((logit - peak) / temperature), 0 below 2^-SHIFT. It is compared as the bits of its float32,
and summed as a multiple of 2^-SHIFT in 64-bit integers: sums depend on no order, and do not overflow.
"""

import triton
import triton.language as tl


@triton.jit
def peaks(logits, parts, VOCAB: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr):
    """The largest logit of a block of a row, in the upper half of a word; the lower half prefers low ids."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(logits + row * STRIDE + at, mask=at < VOCAB, other=float("-inf"))
    bits = value.to(tl.int32, bitcast=True)
    order = tl.where(value == 0.0, 0, bits ^ ((bits >> 31) & 0x7FFFFFFF))  # as integers; -0 is 0
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
    order = tl.where(is_nan, 0x7FFFFFFF, order)  # above everything, as it is to numpy
    word = (order.to(tl.int64) << 32) | (at ^ 0x7FFFFFFF).to(tl.int64)
    tl.store(parts + row * tl.num_programs(1) + tl.program_id(1), tl.max(word, 0))


@triton.jit
def choose(
    logits, parts, draws, chosen,
    VOCAB: tl.constexpr, STRIDE: tl.constexpr, BLOCKS: tl.constexpr, BP: tl.constexpr,
    CHUNK: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """The next token of a row. Its logits become weights, unless it is greedy."""
    row = tl.program_id(0).to(tl.int64)
    rb = tl.arange(0, BP)
    words = tl.load(parts + row * BLOCKS + rb, mask=rb < BLOCKS, other=-0x7FFFFFFFFFFFFFFF)
    best = (tl.max(words, 0) & 0x7FFFFFFF).to(tl.int32) ^ 0x7FFFFFFF
    x = logits + row * STRIDE
    peak = tl.load(x + best)
    chosen += row * 2
    tl.store(chosen + 1, peak.to(tl.int32, bitcast=True))
    temperature = tl.load(draws + row * 4).to(tl.int32).to(tl.float32, bitcast=True)
    if (temperature == 0.0) | (peak - peak != 0.0):  # greedy, or no finite number
        tl.store(chosen, best)
    else:
        count = tl.load(draws + row * 4 + 1).to(tl.int32)
        drop = tl.load(draws + row * 4 + 2).to(tl.uint64, bitcast=True)
        uniform = tl.load(draws + row * 4 + 3).to(tl.uint64, bitcast=True)
        total = weigh(x, peak, temperature, VOCAB, CHUNK, SHIFT)
        if (count > 0) & (count < VOCAB):
            bound = largest(x, count, VOCAB, CHUNK)
            total = keep(x, bound, count - above(x, bound + 1, VOCAB, CHUNK), VOCAB, CHUNK, SHIFT)
        if drop != 0:
            room = tl.umulhi(drop, total.to(tl.uint64)).to(tl.int64)
            bound, room = smallest(x, room, VOCAB, CHUNK, SHIFT)
            ties = above(x, bound, VOCAB, CHUNK) - above(x, bound + 1, VOCAB, CHUNK)
            own = summand(bound.to(tl.float32, bitcast=True), SHIFT)
            total = keep(x, bound, ties - (room // own).to(tl.int32), VOCAB, CHUNK, SHIFT)
        goal = tl.umulhi(uniform, total.to(tl.uint64)).to(tl.int64)
        tl.store(chosen, reached(x, goal, VOCAB, CHUNK, SHIFT))


@triton.jit
def summand(weight, SHIFT: tl.constexpr):
    """A weight as a multiple of 2^-SHIFT, rounded down."""
    return (weight * (2.0**SHIFT)).to(tl.int64)


@triton.jit
def weigh(x, peak, temperature, VOCAB: tl.constexpr, CHUNK: tl.constexpr, SHIFT: tl.constexpr):
    """Write the weights in the place of the logits; their sum."""
    sums = tl.zeros((CHUNK,), tl.int64)
    for start in range(0, VOCAB, CHUNK):
        at = start + tl.arange(0, CHUNK)
        value = tl.load(x + at, mask=at < VOCAB, other=float("-inf"))
        weight = tl.exp(tl.div_rn(value - peak, temperature))
        weight = tl.where(weight >= 2.0**-SHIFT, weight, 0.0)
        tl.store(x + at, weight, mask=at < VOCAB)
        sums += summand(weight, SHIFT)
    tl.debug_barrier()
    return tl.sum(sums, 0)


@triton.jit
def above(x, bound, VOCAB: tl.constexpr, CHUNK: tl.constexpr):
    """How many weights have bits of `bound` (positive) or more."""
    counts = tl.zeros((CHUNK,), tl.int32)
    for start in range(0, VOCAB, CHUNK):
        at = start + tl.arange(0, CHUNK)
        weight = tl.load(x + at, mask=at < VOCAB, other=0.0)
        counts += (weight.to(tl.int32, bitcast=True) >= bound).to(tl.int32)
    return tl.sum(counts, 0)


@triton.jit
def below(x, bound, VOCAB: tl.constexpr, CHUNK: tl.constexpr, SHIFT: tl.constexpr):
    """The sum of the weights that have bits below `bound`."""
    sums = tl.zeros((CHUNK,), tl.int64)
    for start in range(0, VOCAB, CHUNK):
        at = start + tl.arange(0, CHUNK)
        weight = tl.load(x + at, mask=at < VOCAB, other=0.0)
        sums += summand(tl.where(weight.to(tl.int32, bitcast=True) < bound, weight, 0.0), SHIFT)
    return tl.sum(sums, 0)


@triton.jit
def largest(x, count, VOCAB: tl.constexpr, CHUNK: tl.constexpr):
    """The bits of the `count`th largest weight."""
    low = tl.full((), 0, tl.int32)  # so many have these bits or more
    high = tl.full((), 0x3F800001, tl.int32)  # fewer have
    while high - low > 1:
        middle = (low + high) // 2
        enough = above(x, middle, VOCAB, CHUNK) >= count
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    return low


@triton.jit
def smallest(x, room, VOCAB: tl.constexpr, CHUNK: tl.constexpr, SHIFT: tl.constexpr):
    """The bits of the largest weight for which the sum of all smaller ones is at most `room`, and the rest.

    `room` must be less than the sum of all weights.
    """
    low = tl.full((), 0, tl.int32)
    high = tl.full((), 0x3F800001, tl.int32)
    left = room
    while high - low > 1:
        middle = (low + high) // 2
        rest = room - below(x, middle, VOCAB, CHUNK, SHIFT)
        low = tl.where(rest >= 0, middle, low)
        left = tl.where(rest >= 0, rest, left)
        high = tl.where(rest >= 0, high, middle)
    return low, left


@triton.jit
def keep(x, bound, count, VOCAB: tl.constexpr, CHUNK: tl.constexpr, SHIFT: tl.constexpr):
    """Set weights to 0 but those with bits above `bound` and the first `count` that have these; their sum."""
    sums = tl.zeros((CHUNK,), tl.int64)
    ties = tl.full((), 0, tl.int32)
    for start in range(0, VOCAB, CHUNK):
        at = start + tl.arange(0, CHUNK)
        weight = tl.load(x + at, mask=at < VOCAB, other=0.0)
        bits = weight.to(tl.int32, bitcast=True)
        equal = (bits == bound).to(tl.int32)
        rank = ties + tl.cumsum(equal, 0)
        kept = (bits > bound) | ((bits == bound) & (rank <= count))
        weight = tl.where(kept, weight, 0.0)
        tl.store(x + at, weight, mask=at < VOCAB)
        sums += summand(weight, SHIFT)
        ties += tl.sum(equal, 0)
    tl.debug_barrier()
    return tl.sum(sums, 0)


@triton.jit
def reached(x, goal, VOCAB: tl.constexpr, CHUNK: tl.constexpr, SHIFT: tl.constexpr):
    """The first token with which the sum of the weights is above `goal`."""
    token = tl.full((), 0, tl.int32)
    before = tl.full((), 0, tl.int64)
    for start in range(0, VOCAB, CHUNK):
        at = start + tl.arange(0, CHUNK)
        weight = tl.load(x + at, mask=at < VOCAB, other=0.0)
        sums = before + tl.cumsum(summand(weight, SHIFT), 0)
        token += tl.sum((sums <= goal).to(tl.int32), 0)
        before = tl.max(sums, 0)
    return token
