"""What kernels for a CPU allocate for themselves while they run: local buffers that are no registers.

TVM's runtime takes them from a pool that every thread has of its own and that never gives memory back.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from itertools import zip_longest
from typing import Any, Final

import tvm
from tvm import IRModule, s_tir, tirx
from tvm_ffi import structural_walk

from kvc_passes.errors import PlanningError
from kvc_passes.place_arena import element_bytes, evaluate

from ..kernels.emit import Emitter, argument, i64

PAGE: Final = 4096
HEADER: Final = 128
"""What the C library puts before an allocation, and the alignment of what comes behind."""

Sizes = tuple[int, ...]
"""Bytes of buffers that are there at once, the largest first."""


def thread_buffers(modules: Iterable[IRModule], bounds: Mapping[str, int] | None = None) -> Sizes:
    """Buffers that are enough for each kernel: one for one, the largest that any of them needs at once.

    A pool that has blocks of these sizes never grows: it gives a buffer the smallest free block that holds
    it, and a kernel's buffers are freed in the reverse of their order. bounds: of symbols in their shapes.
    Raises PlanningError for one whose size has no bound.
    """
    most: Sizes = ()
    for module in modules:
        for function in compacted(module).functions.values():
            if isinstance(function, tirx.PrimFunc):
                most = _larger(most, _needed(function, bounds or {}))
    return most


def compacted(module: IRModule) -> IRModule:
    """Buffers of what TVM generated get small where they are used; templates say how large theirs are.

    TVM's pass looks at every access of every buffer. Templates have thousands: it is left out for them.
    """
    functions = dict(module.functions_items())
    generated = {v: f for v, f in functions.items() if isinstance(f, tirx.PrimFunc) and _block_buffers(f)}
    return IRModule({**functions, **dict(_with_compact_buffers(IRModule(generated)).functions_items())})


def pool_bytes(buffers: Sizes) -> int:
    """Bytes of a pool that has had so many buffers at once."""
    return sum(map(whole_pages, buffers))


def reserve(buffers: Sizes, threads: int) -> tirx.PrimFunc:
    """Have so many buffers at once on every thread, and touch their pages; x is one float32, which is read.

    Run before anything else, it makes the pools as large as they get, whatever order kernels come in.
    """
    e, x = Emitter(), argument("x", (1,))
    with e.loop("thread", threads, parallel=threads > 1):
        for size in buffers:
            pages = -(-size // PAGE)
            buffer = e.local("buffer", pages * PAGE // 4)
            with e.loop("page", pages) as page:
                e.store(buffer, x[i64(0)], page * (PAGE // 4))
    return e.function([x], [x], [])


def whole_pages(size: int) -> int:
    """Bytes of the pages that an allocation of so many can touch."""
    return -(-(size + HEADER) // PAGE) * PAGE


ALREADY_COMPACT: Final = tvm.transform.PassContext(disabled_pass=["s_tir.CompactBufferAllocation"])
"""For code of a module that was compacted."""


def _with_compact_buffers(module: IRModule) -> IRModule:
    passes = s_tir.transform
    return tvm.transform.Sequential(
        [
            passes.LowerInitBlock(),
            passes.PlanAndUpdateBufferAllocationLocation(),
            passes.ConvertBlocksToOpaque(),
            passes.CompactBufferAllocation(),
        ]
    )(module)


def _needed(function: tirx.PrimFunc, bounds: Mapping[str, int]) -> Sizes:
    """A kernel's buffers. TVM allocates all of them where the function, or a thread's part of it, begins."""
    found = _block_buffers(function)
    structural_walk(function.body, [(tirx.AllocBuffer, lambda own: found.append(own.buffer))])
    return tuple(sorted((_size(buffer, bounds) for buffer in found), reverse=True))


def _block_buffers(function: tirx.PrimFunc) -> list[Any]:
    """Buffers of blocks, as schedules have them: in memory or, of a tile, in registers."""
    found: list[Any] = []
    structural_walk(function.body, [(s_tir.SBlock, lambda block: found.extend(block.alloc_buffers))])
    return found


def _larger(one: Sizes, other: Sizes) -> Sizes:
    return tuple(map(max, zip_longest(one, other, fillvalue=0)))


def _size(buffer: Any, bounds: Mapping[str, int]) -> int:
    try:
        extents = [evaluate(dim, bounds) for dim in buffer.shape]
    except PlanningError as error:
        raise PlanningError(
            f"a kernel needs memory of its own, of no constant size, for {buffer.name}: {error}"
        ) from None
    return math.prod(extents) * element_bytes(str(buffer.dtype))
