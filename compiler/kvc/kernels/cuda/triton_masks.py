# mypy: disable-error-code="no-untyped-def,misc,untyped-decorator,no-any-return"
# Triton is untyped, and the types of its functions' parameters are no Python types.
"""Which keys a query sees, inside Triton kernels."""

import triton
import triton.language as tl


@triton.jit
def evaluate(TREE: tl.constexpr, q, k, h):
    """A tree of kvc.kernels.cuda.predicates over int32 blocks that broadcast."""
    OP: tl.constexpr = TREE[0]
    if OP == "q":
        result = q
    elif OP == "k":
        result = k
    elif OP == "h":
        result = h
    elif OP == "int":
        result = tl.full((1, 1), TREE[1], tl.int32)
    elif OP == "bool":
        result = tl.full((1, 1), TREE[1], tl.int1)
    elif OP == "not":
        result = evaluate(TREE[1], q, k, h) == 0
    elif OP == "//" or OP == "%":
        # Triton's own division rounds to zero.
        BY: tl.constexpr = TREE[2]
        value = evaluate(TREE[1], q, k, h)
        quotient = value // BY
        rest = value - quotient * BY
        if OP == "//":
            result = tl.where(rest < 0, quotient - 1, quotient)
        else:
            result = tl.where(rest < 0, rest + BY, rest)
    else:
        left = evaluate(TREE[1], q, k, h)
        right = evaluate(TREE[2], q, k, h)
        if OP == "and":
            result = left & right
        elif OP == "or":
            result = left | right
        elif OP == "<":
            result = left < right
        elif OP == "<=":
            result = left <= right
        elif OP == ">":
            result = left > right
        elif OP == ">=":
            result = left >= right
        elif OP == "==":
            result = left == right
        elif OP == "!=":
            result = left != right
        elif OP == "+":
            result = left + right
        elif OP == "-":
            result = left - right
        elif OP == "*":
            result = left * right
        elif OP == "min":
            result = tl.minimum(left, right)
        else:
            tl.static_assert(OP == "max")
            result = tl.maximum(left, right)
    return result


@triton.jit
def seen(
    q, k, h, WINDOW: tl.constexpr, CHUNK: tl.constexpr, SINK_KEYS: tl.constexpr, PREDICATE: tl.constexpr
):
    """Whether queries at positions q [M, 1] of heads h [M, 1] see keys at k [1, N]: int1 [M, N]."""
    visible = k <= q
    if WINDOW > 0:
        inside = k > q - WINDOW
        if SINK_KEYS > 0:
            inside = inside | (k < SINK_KEYS)
        visible = visible & inside
    if CHUNK > 0:
        visible = visible & (k >= q // CHUNK * CHUNK)
    if PREDICATE is not None:
        visible = visible & evaluate(PREDICATE, q, k, h)
    return visible


@triton.jit
def oldest(q, WINDOW: tl.constexpr, CHUNK: tl.constexpr):
    """The first key that a query at q sees, sink keys and predicates aside."""
    first = q * 0
    if WINDOW > 0:
        first = tl.maximum(q - (WINDOW - 1), first)
    if CHUNK > 0:
        first = tl.maximum(q // CHUNK * CHUNK, first)
    return first
