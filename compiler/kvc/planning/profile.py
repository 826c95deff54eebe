"""Measures this machine's rates: every template once, at sizes that no cache holds."""

from __future__ import annotations

import datetime
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Final, cast

import numpy as np
import tvm
import tvm_ffi
from numpy.typing import NDArray
from tvm import IRModule, relax, runtime, tirx
from tvm.script import tirx as T

from kvc_passes.kernel_sets import TensorType
from kvc_passes.sites import StoredName
from kvc_passes.weight_format import FLOAT32, WeightFormat

from ..codegen.schedule_kernels import ScheduleKernels
from ..kernels.attention import (
    AttentionShape,
    choose_tile,
    decode_attention,
    decode_splits,
    pools,
    prefill_attention,
)
from ..kernels.emit import compiled
from ..kernels.matmul import packed_matmul
from ..kernels.packing import packed_tensors
from ..machine import CpuMachine
from ..runtime.host_memory import map_of, placed, storage, typed
from ..runtime.library import use_threads
from .rates import CODES, ROWS, Rates

_SIDE: Final = 4096
_FORMATS: Final = {
    32: FLOAT32,
    16: WeightFormat("float16"),
    8: WeightFormat("uint8", 32, "float16"),
    4: WeightFormat("uint4", 32, "float16"),
}
_PAGES: Final = 1024
_REPEATS: Final = 7
_CALLS: Final = 400
_LARGE: Final = 8
_CHAINS: Final = ((1, _CALLS, False), (32, _CALLS, False), (32, _CALLS, True), (512, _LARGE, True))
"""Rows, calls in a row and whether on all threads: next to nothing, a little in both ways, and a lot."""
Report = Callable[[str], None]


def profile(machine: CpuMachine, report: Report = lambda name: None) -> Rates:
    """The rates of the machine that this process runs on, in about a minute; takes 0.5 GB of memory.

    To be called before anything compiled runs in this process, which would settle how many threads run it.
    """
    traits = machine.products.traits
    use_threads(traits.threads)
    products = {}
    for bits, format in _FORMATS.items():
        report(f"products with weights of {bits} bits")
        products[bits] = _products(machine, format)
    report("attention over keys and values")
    grouped = AttentionShape(16, 4, 128, 128, 0.1)
    many = AttentionShape(32, 2, 128, 128, 0.1)  # so many queries share a key that memory does not decide
    plain = AttentionShape(8, 8, 128, 128, 0.1)
    shared = AttentionShape(12, 1, 768, 768, 0.1, shared=True)
    read = _decode(machine, plain)[0]
    attention = (_prefill(machine, grouped), _decode(machine, many)[1])
    report("attention over codes")
    codes = {}
    for name in CODES:
        coded = replace(plain, stored=cast(StoredName, name))
        slower = _prefill(machine, replace(grouped, stored=coded.stored)) / attention[0]
        codes[name] = (min(1.0, slower), min(1.0, _decode(machine, coded)[0] / read))
    report("attention over one key for all heads")
    of_shared = (_prefill(machine, shared), _decode(machine, shared)[1])
    report("other kernels")
    call, launch, element = _others(machine)
    today = datetime.datetime.now(datetime.UTC).date()
    return Rates(
        source=f"measured on this machine, {traits.threads} threads, {today}",
        read=max(read, _SIDE * _SIDE * 4 / (products[32][0] * _SIDE * _SIDE)),
        products=products,
        attention=attention,
        shared=of_shared,
        rebuild=2 / (products[32][-2] / ROWS[-2]),
        element=element,
        call=call,
        codes=codes,
        launch=launch,
    )


def _seconds(kernel: Any, arguments: Sequence[Any], calls: int = 1) -> float:
    """Seconds of one call: the median of several, since workloads meet the machine's slower moments, too."""
    kernel(*arguments)
    found = []
    for _ in range(_REPEATS):
        begin = time.perf_counter()
        for _ in range(calls):
            kernel(*arguments)
        found.append((time.perf_counter() - begin) / calls)
    return statistics.median(found)


def _tensor(type_: TensorType) -> Any:
    """Small numbers, or codes, or zeros, in memory like that of the runtime's pools."""
    return placed(tvm_ffi, _numbers(type_), type_.dtype)


def _weight(type_: TensorType) -> Any:
    """The same in a file that is mapped, like the runtime's weights."""
    with tempfile.TemporaryFile() as stream:
        stream.write(_numbers(type_).data)
        stream.flush()
        data = np.frombuffer(map_of(stream), np.uint8)
    return typed(tvm_ffi, data.view(storage(type_.dtype)).reshape(type_.shape), type_.dtype)


def _numbers(type_: TensorType) -> NDArray[Any]:
    """Small numbers, or codes, or zeros of a type that numpy lacks."""
    rng = np.random.default_rng(0)
    if type_.dtype == "bfloat16":
        return np.zeros(type_.shape, np.uint16)
    if type_.dtype.startswith("uint"):
        return rng.integers(0, 200, type_.shape, type_.dtype)
    return (rng.standard_normal(type_.shape, np.float32) * 0.1).astype(type_.dtype)


