"""Continuous batching: which tokens of which requests the next calls compute.

A step is at most one prefill call followed by one decode call. Requests are served in the order of arrival:
the oldest is never held up by a younger one, so every request that was accepted ends. When pages run out, the
youngest gives its pages up and is computed again later, from its prompt and the tokens it had chosen. Tokens
whose state other requests have computed before, and that is still there, are not computed again.
"""

from __future__ import annotations

import collections
import itertools
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvc.runtime.encoder import Inputs, as_array, checked_inputs, described
from kvc.runtime.requests import Counters, FinishReason, Request, Update
from kvc.runtime.sampler import Draw, SamplingParams
from kvc.runtime.sequences import Model, Sequences
from kvc.runtime.state import Kept
from kvc_passes.errors import Error, InputError


class Scheduler:
    """Runs requests on a model. `add` and `cancel` may be called from any thread, `step` from one only."""

    def __init__(self, model: Model, *, share: bool = True) -> None:
        """share: let requests that begin alike hold the same pages."""
        self.model = model
        self.plan = model.plan
        self.sequences = Sequences(model, share=share)
        self.state = self.sequences.state
        self.counters = Counters()
        self.limit = min(self.plan.max_context, model.facts.context or self.plan.max_context)
        """Most tokens of one sequence whose K and V are kept."""
        self._lock = threading.Lock()
        self._ids = itertools.count()
        self._requests: dict[int, Request] = {}
        self._waiting: collections.deque[Request] = collections.deque()
        self._running: list[Request] = []  # in the order of arrival
        self._updates: list[Update] = []  # of a step that is under way, or failed

    def add(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        eos: frozenset[int] = frozenset(),
        stopped: Callable[[int], bool] = lambda _: False,
        made: Callable[[Request], None] = lambda _: None,
        memory: NDArray[Any] | None = None,
        inputs: Mapping[str, Any] | None = None,
    ) -> Request:
        """Queue a request. Raises InputError if it cannot be served.

        made: called with the request before any step sees it. memory: the encoder's output [rows, d].
        inputs: instead, the encoder's inputs by name; it runs when the request gets pages. Neither is copied
        before that.
        """
        self.check(prompt)
        encoded, given = self.checked_memory(memory, inputs)
        stop_tokens = frozenset(params.stop_tokens) | (frozenset() if params.ignore_eos else eos)
        rng = np.random.default_rng(params.seed)
        with self._lock:
            request = Request(
                next(self._ids),
                [int(t) for t in prompt],
                len(prompt),
                params,
                stop_tokens,
                stopped,
                rng,
                encoded,
                given,
            )
            made(request)
            self._requests[request.id] = request
            self._waiting.append(request)
        return request

    def check(self, prompt: Sequence[int]) -> None:
        """Raise InputError if `prompt` cannot be served."""
        if not prompt:
            raise InputError("the prompt is empty: give at least one token")
        if len(prompt) > self.limit:
            raise InputError(
                f"the prompt has {len(prompt)} tokens; one request may have at most {self.limit}: "
                "shorten it, or compile the model for a workload with a longer context"
            )
        vocab = self.model.facts.vocab
        for token in prompt:
            if isinstance(token, bool) or not isinstance(token, (int, np.integer)):
                raise InputError(f"token ids are integers, not {token!r}")
            if not 0 <= token < vocab:
                raise InputError(f"token id {token} does not exist: the model has 0 .. {vocab - 1}")

    def checked_memory(
        self, memory: NDArray[Any] | None, inputs: Mapping[str, Any] | None = None
    ) -> tuple[NDArray[Any] | None, Inputs | None]:
        """An encoder's output [rows, d] or inputs, not copied. Raises InputError if they cannot be served."""
        facts, most = self.model.facts, self.plan.max_memory
        width, encoder = facts.memory, facts.encoder
        if width is None:
            if memory is not None or inputs is not None:
                raise InputError("the model reads no encoder's output: give none")
            return None, None
        if inputs is not None:
            if encoder is None:
                raise InputError(
                    f"the artifact has no encoder: compile it with --encoder, or give the encoder's output "
                    f"[rows, {width[0]}]"
                )
            if memory is not None:
                raise InputError("the encoder's output and its inputs were given: give one of them")
            return None, checked_inputs(inputs, self.plan, encoder)
        if memory is None:
            instead = f", or its inputs: {', '.join(map(described, encoder.inputs))}" if encoder else ""
            raise InputError(f"the model reads an encoder's output: give one of [rows, {width[0]}]{instead}")
        array = as_array(memory, "the encoder's output")
        if array.ndim == 3 and len(array) == 1:
            array = array[0]
        floats = array.dtype.kind == "f" or (np.can_cast(array.dtype, np.float32) and array.dtype.kind == "V")
        if array.ndim != 2 or array.shape[1] != width[0] or not floats:
            raise InputError(
                f"the encoder's output is {array.dtype} {list(array.shape)}; the model reads floats "
                f"[rows, {width[0]}]"
            )
        if not 0 < len(array) <= most:
            raise InputError(
                f"the encoder's output has {len(array)} rows; one request may have 1 to {most}: compile the "
                "model for a workload with more"
            )
        return array, None

    def cancel(self, id: int) -> bool:
        """End a request with the next step; False if it has ended or never was."""
        with self._lock:
            request = self._requests.get(id)
            if request:
                request.cancelled = True
        return request is not None

    @property
    def waiting(self) -> int:
        """Requests that hold no pages."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests that hold pages."""
        return len(self._running)

    @property
    def utilization(self) -> tuple[float, ...]:
        """How full the pages in use are, of every group."""
        return self.state.utilization([r.kept for r in self._running if r.kept is not None])

    @property
    def busy(self) -> bool:
        """Whether a request has not ended."""
        return bool(self._requests)

    def step(self) -> list[Update]:
        """Compute one prefill and one decode call, as far as there is work; what became of the requests."""
        self._updates += self.drop_cancelled()
        self._admit()
        ready = [r for r in self._running if r.decodes]
        self._prefill_step()
        self._decode_step(ready)
        updates, self._updates = self._updates, []
        return updates

    def drop_cancelled(self) -> list[Update]:
        """End the requests that were cancelled, without computing anything."""
        with self._lock:
            dropped = [r for r in self._requests.values() if r.cancelled]
        return [self._finish(request, "cancelled") for request in dropped]

    def _admit(self) -> None:
        """Give pages to waiting requests in order, as long as there are places and pages."""
        while self._waiting and len(self._running) < self.plan.max_batch:
            request = self._waiting[0]  # other threads add behind it only
            if request.inputs is not None:
                request.memory, request.inputs = self.model.run_encoder(request.inputs), None
            rows = None if request.memory is None else np.ascontiguousarray(request.memory, np.float32)
            request.memory = rows
            with self._lock:
                request.kept = self.state.open(request.tokens, request.names, rows)
                shared = self.state.join(request.kept)
                running = [r.kept for r in self._running if r.kept is not None]
                if not self.state.admit(request.kept, min(request.longest, self.limit), running):
                    self.state.close(request.kept)
                    request.kept = None
                    return
                self.counters.shared_tokens += shared
                request.started = request.started or time.perf_counter()
                self._waiting.popleft()
                self._running.append(request)  # younger than all that run

    def _prefill_step(self) -> None:
        """One call over the tokens that are not computed yet, the oldest requests first.

        Who begins with pages that an older request computes in this call waits, and shares them in the next.
        """
        parts: list[tuple[Kept, int]] = []
        served: list[Request] = []
        budget, coming = self.plan.chunk, set[bytes]()
        for request in list(self._running):
            kept = request.kept
            if kept is None or request.decodes or not budget:
                continue
            self.counters.shared_tokens += self.state.join(kept)
            if self.state.next_page(kept) in coming:
                continue
            count = self._make_room(request, min(len(request.tokens) - kept.length, budget))
            if count:
                coming.update(self.state.filled(kept, count))
                parts.append((kept, count))
                served.append(request)
                budget -= count
        if not parts:
            return
        begin = time.perf_counter()
        self.sequences.prefill(parts, ends=True, take=False)
        self.counters.prefill_seconds += time.perf_counter() - begin
        self.counters.prefill_tokens += sum(count for _, count in parts)
        complete = [request for request in served if request.computed == len(request.tokens)]
        self._choose_all(complete)

    def _decode_step(self, ready: list[Request]) -> None:
        """One call that computes the newest token of every request that is past its prompt."""
        ready = [r for r in ready if self._make_room(r, 1)]  # the oldest first: it takes from the youngest
        if not ready:
            return
        begin = time.perf_counter()
        self.sequences.decode([r.kept for r in ready if r.kept is not None], take=False)
        self.counters.decode_seconds += time.perf_counter() - begin
        self.counters.decode_tokens += len(ready)
        self._choose_all(ready)

    def _make_room(self, request: Request, tokens: int) -> int:
        """See that `request` has pages for its next `tokens`, at the cost of the youngest if need be.

        Returns for how many it has: the youngest itself waits, or goes on with what is free.
        """
        while request.kept is not None:
            if self.state.extend(request.kept, tokens, min(request.longest, self.limit)):
                return tokens
            if self._running[-1] is request:
                tokens = min(tokens, self.state.room(request.kept))
                if tokens <= 0:
                    return 0
            else:
                self._preempt(self._running[-1])
        return 0

    def _preempt(self, request: Request) -> None:
        assert request.kept is not None
        self.state.close(request.kept)
        request.kept = None
        self._running.remove(request)
        self.counters.preemptions += 1
        with self._lock:
            self._waiting.appendleft(request)  # older than all that wait

    def _choose_all(self, requests: Sequence[Request]) -> None:
        """Choose the next token of each, whose logits are those of the last call, in order.

        Where that fails for some, they are computed again later; the first reason is raised.
        """
        left, failed = list(requests), list[Error]()
        try:
            draws = [Draw(request.params, request.rng) for request in requests]
            for request, choice in zip(requests, self.model.choose(draws) if draws else (), strict=True):
                if isinstance(choice, Error):
                    failed.append(choice)
                else:
                    self._updates.append(self._chosen(request, choice))
                    left.remove(request)
        finally:
            for request in reversed(left):  # the youngest first, so that the oldest waits in front
                self._preempt(request)
        if failed:
            raise failed[0]

    def _chosen(self, request: Request, token: int) -> Update:
        """Keep the next token of a request and see whether it ends."""
        request.tokens.append(token)
        if request.first_token is None:
            request.first_token = time.perf_counter()
        chosen = len(request.tokens) - request.prompt_length
        if token in request.stop_tokens or request.stopped(token):
            return self._finish(request, "stop", token)
        if chosen >= request.params.max_new_tokens:
            return self._finish(request, "length", token)
        if len(request.tokens) > self.limit:
            return self._finish(request, "context", token)
        return Update(request, token, None)

    def _finish(self, request: Request, reason: FinishReason, token: int | None = None) -> Update:
        request.finish_reason = reason
        request.finished = time.perf_counter()
        with self._lock:
            del self._requests[request.id]
            if request.kept is None:
                self._waiting.remove(request)
        if request.kept is not None:
            self.state.close(request.kept)
            request.kept = None
            self._running.remove(request)
        request.memory = request.inputs = None  # whoever made the request may hold it for long
        return Update(request, token, reason)
