"""What a CPU can do at most: multiply-adds that stay in registers, and memory that is only read."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import tvm_ffi
from tvm import runtime

from kvc.kernels.emit import Emitter, argument, compiled, f32, i64, splat, vec
from kvc.machine import CpuMachine
from kvc.runtime.host_memory import placed

_CHAINS = 12
"""Independent sums: more than the latency of a multiply-add times the units for it."""


def flops(machine: CpuMachine, steps: int = 2_000_000) -> float:
    """float32 operations a second of multiply-adds on all threads, the best of 5."""
    traits = machine.products.traits
    lanes, e = traits.lanes, Emitter()
    x, out = argument("x", (2,)), argument("out", (traits.threads, _CHAINS * lanes))
    with e.loop("c", traits.threads, parallel=traits.threads > 1) as c:
        acc = e.local("acc", _CHAINS * lanes)
        for i in range(_CHAINS):
            e.store(acc, splat(f32(i), lanes), vec(i64(i * lanes), lanes))
        factor = e.bind("factor", splat(x[i64(0)], lanes))
        term = e.bind("term", splat(x[i64(1)], lanes))
        with e.loop("s", steps):
            for i in range(_CHAINS):
                at = vec(i64(i * lanes), lanes)
                e.store(acc, acc[at] * factor + term, at)
        for i in range(_CHAINS):
            at = vec(i64(i * lanes), lanes)
            e.store(out, acc[at], c, at)
    kernel = compiled(e.function([x, out], [x], [out]), machine.target)
    given = [np.array([0.5, 1.0], np.float32), np.zeros((traits.threads, _CHAINS * lanes), np.float32)]
    seconds = _fastest(kernel, [runtime.tensor(a) for a in given])
    return 2.0 * lanes * _CHAINS * steps * traits.threads / seconds


def read_bytes(machine: CpuMachine, size: int = 2**28) -> float:
    """Bytes a second of summing up `size` bytes on all threads, the best of several streams a thread."""
    return max(_read_bytes(machine, size, streams) for streams in (1, 2, 4, 8))


def _read_bytes(machine: CpuMachine, size: int, streams: int) -> float:
    traits = machine.products.traits
    lanes, e, sums = traits.lanes, Emitter(), 8
    count = size // 4 // traits.threads // streams
    x, out = argument("x", (traits.threads, streams, count)), argument("out", (traits.threads, sums * lanes))
    with e.loop("c", traits.threads, parallel=traits.threads > 1) as c:
        acc = e.local("acc", sums * lanes)
        for i in range(sums):
            e.store(acc, splat(f32(0), lanes), vec(i64(i * lanes), lanes))
        each = sums // streams
        with e.loop("s", count // (each * lanes)) as s:
            for i in range(sums):
                at, stream, place = vec(i64(i * lanes), lanes), i // each, i % each
                value = x[c, i64(stream), vec(s * (each * lanes) + place * lanes, lanes)]
                e.store(acc, acc[at] + value, at)
        for i in range(sums):
            at = vec(i64(i * lanes), lanes)
            e.store(out, acc[at], c, at)
    kernel = compiled(e.function([x, out], [x], [out]), machine.target)
    given = [
        np.ones((traits.threads, streams, count), np.float32),
        np.zeros((traits.threads, sums * lanes), np.float32),
    ]
    return size / _fastest(kernel, [placed(tvm_ffi, a, "float32") for a in given])


def _fastest(kernel: Any, arguments: list[Any]) -> float:
    kernel(*arguments)
    found = []
    for _ in range(5):
        begin = time.perf_counter()
        kernel(*arguments)
        found.append(time.perf_counter() - begin)
    return min(found)
