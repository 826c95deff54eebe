"""Calls the compiled functions: memory that lasts, and integer inputs built for each call.

Everything a call needs is allocated when the model is loaded: weights are mapped; page pools, inputs and
logits are allocated and touched; the largest call is run once for the temporaries. Later calls take no new
memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kvc.artifact import Artifact
from kvc.runtime.choices import choice_shapes, read_choices, write_draws
from kvc.runtime.device_memory import DeviceMemory
from kvc.runtime.encoder import EncoderCall, Inputs, encoder_shapes
from kvc.runtime.graphs import Key
from kvc.runtime.host_memory import HostMemory
from kvc.runtime.sampler import Choice, Draw, SamplingParams, choose
from kvc.runtime.sizes import input_shapes, pool_shapes
from kvc_passes.errors import InputError, PlanningError


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens of one sequence that a call computes."""

    tokens: Sequence[int]
    start: int
    """Position of the first token in its sequence."""
    pages: Sequence[Sequence[int]]
    """The sequence's pages in every group, by place, as far as its last token. What stands for pages that no
    token of the segment sees does not matter, as long as it is a page's number."""
    wanted: bool = True
    """Whether the logits after the last token are wanted."""
    memory: int = 0
    """Rows of the encoder's output that the sequence has, whose pages are those of a group of their own."""


class Memory(Protocol):
    """Where a model's tensors are, and how the inputs of a call get there."""

    vm: Any
    """The compiled functions by name."""
    arrays: dict[str, NDArray[Any]]
    """Inputs of the largest call, and the logits, on the host."""
    pools: list[Any]
    weights: list[Any]

    def give(self, name: str, count: int) -> Any:
        """The first `count` rows of an input as a tensor."""

    def place(self, name: str, count: int) -> Any:
        """The first `count` rows of what a function writes, as a tensor."""

    def take(self, name: str, count: int) -> NDArray[Any]:
        """What a function wrote there."""

    def shaped(self, name: str, shape: tuple[int, ...]) -> Any:
        """The first elements of an input of one dimension, as a tensor of another shape."""

    def read(self, tensor: Any, array: NDArray[Any]) -> None:
        """Copy a tensor into an array of the host, of its type and shape."""

    def run(self, function: Any, arguments: Sequence[Any], shape: Key | None) -> Any:
        """Call a function; calls of the same `shape` differ in nothing but what inputs hold.

        What it returns, if `shape` is None.
        """

    def close(self) -> None:
        """Release what is held beside memory."""


