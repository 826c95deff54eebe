"""A loaded model with requests: what `kvc run` and Python programs use."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Unpack

from numpy.typing import NDArray

from kvc.runtime.answers import (
    Completion,
    EncoderInputs,
    Event,
    OnToken,
    Prompt,
    Sampling,
    Stats,
    completion_of,
    params_of,
    sources_of,
)
from kvc.runtime.requests import Request, Update
from kvc.runtime.sampler import SamplingParams
from kvc.runtime.scheduler import Scheduler
from kvc.runtime.sequences import Model
from kvc.runtime.text import Stream, Text, end_tokens
from kvc_passes.errors import InputError


class Session:
    """Requests on a loaded model. Use it as a context manager or call `close`.

    `add_request` and `cancel` may be called from any thread; all that computes (`step`, `generate`, `stream`)
    from one thread only. `generate` and `stream` run other requests of the session along.
    """

    def __init__(self, model: Model, folder: Path, text: Text | None, *, share: bool = True) -> None:
        """A session of `model`, whose artifact is `folder`; without `text` it takes token ids only."""
        self._model = model
        self._folder = folder
        self._text = text
        self._scheduler = Scheduler(model, share=share)
        self._lives: dict[int, _Live] = {}
        self._outbox: list[Event] = []
        self._closed = False

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the model's memory. Requests that have not ended are dropped."""
        self._closed = True
        self._model.close()

    @property
    def text(self) -> Text:
        """The model's tokenizer. Raises InputError if the artifact has none."""
        return self._text or Text(self._folder)

    @property
    def limit(self) -> int:
        """Most tokens that a prompt may have."""
        return self._scheduler.limit

    @property
    def reads_memory(self) -> bool:
        """Whether prompts come with an encoder's output, or its inputs."""
        return self._model.facts.reads_memory

    @property
    def busy(self) -> bool:
        """Whether there are requests that have not ended."""
        return self._scheduler.busy

    @property
    def stats(self) -> Stats:
        """Speed and load."""
        counters, scheduler = self._scheduler.counters, self._scheduler
        return Stats(
            prefill_tokens=counters.prefill_tokens,
            prefill_rate=counters.prefill_tokens / max(counters.prefill_seconds, 1e-9),
            decode_tokens=counters.decode_tokens,
            decode_rate=counters.decode_tokens / max(counters.decode_seconds, 1e-9),
            preemptions=counters.preemptions,
            shared_tokens=counters.shared_tokens,
            pages_used=tuple(pool.used for pool in scheduler.state.pools),
            pages_total=tuple(pool.count for pool in scheduler.state.pools),
            utilization=scheduler.utilization,
            running=scheduler.running,
            waiting=scheduler.waiting,
        )

    def generate(
        self,
        prompts: str | Sequence[str] | Sequence[Sequence[int]],
        *,
        chat: bool = False,
        on_token: OnToken | None = None,
        memory: Sequence[NDArray[Any]] | None = None,
        encoder_inputs: EncoderInputs | Sequence[EncoderInputs] | None = None,
        **sampling: Unpack[Sampling],
    ) -> list[Completion]:
        """Answer one prompt or several together, each a text or token ids; the answers come in their order.

        With `chat`, a text is what a user says to the model. For a model that reads an encoder's output,
        `memory` has that, [rows, d], for each prompt; or, where the encoder is in the artifact,
        `encoder_inputs` has its inputs by their ONNX names: one mapping for each prompt, with or without a
        batch of 1, or one mapping whose arrays have the prompts along their first axis. Every prompt has the
        seed that is given, so its answer does not depend on the others. Raises InputError, before anything
        runs, if a prompt cannot be served.
        """
        params = params_of(sampling)
        several: list[Prompt] = [prompts] if isinstance(prompts, str) else list(prompts)
        tokens = [self._checked(prompt, chat) for prompt in several]
        given = sources_of(len(tokens), memory, encoder_inputs)
        sources = [(memory, self._encoded(inputs)) for memory, inputs in given]
        for source in sources:
            self._scheduler.checked_memory(*source)
        lives = [self._add(prompt, params, *source) for prompt, source in zip(tokens, sources)]
        inboxes: list[list[Event]] = [[] for _ in lives]
        for live, inbox in zip(lives, inboxes, strict=True):
            live.sink = inbox.append
        texts = [""] * len(lives)
        try:
            while any(live.request.finish_reason is None for live in lives):
                self._advance()
                for index, inbox in enumerate(inboxes):
                    for event in inbox:
                        texts[index] += event.text
                        if on_token and event.token is not None:
                            on_token(index, event.token, event.text)
                    inbox.clear()
        finally:
            self._abandon(lives)
        return [completion_of(live.request, text) for live, text in zip(lives, texts, strict=True)]

    def stream(
        self,
        prompt: Prompt,
        *,
        chat: bool = False,
        memory: NDArray[Any] | None = None,
        encoder_inputs: EncoderInputs | None = None,
        **sampling: Unpack[Sampling],
    ) -> Iterator[str]:
        """Answer one prompt piece by piece, in whole characters; closing the iterator cancels the request.

        Raises InputError, before anything runs, if the prompt cannot be served or there is no tokenizer.
        """
        params = params_of(sampling)
        self.text  # noqa: B018  raises where there is no tokenizer
        inputs = self._encoded(encoder_inputs)
        self._scheduler.checked_memory(memory, inputs)
        return self._pieces(self._checked(prompt, chat), params, memory, inputs)

    def add_request(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        chat: bool = False,
        memory: NDArray[Any] | None = None,
        encoder_inputs: EncoderInputs | None = None,
    ) -> int:
        """Queue a request and return its id; `step` works on it. Raises InputError if it cannot be served.

        Arrays are not copied: leave them as they are until the request has got its pages.
        """
        tokens = self._checked(prompt, chat)
        inputs = self._encoded(encoder_inputs)
        return self._add(tokens, params or SamplingParams(), memory, inputs).request.id

    def step(self) -> list[Event]:
        """Compute the next tokens of the requests that are queued; what became of those of add_request."""
        self._advance()
        events, self._outbox = self._outbox, []
        return events

    def cancel(self, id: int) -> bool:
        """End a request with the next step; False if it has ended or never was."""
        return self._scheduler.cancel(id)

    def tokens(self, prompt: Prompt, *, chat: bool = False) -> list[int]:
        """The token ids of a prompt. Raises InputError if it needs a tokenizer or template that lacks."""
        if isinstance(prompt, str):
            return self.text.chat([{"role": "user", "content": prompt}]) if chat else self.text.encode(prompt)
        messages = [item for item in prompt if isinstance(item, Mapping)]
        if messages and len(messages) == len(prompt):
            return self.text.chat(messages)
        return [item for item in prompt if not isinstance(item, Mapping)]

    def _encoded(self, inputs: EncoderInputs | None) -> EncoderInputs | None:
        """Inputs with token ids for texts.

        Raises InputError for what is no mapping, and if a text needs a tokenizer that lacks.
        """
        if inputs is None:
            return None
        if not isinstance(inputs, Mapping):
            kind = type(inputs).__name__
            raise InputError(f"the encoder's inputs are {kind}; give arrays by the inputs' names")
        return {n: self.text.encode(each) if isinstance(each, str) else each for n, each in inputs.items()}

    def _checked(self, prompt: Prompt, chat: bool) -> list[int]:
        if self._closed:
            raise InputError("the session is closed: load the model again")
        tokens = self.tokens(prompt, chat=chat)
        self._scheduler.check(tokens)
        return tokens

    def _add(
        self,
        tokens: list[int],
        params: SamplingParams,
        memory: NDArray[Any] | None = None,
        inputs: EncoderInputs | None = None,
    ) -> _Live:
        if params.stop and not self._text:
            raise InputError(
                "stop texts need a tokenizer, which this artifact does not have: give stop_tokens"
            )
        stream = Stream(self._text.decode, params.stop) if self._text else None
        eos = self._text.stops() if self._text else end_tokens(self._folder)
        live = _Live(stream, self._to_outbox)

        def made(request: Request) -> None:
            live.request = request
            self._lives[request.id] = live

        self._scheduler.add(
            tokens, params, eos=eos, stopped=live.push, made=made, memory=memory, inputs=inputs
        )
        return live

    def _to_outbox(self, event: Event) -> None:
        self._outbox.append(event)

    def _pieces(
        self,
        tokens: list[int],
        params: SamplingParams,
        memory: NDArray[Any] | None,
        inputs: EncoderInputs | None,
    ) -> Iterator[str]:
        live = self._add(tokens, params, memory, inputs)
        inbox: list[Event] = []
        live.sink = inbox.append
        try:
            while live.request.finish_reason is None:
                self._advance()
                yield from (event.text for event in inbox if event.text)
                inbox.clear()
        finally:
            self._abandon([live])

    def _abandon(self, lives: Sequence[_Live]) -> None:
        """End those of the requests that have not ended, and free their pages."""
        for live in lives:
            live.sink = lambda _: None
            self._scheduler.cancel(live.request.id)
        self._dispatch(self._scheduler.drop_cancelled())

    def _advance(self) -> None:
        if self._closed:
            raise InputError("the session is closed: load the model again")
        self._dispatch(self._scheduler.step())

    def _dispatch(self, updates: Sequence[Update]) -> None:
        """Tell whoever made the requests what became of them."""
        for update in updates:
            id, ended = update.request.id, update.finish_reason is not None
            live = self._lives.pop(id) if ended else self._lives[id]
            live.sink(Event(id, update.token, live.take(ended), update.finish_reason))


class _Live:
    """What the session keeps of a request that has not ended."""

    request: Request

    def __init__(self, stream: Stream | None, sink: Callable[[Event], None]) -> None:
        self.sink = sink
        self._stream = stream
        self._piece = ""

    def push(self, token: int) -> bool:
        """Take a token that the scheduler chose; whether it completes a stop text."""
        if self._stream is None:
            return False
        self._piece += self._stream.push(token)
        return self._stream.stopped

    def take(self, ended: bool) -> str:
        """The text since the last call."""
        piece, self._piece = self._piece, ""
        return piece + (self._stream.finish() if ended and self._stream else "")
