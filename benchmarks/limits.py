"""What a CPU can do at most: arithmetic that stays in registers, and memory that is only read."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm_ffi
from tvm import runtime

from kvc.kernels import vector_math
from kvc.kernels.emit import Emitter, argument, compiled, f32, i64, splat, vec
from kvc.machine import CpuMachine
from kvc.runtime.host_memory import placed

_CHAINS = 12
"""Independent sums: more than the latency of a multiply-add times the units for it."""


@dataclass(frozen=True)
class Limits:
    """What a machine did at most.

    Attributes:
        flops: float32 operations a second of multiply-adds.
        exponentials: elements a second of the polynomial that softmax takes.
        read: bytes a second.
    """

    flops: float
    exponentials: float
    read: float


class Bench:
    """Measures the limits of all threads again and again: those of a shared machine drift."""

    def __init__(self, machine: CpuMachine, size: int = 2**28, steps: int = 400_000) -> None:
        self._flops = _arithmetic(machine, steps, _multiply_add)
        self._exponentials = _arithmetic(machine, steps // 8, _exponential)
        streams = [_reading(machine, size, count) for count in (1, 2, 4, 8)]
        self._read = max(streams, key=lambda rate: max(rate() for _ in range(5)))
        self.found: list[Limits] = []

    def measure(self) -> Limits:
        """All three, each the best of three times, in about a tenth of a second."""
        rates = (self._flops, self._exponentials, self._read)
        self.found.append(Limits(*(max(rate() for _ in range(3)) for rate in rates)))
        return self.found[-1]


def median(limits: Sequence[Limits]) -> Limits:
    """The median of each."""
    return Limits(*(statistics.median(v) for v in zip(*((x.flops, x.exponentials, x.read) for x in limits))))


Step = Callable[[Emitter, Any, Any, Any], Any]


def _multiply_add(e: Emitter, value: Any, factor: Any, term: Any) -> Any:
    return value * factor + term


def _exponential(e: Emitter, value: Any, factor: Any, term: Any) -> Any:
    return vector_math.exp2_nonpositive(e.bind, value * factor)


def _arithmetic(machine: CpuMachine, steps: int, step: Step) -> Callable[[], float]:
    """Measures operations of multiply-adds, or elements, a second, of independent chains on all threads."""
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
                e.store(acc, step(e, acc[at], factor, term), at)
        for i in range(_CHAINS):
            at = vec(i64(i * lanes), lanes)
            e.store(out, acc[at], c, at)
    kernel = compiled(e.function([x, out], [x], [out]), machine.target)
    numbers = [-0.5, 1.0] if step is _exponential else [0.5, 1.0]
    given = [np.array(numbers, np.float32), np.zeros((traits.threads, _CHAINS * lanes), np.float32)]
    count = (1.0 if step is _exponential else 2.0) * lanes * _CHAINS * steps * traits.threads
    return _rate(kernel, [runtime.tensor(a) for a in given], count)


def _reading(machine: CpuMachine, size: int, streams: int) -> Callable[[], float]:
    """Measures bytes a second of summing up `size` bytes on all threads, in several streams a thread."""
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
    return _rate(kernel, [placed(tvm_ffi, a, "float32") for a in given], size)


def _rate(kernel: Any, arguments: list[Any], count: float) -> Callable[[], float]:
    kernel(*arguments)

    def rate() -> float:
        begin = time.perf_counter()
        kernel(*arguments)
        return count / (time.perf_counter() - begin)

    return rate