def _products(machine: CpuMachine, format: WeightFormat) -> tuple[float, ...]:
    """Seconds a weight and call for each of ROWS. Two weights in turn, so that no cache holds one."""
    traits = machine.products.traits
    kernel = compiled(packed_matmul(_SIDE, _SIDE, traits, format=format), machine.target)
    types = packed_tensors(_SIDE, _SIDE, format, traits.lanes)
    weights = [[_weight(t) for t in types] for _ in range(2)]
    found: list[float] = []
    for rows in ROWS:
        x, y = (_tensor(TensorType("float32", (1, rows, _SIDE))) for _ in range(2))

        def both(x: Any = x, y: Any = y) -> None:
            for each in weights:
                kernel(x, *each, y)

        seconds = _seconds(both, (), max(1, 8 // rows)) / 2 / _SIDE**2
        # No more than in parts, or noise would make slices of a chunk look faster than the whole.
        found.append(min([seconds, *(t * -(-rows // few) for t, few in zip(found, ROWS))]))
    return tuple(found)


def _state(shape: AttentionShape) -> list[Any]:
    return [
        _tensor(TensorType(str(p.dtype), tuple(int(n) for n in p.shape)))
        for p in pools(shape, tirx.IntImm("int64", _PAGES)).values()
    ]


def _decode(machine: CpuMachine, shape: AttentionShape) -> tuple[float, float]:
    """Bytes and operations a second of one token of each of 4 sequences that fill all pages."""
    traits, batch = machine.products.traits, 4
    splits = decode_splits(shape.kv_heads, traits)
    kernel, state = compiled(decode_attention(shape, traits), machine.target), _state(shape)
    width = _PAGES // batch
    length = width * shape.page_size
    table = np.arange(_PAGES, dtype=np.int32).reshape(batch, width)
    positions = np.full(batch, length - 1, np.int64)
    q = _tensor(TensorType("float32", (1, shape.heads, batch, shape.query_dim)))
    partial = _tensor(TensorType("float32", (batch, splits, shape.heads, shape.value_dim + 2)))
    out = _tensor(TensorType("float32", (1, batch, shape.heads, shape.value_dim)))
    given = (q, *state, runtime.tensor(positions), runtime.tensor(table), partial, out)
    seconds = _seconds(kernel, given)
    kept = sum(t.numpy().nbytes for t in state)
    return kept / seconds, 2 * shape.heads * (shape.query_dim + shape.value_dim) * length * batch / seconds


def _prefill(machine: CpuMachine, shape: AttentionShape) -> float:
    """Operations a second of the last 512 tokens of a sequence of 4096."""
    traits, tokens, length = machine.products.traits, 512, 4096
    tile = choose_tile(shape.group, traits, shape.head_dim)
    kernel, state = compiled(prefill_attention(shape, tile, traits), machine.target), _state(shape)
    tiles = np.array([(0, i, min(tile, tokens - i)) for i in range(0, tokens, tile)], np.int32)
    table = np.arange(length // shape.page_size, dtype=np.int32)[None]
    positions = np.arange(length - tokens, length, dtype=np.int64)
    q = _tensor(TensorType("float32", (1, shape.heads, tokens, shape.query_dim)))
    out = _tensor(TensorType("float32", (1, tokens, shape.heads, shape.value_dim)))
    given = (q, *state, *(runtime.tensor(a) for a in (positions, tiles, table)), out)
    pairs = tokens * (length - tokens / 2)
    return 2 * shape.heads * (shape.query_dim + shape.value_dim) * pairs / _seconds(kernel, given)


def _others(machine: CpuMachine) -> tuple[float, float, float]:
    """Seconds that a call takes when it does next to nothing, those that all threads take beside their share
    of the work, and bytes a second of a large one."""
    threads = machine.products.traits.threads
    nothing, alone, shared, large = (_chain(machine, *chain) for chain in _CHAINS)
    each = nothing[1] / _CALLS
    launch = max(0.0, shared[1] / _CALLS - each - max(0.0, alone[1] / _CALLS - each) / threads)
    rest = large[1] / _LARGE - each - launch
    return each, launch, max(nothing[0], large[0]) / max(rest, 1e-9)


def _chain(machine: CpuMachine, rows: int, calls: int, spread: bool) -> tuple[int, float]:
    """Bytes of one kernel, x * x + x of float32 [rows, 1024], and the seconds of `calls` in a row.

    spread: over all threads.
    """
    shape = (rows, 1024)

    @T.prim_func(private=True, s_tir=True)  # type: ignore[untyped-decorator]
    def kernel(a: T.handle, b: T.handle) -> None:
        x = T.match_buffer(a, shape)
        y = T.match_buffer(b, shape)
        for i, j in T.grid(*shape):
            with T.sblock("y"):
                v, w = T.axis.remap("SS", [i, j])
                y[v, w] = x[v, w] * T.float32(0.5) + x[v, w]

    builder = relax.BlockBuilder()
    variable = builder.add_func(kernel, "kernel")
    x = relax.Var("x", relax.TensorType(shape, "float32"))
    with builder.function("main", [x]):
        value: Any = x
        for _ in range(calls):
            value = builder.emit(relax.call_tir(variable, [value], relax.TensorType(shape, "float32")))
        builder.emit_func_output(value)
    module = ScheduleKernels(machine.target, spread).run(IRModule(builder.get().functions)).module
    executable = tvm.compile(module, machine.target)
    vm = relax.VirtualMachine(executable, tvm.cpu())
    given = runtime.tensor(np.ones(shape, np.float32))
    return 8 * math.prod(shape), _seconds(vm["main"], (given,))
