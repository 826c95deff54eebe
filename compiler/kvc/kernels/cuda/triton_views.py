# mypy: disable-error-code="no-untyped-def,misc,untyped-decorator,no-any-return"
# Triton is untyped, and the types of its functions' parameters are no Python types.
"""Queries, keys and values where the graph has them, turned as they are read; kvc_passes.views.View says how.

VIEW is (columns, first, stride, half, columns of the cosines' rows, first, columns of the sines', first);
0 columns: a tensor [1, heads, n, D] of its own; half 0: not turned.
"""

import triton
import triton.language as tl


@triton.jit
def begin(head, token, n, D: tl.constexpr, VIEW: tl.constexpr):
    """Where the elements of a head of a token begin; int64 if `token` is."""
    if VIEW[0] == 0:
        result = (head * n + token) * D
    else:
        result = token * VIEW[0] + (head * VIEW[2] + VIEW[1])
    return result


@triton.jit
def elements(x, start, column, token, there, cos, sin, VIEW: tl.constexpr):
    """Elements [M, N] of rows that begin at `start`, of tokens [M, 1]; float32 where they are turned."""
    HALF: tl.constexpr = VIEW[3]
    own = tl.load(x + start + column, mask=there, other=0.0)
    if HALF > 0:
        turned = there & (column < 2 * HALF)
        partner = tl.load(x + start + (column + HALF) % (2 * HALF), mask=turned, other=0.0).to(tl.float32)
        angle = column % HALF
        c = tl.load(cos + token * VIEW[4] + (angle + VIEW[5]), mask=turned, other=1.0).to(tl.float32)
        s = tl.load(sin + token * VIEW[6] + (angle + VIEW[7]), mask=turned, other=0.0).to(tl.float32)
        own = own.to(tl.float32) * c + tl.where(column < HALF, -partner, partner) * s
    return own
