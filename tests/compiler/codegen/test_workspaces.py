"""Local buffers of kernels: what is counted, and what a process takes."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
from tvm import IRModule, s_tir, tirx

from kvc.codegen.workspaces import PAGE, pool_bytes, thread_buffers, whole_pages
from kvc.kernels.emit import Emitter, argument, f32, i64
from kvc_passes.errors import PlanningError


def thread_bytes(modules: list[IRModule]) -> int:
    return pool_bytes(thread_buffers(modules))


def module(*kernels: tirx.PrimFunc) -> IRModule:
    return IRModule({f"kernel{i}": kernel for i, kernel in enumerate(kernels)})


def kernel(*sizes: int | list[int]) -> tirx.PrimFunc:
    """Writes into local buffers of so many bytes; those of a list stand in a loop of their own."""
    e, out = Emitter(), argument("out", (4,))

    def fill(bytes_: int) -> None:
        buffer = e.local("buffer", bytes_ // 4)
        with e.loop("i", bytes_ // 4) as i:
            e.store(buffer, out[i64(0)], i)
        e.store(out, buffer[tirx.Cast("int64", out[i64(1)])], i64(2))

    for size in sizes:
        if isinstance(size, int):
            fill(size)
            continue
        with e.loop("o", 2):
            for each in size:
                fill(each)
    return e.function([out], [out], [out])


def test_all_buffers_of_a_kernel_count_wherever_they_stand() -> None:
    large, small = 1 << 20, 1 << 18
    assert thread_bytes([module(kernel(large, small))]) == whole_pages(large) + whole_pages(small)
    assert thread_bytes([module(kernel(small, [large], [small]))]) == (
        whole_pages(large) + 2 * whole_pages(small)
    )


def test_of_several_kernels_the_largest_buffers_count_one_for_one() -> None:
    sizes = (3 << 20,), (2 << 20, 1 << 20)
    found = thread_bytes([module(kernel(*sizes[0])), module(kernel(*sizes[1]))])
    assert found == whole_pages(3 << 20) + whole_pages(1 << 20)
    assert thread_bytes([]) == 0


def test_a_small_buffer_takes_a_page() -> None:
    assert thread_bytes([module(kernel(64))]) == PAGE
    assert thread_bytes([module(kernel(PAGE))]) == 2 * PAGE


def test_buffers_of_generated_functions_are_as_large_as_where_they_are_used() -> None:
    """A value computed row by row: one row, once its buffer is compacted."""
    x = argument("x", (256, 1024))
    y, between = argument("y", (256, 1024)), tirx.decl_buffer((256, 1024), "float32", "between")

    def block(name: str, i: tirx.Var, write: tirx.Buffer, value: tirx.Buffer) -> tirx.Stmt:
        j = tirx.Var(f"j_{name}", "int64")
        axes = [tirx.Var(f"v_{name}{n}", "int64") for n in range(2)]
        iters = [
            tirx.IterVar(s_range(size), axis, tirx.IterVar.DataPar) for size, axis in zip((256, 1024), axes)
        ]
        point = [(s_range(1, axis)) for axis in axes]
        body = tirx.BufferStore(write, value[axes[0], axes[1]] * f32(2), axes)
        inner = s_tir.SBlock(
            iters, [tirx.BufferRegion(value, point)], [tirx.BufferRegion(write, point)], name, body
        )
        realized = s_tir.SBlockRealize([i, j], tirx.const(True, "bool"), inner)
        return tirx.For(j, i64(0), i64(1024), tirx.ForKind.SERIAL, realized)

    def s_range(size: int, start: object = 0) -> object:
        from tvm.ir import Range

        return Range.from_min_extent(start if not isinstance(start, int) else i64(start), i64(size))

    i = tirx.Var("i", "int64")
    rows = tirx.SeqStmt([block("first", i, between, x), block("second", i, y, between)])
    loop = tirx.For(i, i64(0), i64(256), tirx.ForKind.SERIAL, rows)
    root = s_tir.SBlock([], [], [], "root", loop, alloc_buffers=[between])
    function = tirx.PrimFunc([x, y], s_tir.SBlockRealize([], tirx.const(True, "bool"), root))
    found = thread_bytes([module(function.with_attr("s_tir", True))])
    assert found == whole_pages(4 * 1024)


def test_a_buffer_of_no_constant_size_is_refused() -> None:
    e, n = Emitter(), tirx.Var("n", "int64")
    out = argument("out", (n,))
    buffer = tirx.decl_buffer([n], "float32", "rows", scope="local")
    e.add(tirx.AllocBuffer(buffer))
    e.store(buffer, f32(1), i64(0))
    with pytest.raises(PlanningError, match="of no constant size, for rows"):
        thread_bytes([module(e.function([out], [], [out]))])


MEASURE = """
import itertools, resource, sys
sys.path[:0] = {path!r}
import numpy as np
from tvm import runtime
from kvc.kernels.emit import compiled
from kvc.codegen.workspaces import pool_bytes, reserve, thread_buffers
from kvc.targets import parse_target
from {module} import kernel, module

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

target = parse_target("cpu").target
kernels = [kernel(*each) for each in {sizes}]
buffers = thread_buffers([module(each) for each in kernels])
small, take = compiled(kernel(64), target), compiled(reserve(buffers, 1), target)
ready = [compiled(each, target) for each in kernels]
out = runtime.tensor(np.zeros(4, np.float32))
small(out)
before = resident()
take(runtime.tensor(np.zeros(1, np.float32)))
taken = resident() - before
for order in itertools.permutations(ready):
    for each in order:
        each(out)
print(taken, resident() - before, pool_bytes(buffers))
"""


def test_a_process_takes_what_is_counted_at_once_and_in_any_order() -> None:
    mib = 1 << 20
    sizes = [(64 * mib,), (48 * mib, 32 * mib), (32 * mib, 40 * mib), ([40 * mib], [8 * mib, 16 * mib])]
    program = textwrap.dedent(MEASURE).format(path=sys.path, module=__name__, sizes=sizes)
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    taken, in_the_end, counted = map(int, run.stdout.split()[-3:])
    assert counted == sum(whole_pages(size * mib) for size in (64, 32, 8))
    assert counted - mib < taken <= in_the_end < counted + mib
