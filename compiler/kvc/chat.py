"""`kvc run`: prompts in, text out, as it comes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvc_passes.errors import InputError

from .runtime import Completion, SamplingParams, Session, load
from .runtime.answers import EncoderInputs, sources_of


def answer(options: argparse.Namespace) -> int:
    """Answer the given prompts; one is streamed, several are served together and printed in order."""
    prompts = options.prompt or _read_prompts(options.prompts_file)
    sampling = _sampling(options)
    memory = [_read_array(path) for path in options.memory] or None
    inputs = _read_inputs(options.encoder_input) or None
    sources = sources_of(len(prompts), memory, inputs)  # refuse another number before the model is loaded
    with load(options.artifact) as session:
        chat = session.text.has_template if options.chat is None else options.chat
        if len(prompts) == 1:
            rows, given = sources[0]
            for piece in session.stream(prompts[0], chat=chat, memory=rows, encoder_inputs=given, **sampling):
                print(piece, end="", flush=True)
            print()
        else:
            answers = session.generate(prompts, chat=chat, memory=memory, encoder_inputs=inputs, **sampling)
            for prompt, completion in zip(prompts, answers):
                _show(prompt, completion)
        _summary(session)
    return 0


def _show(prompt: str, completion: Completion) -> None:
    print(f"> {prompt}\n{completion.text.strip()}\n")


def converse(options: argparse.Namespace) -> int:
    """Chat on the terminal until the end of input; an interrupt ends the answer, not the chat."""
    sampling = _sampling(options)
    with load(options.artifact) as session:
        if session.reads_memory:
            raise InputError(
                f"{options.artifact}: the model reads an encoder's output, which a conversation has not: "
                "give --prompt TEXT with --memory or --encoder-input"
            )
        if options.chat is False or not session.text.has_template:
            raise InputError(f"{options.artifact}: a conversation needs a chat template; give --prompt TEXT")
        print(
            f"{options.artifact}: type a message; /new starts over, /exit or the end of input leaves",
            file=sys.stderr,
        )
        messages: list[dict[str, Any]] = []
        while True:
            try:
                line = input("> ").strip()
            except (EOFError, KeyboardInterrupt):
                print()
                break
            if line in ("/exit", "/quit"):
                break
            if line == "/new":
                messages.clear()
            elif line:
                _turn(session, messages, line, sampling)
        _summary(session)
    return 0


def _turn(session: Session, messages: list[dict[str, Any]], line: str, sampling: dict[str, Any]) -> None:
    messages.append({"role": "user", "content": line})
    reply = ""
    try:
        for piece in session.stream(messages, **sampling):
            reply += piece
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        pass
    except InputError as error:  # most likely a conversation longer than the context
        print(f"kvc: {error}; /new starts over", file=sys.stderr)
        messages.pop()
        return
    print()
    messages.append({"role": "assistant", "content": reply})


def _read_prompts(path: Path) -> list[str]:
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise InputError(f"{path}: prompts cannot be read: {reason}") from None
    if not lines:
        raise InputError(f"{path}: holds no prompts; write one a line")
    return lines


def _read_inputs(given: Sequence[str]) -> EncoderInputs:
    """The encoder's inputs by name: the one array that was given, or all of them."""
    found: dict[str, list[NDArray[Any]]] = {}
    for text in given:
        name, _, file = text.partition("=")
        if not name or not file:
            raise InputError(f"--encoder-input {text}: write it as NAME=FILE.npy")
        found.setdefault(name, []).append(_read_array(Path(file)))
    return {name: arrays if len(arrays) > 1 else arrays[0] for name, arrays in found.items()}


def _read_array(path: Path) -> NDArray[Any]:
    """An array as numpy saves it."""
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "it is no .npy file"
        raise InputError(f"{path}: the array cannot be read: {reason}") from None
    if not isinstance(array, np.ndarray):
        raise InputError(f"{path}: holds several arrays; give a .npy file with one")
    return array


def _sampling(options: argparse.Namespace) -> dict[str, Any]:
    fields = {
        "max_new_tokens": options.max_new_tokens,
        "temperature": options.temperature,
        "top_k": options.top_k,
        "top_p": options.top_p,
        "seed": options.seed,
        "stop": tuple(options.stop),
    }
    SamplingParams(**fields)  # refuse bad values before the model is loaded
    return fields


def _summary(session: Session) -> None:
    stats = session.stats
    print(
        f"prefill {stats.prefill_tokens} tokens, {stats.prefill_rate:.1f} tokens/s; "
        f"decode {stats.decode_tokens} tokens, {stats.decode_rate:.1f} tokens/s",
        file=sys.stderr,
    )