class Executor:
    """A loaded model at the level of tokens, positions and pages.

    Raises TargetError if this CPU or GPU cannot run the code, InputError if library or weights cannot be
    loaded or there is not enough memory. Calls must come from one thread: TVM starts a thread pool for each
    that calls.
    """

    def __init__(self, artifact: Artifact, *, threads: int | None = None, warm: bool = True) -> None:
        self.plan = artifact.plan
        self.facts = artifact.facts
        inputs = {
            **input_shapes(self.plan, self.facts),
            **encoder_shapes(self.plan, self.facts),
            "logits": ("float32", (self.plan.max_batch, self.facts.logits)),
        }
        pools = pool_shapes(self.plan, self.facts)
        self._memory: Memory
        self._on_device = self.plan.target["kind"] == "cuda"
        if self._on_device:
            inputs |= choice_shapes(self.plan.max_batch, self.facts.choices)
            self._memory = DeviceMemory(artifact, inputs, pools)
        else:
            self._memory = HostMemory(artifact, inputs, pools, threads)
        vm = self._memory.vm
        self._choose = vm["choose"] if self._on_device else None
        self._prefill, self._decode = vm["prefill"], vm["decode"]
        self._encode = vm["encode"] if self.facts.memory else None
        arrays = self._memory.arrays
        self._tokens, self._positions = arrays["tokens"], arrays["positions"]
        self._tiles, self._rows = arrays["tiles"], arrays["rows"]
        groups = list(enumerate(self.plan.groups))
        self._slot_names = [f"slots_{g}" for g, group in groups if not group.reach.memory]
        self._table_names = [f"table_{g}" for g, _ in groups]
        weights = dict(zip((spec.name for spec in artifact.layout()), self._memory.weights, strict=True))

        def state(function: str, pools: Sequence[Any]) -> tuple[Any, ...]:
            return (*pools, *(weights[name] for name in artifact.takes(function)))

        self._state = {name: state(name, self._memory.pools) for name in ("prefill", "decode")}
        if self.facts.memory:
            kept = pool_shapes(self.plan, self.facts, memory=True)
            of_memory = [pool for name, pool in zip(pools, self._memory.pools, strict=True) if name in kept]
            self._state["encode"] = state("encode", of_memory)
        self._encoder: EncoderCall | None = None
        if self.facts.encoder is not None:
            taken = [weights[name] for name in artifact.takes("encoder")]
            self._encoder = EncoderCall(self._memory, taken, self.plan, self.facts)
        if warm:
            try:
                self._run_largest()
            except ValueError as error:  # the library checks the shapes that it is given
                reason = str(error).strip().splitlines()[0]
                raise InputError(
                    f"{artifact.path}: library and weights do not fit ({reason}); compile it again"
                ) from None

    def prefill(self, segments: Sequence[Segment], *, take: bool = True) -> NDArray[np.float32]:
        """Compute segments of one or more sequences, each with its pages.

        Returns the logits after the last token of every segment that wants them, in order: float32
        [rows, facts.logits], a view that the next call overwrites. Without `take` they may be left where
        only `choose` finds them, and the numbers in the view be others. Raises InputError on a token id that
        the model does not have, PlanningError if the call is larger than planned.
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
        give = self._memory.give
        arguments = [
            *(give(name, count) for name in ("tokens", "positions", *self._slot_names)),
            give("tiles", tiles),
            *(give(name, len(segments)) for name in self._table_names),
            *self._last(count),
            give("rows", len(rows)),
            self._memory.place("logits", len(rows)),
            *self._state["prefill"],
        ]
        self._memory.run(self._prefill, arguments, None)
        return self._logits(len(wanted), take)

    def decode(self, segments: Sequence[Segment], *, take: bool = True) -> NDArray[np.float32]:
        """Compute the next token of each sequence: segments of one token.

        Returns float32 [len(segments), facts.logits], a view that the next call overwrites; `take` and
        errors as of prefill.
        """
        count = len(segments)
        if not 0 < count <= self.plan.max_batch or any(len(s.tokens) != 1 for s in segments):
            raise PlanningError(f"a decode of {count} sequences exceeds the plan")
        for sequence, segment in enumerate(segments):
            self._place(sequence, segment, sequence)
        self._check_tokens(count)
        names = ("tokens", "positions", *self._slot_names, *self._table_names)
        arguments = [
            *(self._memory.give(name, count) for name in names),
            *self._last(count),
            self._memory.place("logits", count),
            *self._state["decode"],
        ]
        self._memory.run(self._decode, arguments, ("decode", count))
        return self._logits(count, take)

    def choose(self, draws: Sequence[Draw]) -> list[Choice]:
        """The next token after each row of logits of the last call, which are used up."""
        count, memory = len(draws), self._memory
        if not self._on_device:
            return choose(memory.arrays["logits"][:count, : self.facts.choices], draws)
        write_draws(memory.arrays["draws"][:count], draws)
        arguments = [
            *(memory.place(name, count) for name in ("logits", "parts")),
            memory.give("draws", count),
            memory.place("chosen", count),
        ]
        memory.run(self._choose, arguments, ("choose", count))
        return read_choices(memory.take("chosen", count))

    def run_encoder(self, inputs: Inputs) -> NDArray[np.float32]:
        """The encoder's output, float32 [rows, facts.memory[0]], of a request's inputs (`checked_inputs`)."""
        assert self._encoder is not None
        return self._encoder(inputs)

    def encode(self, memory: NDArray[np.float32], pages: Sequence[int]) -> None:
        """Keep an encoder's output, float32 [rows, facts.memory[0]], in pages of the group that reads it.

        Raises PlanningError if the pages do not hold it.
        """
        size = self.plan.page_size
        if len(memory) > len(pages) * size:
            raise PlanningError(f"{len(memory)} rows of an encoder's output do not fit {len(pages)} pages")
        table, arrays = np.asarray(pages, dtype=np.int32), self._memory.arrays
        for first in range(0, len(memory), self.plan.chunk):
            part = memory[first : first + self.plan.chunk]
            count, places = len(part), np.arange(first, first + len(part))
            arrays["memory"][:count] = part
            arrays["memory_slots"][:count] = table[places // size] * size + places % size
            given = [self._memory.give(name, count) for name in ("memory", "memory_slots")]
            self._memory.run(self._encode, [*given, *self._state["encode"]], None)

    def close(self) -> None:
        """Release the memory. The executor cannot be used afterwards."""
        self._memory.close()
        self.__dict__.clear()

    def _place(self, sequence: int, segment: Segment, begin: int) -> None:
        """Write one segment's tokens from index `begin` on, and row `sequence` of the block tables."""
        size, end, arrays = self.plan.page_size, begin + len(segment.tokens), self._memory.arrays
        last = segment.start + len(segment.tokens)
        positions = self._positions[begin:end]
        positions[:] = np.arange(segment.start, last)
        self._tokens[begin:end] = segment.tokens
        for group, pages, name in zip(self.plan.groups, segment.pages, self._table_names, strict=True):
            table, reach = arrays[name][sequence], group.reach
            needed = segment.memory if reach.memory else last
            if needed > len(pages) * size or len(pages) > len(table) or begin == end or not needed:
                what = "rows" if reach.memory else "tokens"
                raise PlanningError(f"{needed} {what} of a sequence do not fit its {len(pages)} pages")
            table[: len(pages)] = np.asarray(pages, dtype=np.int32)
            table[len(pages) :] = 0
            if reach.memory:
                arrays["memory_last"][begin:end] = segment.memory - 1
            else:
                slots = name.replace("table", "slots")
                arrays[slots][begin:end] = table[positions // size] * size + positions % size

    def _logits(self, count: int, take: bool) -> NDArray[np.float32]:
        array: NDArray[np.float32] = self._memory.arrays["logits"][:count]
        return self._memory.take("logits", count) if take and count else array

    def _last(self, count: int) -> list[Any]:
        return [self._memory.give("memory_last", count)] if self.facts.memory else []

    def _check_tokens(self, count: int) -> None:
        tokens, vocab = self._tokens[:count], self.facts.vocab
        if tokens.min() < 0 or tokens.max() >= vocab:
            wrong = int(tokens[(tokens < 0) | (tokens >= vocab)][0])
            raise InputError(f"token id {wrong} does not exist: the model has 0 .. {vocab - 1}")

    def _run_largest(self) -> None:
        """Run the largest prefill and one decode, so that their temporaries are allocated and touched."""
        plan = self.plan
        least = min(group.pages for group in plan.groups if not group.reach.memory)
        rows = plan.max_memory
        of_memory = range(-(-rows // plan.page_size))
        if self._encoder is not None:
            self.run_encoder(self._encoder.largest())
        if self.facts.memory:
            self.encode(np.zeros((rows, self.facts.memory[0]), np.float32), of_memory)

        def pages(count: int) -> list[range]:
            own = range(-(-count // plan.page_size))
            return [of_memory if group.reach.memory else own for group in plan.groups]

        share = min(-(-plan.chunk // plan.max_batch), plan.max_context, least * plan.page_size)
        segments: list[Segment] = []
        left = plan.chunk
        while left and len(segments) < plan.max_batch:
            count = min(left, share)
            # Sequences may share pages here: the values mean nothing, and later tokens overwrite them.
            segments.append(Segment([0] * count, 0, pages(count), memory=rows))
            left -= count
        self.prefill(segments)
        self.decode([Segment([0], 0, pages(1), memory=rows)] * plan.max_batch)
        if self._on_device:  # its code is loaded, too
            self.choose([Draw(SamplingParams(), np.random.default_rng(0))] * plan.max_batch)
