"""Calls the compiled functions: memory that lasts, and integer inputs built for each call.

Everything a call needs is allocated when the model is loaded: weights are mapped; page pools, inputs and
logits are allocated and touched; the largest call is run once for the temporaries. Later calls take no new
memory.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from kvc.artifact import Artifact
from kvc.runtime.library import check_cpu, load_runtime, load_vm, thread_count
from kvc.weights_file import ALIGNMENT, TensorSpec, numpy_dtype
from kvc_passes.errors import InputError, PlanningError
from kvc_passes.facts import ModelFacts, Plan

_MADV_POPULATE_READ: Final = 22  # Linux 5.14; maps pages without breaking their sharing with the page cache


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens of one sequence that a call computes."""

    tokens: Sequence[int]
    start: int
    """Position of the first token in its sequence."""
    pages: Sequence[int]
    """The sequence's pages, at least those of positions 0 .. start + len(tokens) - 1."""
    wanted: bool = True
    """Whether the logits after the last token are wanted."""


def input_shapes(plan: Plan) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of the integer inputs of the largest call."""
    tokens = max(plan.chunk, plan.max_batch)
    return {
        "tokens": ("int64", (tokens,)),
        "positions": ("int64", (tokens,)),
        "slots": ("int32", (tokens,)),
        "tiles": ("int32", (plan.max_tiles, 3)),
        "table": ("int32", (plan.max_batch, plan.table_width)),
        "rows": ("int32", (plan.max_batch,)),
    }


def table_bytes(plan: Plan) -> int:
    """Bytes that the integer inputs of the largest call take (Bytes.tables)."""
    return sum(_padded(dtype, shape) for dtype, shape in input_shapes(plan).values())


def logits_bytes(plan: Plan, facts: ModelFacts) -> int:
    """Bytes of the logits of the most rows that one call returns (a part of Bytes.outputs)."""
    return _padded("float32", (plan.max_batch, facts.logits))


def pool_bytes(plan: Plan, facts: ModelFacts) -> int:
    """Bytes of the page pools as they are allocated (Bytes.pools)."""
    return sum(_padded(dtype, shape) for dtype, shape in _pools(plan, facts))


class Executor:
    """A loaded model at the level of tokens, positions and pages.

    Raises TargetError if this CPU cannot run the code, InputError if library or weights cannot be loaded or
    there is not enough memory. Calls must come from one thread: TVM starts a thread pool for each that calls.
    """

    def __init__(self, artifact: Artifact, *, threads: int | None = None, warm: bool = True) -> None:
        check_cpu(artifact.plan.target)
        self.plan = artifact.plan
        self.facts = artifact.facts
        threads = threads or thread_count(self.plan.target)
        self._ffi = load_runtime(threads)
        self._vm = load_vm(artifact.path / "model.so", threads)
        self._prefill, self._decode = self._vm["prefill"], self._vm["decode"]
        inputs = input_shapes(self.plan).values()
        logits = (self.plan.max_batch, self.facts.logits)
        region = _Region(table_bytes(self.plan) + logits_bytes(self.plan, self.facts))
        self._tokens, self._positions, self._slots, self._tiles, self._table, self._rows = (
            region.array(dtype, shape) for dtype, shape in inputs
        )
        self._logits = region.array("float32", logits)
        region = _Region(pool_bytes(self.plan, self.facts))
        pages = [
            self._typed(region.array(_storage(dtype), shape), dtype)
            for dtype, shape in _pools(self.plan, self.facts)
        ]
        weights = self._map(artifact.path / "weights.safetensors", artifact.layout())
        self._state = (*pages, *weights)
        if warm:
            try:
                self._run_largest()
            except ValueError as error:  # the library checks the shapes that it is given
                reason = str(error).strip().splitlines()[0]
                raise InputError(
                    f"{artifact.path}: library and weights do not fit ({reason}); compile it again"
                ) from None

    def prefill(self, segments: Sequence[Segment]) -> NDArray[np.float32]:
        """Compute segments of one or more sequences, each with its pages.

        Returns the logits after the last token of every segment that wants them, in order: float32
        [rows, facts.logits], a view that the next call overwrites. Raises InputError on a token id that the
        model does not have, PlanningError if the call is larger than planned.
        """
        plan = self.plan
        if not 0 < len(segments) <= plan.max_batch or sum(len(s.tokens) for s in segments) > plan.chunk:
            raise PlanningError(f"a prefill of {len(segments)} segments exceeds the plan")
        ends = np.cumsum([len(s.tokens) for s in segments])
        tiles = 0
        for sequence, (segment, end) in enumerate(zip(segments, ends, strict=True)):
            begin = int(end) - len(segment.tokens)
            self._place(sequence, segment, begin)
            for first in range(begin, int(end), plan.tile):
                self._tiles[tiles] = sequence, first, min(plan.tile, int(end) - first)
                tiles += 1
        wanted = [int(end) - 1 for segment, end in zip(segments, ends, strict=True) if segment.wanted]
        rows = wanted or [int(ends[-1]) - 1]  # a call has at least one row
        self._rows[: len(rows)] = rows
        count = int(ends[-1])
        self._check_tokens(count)
        self._prefill(
            *self._slices(self._tokens[:count], self._positions[:count], self._slots[:count]),
            *self._slices(self._tiles[:tiles], self._table[: len(segments)], self._rows[: len(rows)]),
            *self._slices(self._logits[: len(rows)]),
            *self._state,
        )
        return self._logits[: len(wanted)]

    def decode(self, segments: Sequence[Segment]) -> NDArray[np.float32]:
        """Compute the next token of each sequence: segments of one token.

        Returns float32 [len(segments), facts.logits], a view that the next call overwrites. Raises as
        prefill does.
        """
        count = len(segments)
        if not 0 < count <= self.plan.max_batch or any(len(s.tokens) != 1 for s in segments):
            raise PlanningError(f"a decode of {count} sequences exceeds the plan")
        for sequence, segment in enumerate(segments):
            self._place(sequence, segment, sequence)
        self._check_tokens(count)
        self._decode(
            *self._slices(self._tokens[:count], self._positions[:count], self._slots[:count]),
            *self._slices(self._table[:count], self._logits[:count]),
            *self._state,
        )
        return self._logits[:count]

    def close(self) -> None:
        """Release the memory. The executor cannot be used afterwards."""
        self.__dict__.clear()

    def _place(self, sequence: int, segment: Segment, begin: int) -> None:
        """Write one segment's tokens from index `begin` on, and row `sequence` of the block table."""
        size, end = self.plan.page_size, begin + len(segment.tokens)
        last = segment.start + len(segment.tokens)
        table = self._table[sequence]
        if last > len(segment.pages) * size or len(segment.pages) > len(table) or begin == end:
            raise PlanningError(f"{last} tokens of a sequence do not fit its {len(segment.pages)} pages")
        table[: len(segment.pages)] = np.array(segment.pages, dtype=np.int32)
        table[len(segment.pages) :] = 0
        positions = self._positions[begin:end]
        positions[:] = np.arange(segment.start, last)
        self._tokens[begin:end] = segment.tokens
        self._slots[begin:end] = table[positions // size] * size + positions % size

    def _check_tokens(self, count: int) -> None:
        tokens, vocab = self._tokens[:count], self.facts.vocab
        if tokens.min() < 0 or tokens.max() >= vocab:
            wrong = int(tokens[(tokens < 0) | (tokens >= vocab)][0])
            raise InputError(f"token id {wrong} does not exist: the model has 0 .. {vocab - 1}")

    def _slices(self, *arrays: NDArray[Any]) -> list[Any]:
        return [self._ffi.from_dlpack(array) for array in arrays]

    def _tensor(self, array: NDArray[Any]) -> Any:
        return self._ffi.from_dlpack(array, require_alignment=ALIGNMENT, require_contiguous=True)

    def _map(self, file: Path, layout: Sequence[TensorSpec]) -> list[Any]:
        """The weights as tensors over a memory map, without a copy."""
        if not layout:
            return []
        with file.open("rb") as stream:
            # Private, since numpy exports no read-only memory: nobody writes, so all pages stay shared.
            mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
        with contextlib.suppress(OSError):
            mapped.madvise(_MADV_POPULATE_READ)
        data = np.frombuffer(mapped, dtype=np.uint8)
        tensors = []
        for spec in layout:
            raw = data[spec.offset : spec.offset + spec.bytes].view(_storage(spec.dtype))
            tensors.append(self._typed(raw.reshape(spec.shape), spec.dtype))
        return tensors

    def _typed(self, array: NDArray[Any], dtype: str) -> Any:
        """An array of `_storage(dtype)` as a tensor of `dtype`."""
        tensor = self._tensor(array)
        if dtype != "bfloat16":
            return tensor
        view = self._ffi.get_global_func("runtime.TVMTensorCreateView")
        return view(tensor, self._ffi.Shape(array.shape), self._ffi.dtype(dtype), 0)

    def _run_largest(self) -> None:
        """Run the largest prefill and one decode, so that their temporaries are allocated and touched."""
        plan = self.plan
        share = min(-(-plan.chunk // plan.max_batch), plan.max_context, plan.pages * plan.page_size)
        segments: list[Segment] = []
        left = plan.chunk
        while left and len(segments) < plan.max_batch:
            count = min(left, share)
            # Sequences may share pages here: the values mean nothing, and later tokens overwrite them.
            segments.append(Segment([0] * count, 0, range(-(-count // plan.page_size))))
            left -= count
        self.prefill(segments)
        self.decode([Segment([0], 0, [0])] * plan.max_batch)


class _Region:
    """Zeroed memory, page-aligned and touched, cut into arrays on 64-byte boundaries."""

    def __init__(self, size: int) -> None:
        try:
            memory = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise InputError(f"{size} bytes of memory cannot be had ({error.strerror})") from None
        with contextlib.suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)  # stays within the region, so it costs nothing
        self._data = np.frombuffer(memory, dtype=np.uint8)
        self._data[:: mmap.PAGESIZE] = 0
        self._used = 0

    def array(self, dtype: str | np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
        """The next array of the region."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        array = self._data[self._used : self._used + size].view(dtype).reshape(shape)
        self._used += -(-size // ALIGNMENT) * ALIGNMENT
        return array


def _pools(plan: Plan, facts: ModelFacts) -> list[tuple[str, tuple[int, ...]]]:
    """Dtypes and shapes of k_0 .. k_{L-1}, v_0 .. v_{L-1}."""
    page, pages = plan.page_size, plan.pages
    keys = [(s.kv_dtype, (pages, s.kv_heads, s.head_dim, page)) for s in facts.sites]
    return [*keys, *((s.kv_dtype, (pages, s.kv_heads, page, s.value_dim)) for s in facts.sites)]


def _storage(dtype: str) -> np.dtype[Any]:
    """What numpy holds a dtype in: it exports bfloat16 under no name that DLPack has."""
    return np.dtype(np.uint16) if dtype == "bfloat16" else np.dtype(numpy_dtype(dtype))


def _padded(dtype: str, shape: tuple[int, ...]) -> int:
    return -(-math.prod(shape) * _storage(dtype).itemsize // ALIGNMENT) * ALIGNMENT
