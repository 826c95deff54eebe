"""What is run to measure a kernel: a Relax function for each size that calls it on operands out of cache."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from tvm import IRModule, relax, tirx

from kvc_passes.kernel_sets import TensorType

from ..kernels.attention import (
    AttentionShape,
    call_tile,
    choose_tile,
    decode_attention,
    decode_splits,
    extras,
    pools,
    prefill_attention,
)
from ..kernels.knobs import FewRows, ManyRows, ProductKnobs
from ..kernels.matmul import packed_matmul
from ..kernels.packing import packed_tensors
from ..kernels.traits import CpuTraits
from .space import knobs_of
from .tasks import Bucket, Task

Array = npt.NDArray[Any]
_COLD_BYTES: Final = 96 * 2**20
"""Operands of so many bytes together are out of every cache when their turn comes again."""
_MOST_COPIES: Final = 80


@dataclass(frozen=True)
class Operands:
    """What a kernel of one size is called with.

    Attributes:
        warm, cold: arguments by their order: those of all calls, and those that each call has of its own.
        results: the tensors that it writes, its last arguments; the last one is compared.
        order: names of the arguments, of `warm` and `cold`.
        streams: whether reading the cold operands is most of the work.
    """

    warm: dict[str, Array]
    cold: dict[str, TensorType]
    results: tuple[TensorType, ...]
    order: tuple[str, ...]
    streams: bool
    beyond: int = _COLD_BYTES
    """Bytes that no cache holds."""

    @property
    def copies(self) -> int:
        """How many of the cold operands there are."""
        if not self.streams:
            return 2
        # Not by workspaces, which parameters change: the default runs on the same copies.
        each = sum(_bytes(t) for t in [*self.cold.values(), self.results[-1]])
        return max(1, min(_MOST_COPIES, -(-self.beyond // max(each, 1))))


def _bytes(tensor: TensorType) -> int:
    return math.prod(tensor.shape) * {"float32": 4, "uint8": 1, "int8": 1}.get(tensor.dtype, 2)


def kernel_of(task: Task, values: Mapping[str, int], traits: CpuTraits) -> tirx.PrimFunc:
    """The kernel with these parameters."""
    knobs = knobs_of(task.kernel, values)
    if task.kernel in ("product_few", "product_many"):
        columns, depth, format = task.weight()
        few, many = (knobs, ManyRows()) if task.kernel == "product_few" else (FewRows(), knobs)
        most = max(b.rows for b in task.buckets) if task.kernel == "product_few" else None
        return packed_matmul(
            columns, depth, traits, format=format, max_rows=most, knobs=ProductKnobs(few, many)
        )
    shape = task.shape()
    if task.kernel == "decode":
        return decode_attention(shape, traits, knobs)
    return prefill_attention(shape, _tile(shape, knobs.tile, traits), traits, knobs.keys)


def _tile(shape: AttentionShape, tile: int, traits: CpuTraits) -> int:
    return tile or choose_tile(shape.group, traits, shape.head_dim)


def operands(task: Task, bucket: Bucket, values: Mapping[str, int], traits: CpuTraits) -> Operands:
    """Arguments of the kernel for one size; the same numbers whatever the parameters are."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> Array:
        return rng.standard_normal(shape, np.float32)

    if task.kernel in ("product_few", "product_many"):
        columns, depth, format = task.weight()
        weights = packed_tensors(columns, depth, format, traits.lanes)
        cold = {f"w{i}": tensor for i, tensor in enumerate(weights)}
        result = TensorType("float32", (1, bucket.rows, columns))
        streams = task.kernel == "product_few"
        return Operands({"x": normal(1, bucket.rows, depth)}, cold, (result,), ("x", *cold), streams)
    shape, knobs = task.shape(), knobs_of(task.kernel, values)
    tokens, length = bucket.rows, bucket.length
    sequences = sequences_of(tokens, length, task.kernel)
    table = pages_of(sequences, length, shape.page_size, rng)
    state = pools(shape, tirx.IntImm("int64", table.size))
    cold = {n: TensorType(str(p.dtype), tuple(int(d) for d in p.shape)) for n, p in state.items()}
    own, positions = queries_of(tokens, sequences, length, shape)
    more = {name: -np.abs(normal(int(each.shape[0]))) * 0.1 for name, each in extras(shape).items()}
    warm = {"q": normal(1, shape.heads, tokens, shape.query_dim), "positions": positions}
    result = TensorType("float32", (1, tokens, shape.heads, shape.value_dim))
    if task.kernel == "decode":
        splits = knobs.splits or decode_splits(shape.kv_heads, traits)
        part = TensorType("float32", (tokens, splits, shape.heads, shape.value_dim + 2))
        order = ("q", *cold, "positions", "table", *more)
        return Operands({**warm, "table": table, **more}, cold, (part, result), order, True)
    tile = knobs.tile or call_tile(_tile(shape, 0, traits), max(own), [(shape.group, shape.kv_heads)], traits)
    warm["tiles"] = tiles_of(own, tile)
    order = ("q", *cold, "positions", "tiles", "table", *more)
    return Operands({**warm, "table": table, **more}, cold, (result,), order, False)


