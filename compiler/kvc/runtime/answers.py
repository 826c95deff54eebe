"""What goes into a session and comes out of it: prompts, parameters, events, answers, totals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from numpy.typing import NDArray

from kvc.runtime.encoder import batched
from kvc.runtime.requests import FinishReason, Request
from kvc.runtime.sampler import SamplingParams
from kvc.runtime.text import Message
from kvc_passes.errors import InputError

Prompt = str | Sequence[int] | Sequence[Message]
"""A text, token ids, or the messages of a conversation."""
EncoderInputs = Mapping[str, Any]
"""The encoder's inputs of one request by their names in the ONNX file, with or without a batch of 1; a text
stands for its token ids."""
OnToken = Callable[[int, int, str], None]
"""Called with the prompt's index, the token id and the text that became certain with it ("" if none)."""


class Sampling(TypedDict, total=False):
    """The fields of SamplingParams, as keyword arguments."""

    temperature: float
    top_k: int
    top_p: float
    seed: int | None
    max_new_tokens: int
    stop_tokens: tuple[int, ...]
    stop: str | Sequence[str]
    ignore_eos: bool


@dataclass(frozen=True)
class Timings:
    """Seconds of one request."""

    queued: float
    """From arrival until it got pages."""
    first_token: float
    """From arrival until its first token was chosen."""
    total: float


@dataclass(frozen=True)
class Completion:
    """One answer. `tokens` ends with the stop token, if there was one; `text` does not hold it."""

    prompt_tokens: list[int]
    tokens: list[int]
    text: str
    """"" if the artifact has no tokenizer."""
    finish_reason: FinishReason
    timings: Timings


@dataclass(frozen=True)
class Event:
    """What one step did to a request."""

    id: int
    token: int | None
    text: str
    """Text that became certain."""
    finish_reason: FinishReason | None


@dataclass(frozen=True)
class Stats:
    """Totals since the model was loaded, and what holds pages now. Rates are tokens a second of its calls."""

    prefill_tokens: int
    prefill_rate: float
    decode_tokens: int
    decode_rate: float
    preemptions: int
    shared_tokens: int
    """Tokens of prompts that were not computed since requests before them had the same beginning."""
    pages_used: tuple[int, ...]
    """Of every group of layers (Plan.groups)."""
    pages_total: tuple[int, ...]
    utilization: tuple[float, ...]
    """Of every group: tokens that are still seen, over those that fit the pages in use."""
    running: int
    waiting: int


def sources_of(
    prompts: int,
    memory: Sequence[NDArray[Any]] | None,
    inputs: EncoderInputs | Sequence[EncoderInputs] | None,
) -> list[tuple[NDArray[Any] | None, EncoderInputs | None]]:
    """The encoder's output or inputs of each prompt. Raises InputError for another number of them."""
    outputs: list[Any] = [None] * prompts if memory is None else list(memory)
    given: list[EncoderInputs | None] = [None] * prompts
    if isinstance(inputs, Mapping):
        given = list(batched(inputs, prompts))
    elif inputs is not None:
        given = list(inputs) if isinstance(inputs, Sequence) else [inputs]  # Session says that it is none
    for count, what in ((len(outputs), "encoder outputs"), (len(given), "encoder inputs")):
        if count != prompts:
            raise InputError(f"{prompts} prompts, and {what} for {count}: give one for each prompt")
    return list(zip(outputs, given))


def params_of(sampling: Sampling) -> SamplingParams:
    """Keyword arguments as parameters. Raises InputError on impossible values."""
    stop = sampling.get("stop", ())
    fields: dict[str, Any] = dict(sampling)
    fields["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
    return SamplingParams(**fields)


def completion_of(request: Request, text: str) -> Completion:
    """The answer of a request that has ended."""
    assert request.finish_reason is not None
    finished = request.finished or request.arrived
    return Completion(
        request.tokens[: request.prompt_length],
        request.generated,
        text,
        request.finish_reason,
        Timings(
            queued=(request.started or finished) - request.arrived,
            first_token=(request.first_token or finished) - request.arrived,
            total=finished - request.arrived,
        ),
    )