def sequences_of(tokens: int, length: int, kernel: str) -> int:
    """Sequences of `length` keys that the query tokens of a call belong to."""
    return tokens if "decode" in kernel else max(1, -(-tokens // length))


def pages_of(sequences: int, length: int, page: int, rng: np.random.Generator) -> Array:
    """A block table as the allocator gives it where it can: a run of pages each, runs in any order."""
    width = -(-length // page)
    return (rng.permutation(sequences)[:, None] * width + np.arange(width)).astype(np.int32)


def queries_of(tokens: int, sequences: int, length: int, shape: AttentionShape) -> tuple[list[int], Array]:
    """How many of the tokens each sequence has, its last ones; and the positions of all."""
    own = [tokens * (i + 1) // sequences - tokens * i // sequences for i in range(sequences)]
    positions = np.concatenate([np.arange(length - count, length, dtype=np.int64) for count in own])
    return own, np.full_like(positions, length - 1) if shape.whole else positions


def tiles_of(own: list[int], tile: int) -> Array:
    """(table row, first token, tokens) of every tile of the sequences' tokens."""
    rows, first = [], 0
    for sequence, count in enumerate(own):
        rows += [(sequence, first + i, min(tile, count - i)) for i in range(0, count, tile)]
        first += count
    return np.array(rows, np.int32)


@lru_cache(maxsize=4)
def filled(tensor: TensorType) -> Array:
    """Numbers of about 1, or codes, of a type; bfloat16 as its bits, uint16."""
    rng = np.random.default_rng(1)
    if tensor.dtype in ("uint8", "int8"):
        return rng.integers(0, 100, tensor.shape, tensor.dtype)
    values = rng.standard_normal(tensor.shape, np.float32)
    if tensor.dtype == "bfloat16":
        return (values.view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(tensor.dtype)


def module_of(task: Task, values: Mapping[str, int], traits: CpuTraits) -> IRModule:
    """The functions of a CPU's kernel."""
    given = [operands(task, bucket, values, traits) for bucket in task.buckets]
    return functions(kernel_of(task, values, traits), given)


def functions(kernel: tirx.PrimFunc, sizes: Sequence[Operands]) -> IRModule:
    """A module with a function `size<i>` for each size: (warm operands, cold operands of every copy)."""
    builder = relax.BlockBuilder()
    called = builder.add_func(kernel, "kernel")
    for number, given in enumerate(sizes):
        warm = {n: relax.Var(n, relax.TensorType(a.shape, str(a.dtype))) for n, a in given.warm.items()}
        cold = [
            {n: relax.Var(f"{n}_{i}", relax.TensorType(t.shape, t.dtype)) for n, t in given.cold.items()}
            for i in range(given.copies)
        ]
        types = [relax.TensorType(r.shape, r.dtype) for r in given.results]
        params = [*warm.values(), *(v for each in cold for v in each.values())]
        with builder.function(f"size{number}", params):
            outputs = []
            for each in cold:
                arguments = [{**warm, **each}[name] for name in given.order]
                found = builder.emit(relax.call_tir(called, arguments, types if types[1:] else types[0]))
                outputs.append(
                    builder.emit(relax.TupleGetItem(found, len(types) - 1)) if types[1:] else found
                )
            builder.emit_func_output(relax.Tuple(outputs))
    return builder.get()
