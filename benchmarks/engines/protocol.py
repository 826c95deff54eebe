"""How a benchmark talks to an engine: a process of its own, one JSON object a line on stdin and stdout.

    {"do": "prepare", "model": PATH, "threads": 2, ...}   -> {"version": ..., "configuration": ...}
    {"do": "fill", "batch": 8, "context": 128, "seed": 0, "room": 200} -> {"seconds": [...]}  decode after it
    {"do": "decode", "steps": 16}                         -> {"seconds": [one of each step]}
    {"do": "prefill", "length": 512, "seed": 1}           -> {"seconds": [one], "token": first new token}
    {"do": "run", "batch": 8, "context": 128, "new": 8, "vocabulary": 49152, "seed": 0}
        -> {"seconds": [one], "peak_bytes": ..., "kv_bytes": of keys and values}; the new end the context
    {"do": "peak"}                                        -> {"bytes": most resident bytes so far}
    {"do": "quit"}

Every answer may be {"error": TEXT} instead. An engine needs only numpy and its own package, so that it can
run under another Python than kvc's.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np

VOCABULARY = 49152


class Engine(Protocol):
    """What a worker implements. All choose the likeliest token, on as many threads as asked."""

    def prepare(self, model: str, threads: int, **options: Any) -> dict[str, str]:
        """Load `model`; say the version and the configuration that was chosen."""

    def reset(self, batch: int, length: int) -> None:
        """Forget what was; make room for `batch` sequences of `length` tokens. Not timed."""

    def fill(self, prompts: list[list[int]], room: int) -> None:
        """Compute the prompts, so that up to `room` tokens can be decoded after each."""

    def step(self) -> None:
        """Decode one token of every sequence."""

    def prefill(self, prompt: list[int]) -> int:
        """Compute one prompt up to its first new token, which is returned."""


class Holder(Engine, Protocol):
    """An engine that can answer "run"."""

    def generate(self, prompts: list[list[int]], new: int) -> None:
        """Answer all prompts at once, each with `new` tokens, in a context that has room for no more."""

    def kv_bytes(self) -> int:
        """What it has allocated for keys and values."""


def prompts(batch: int, length: int, seed: int, vocabulary: int = VOCABULARY) -> list[list[int]]:
    """Random token ids, the same for every engine."""
    random = np.random.default_rng(seed)
    return [random.integers(100, vocabulary, length).tolist() for _ in range(batch)]


def timed(action: Callable[[], None]) -> float:
    """Seconds that `action` takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def serve(engine: Engine) -> None:
    """Answer requests until the input ends. Whatever the libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        action = request.pop("do")
        if action == "quit":
            break
        try:
            answer = _answer(engine, action, request)
        except Exception as error:  # the benchmark reports it and goes on without this engine
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        answers.write(json.dumps(answer) + "\n")


def _answer(engine: Engine, action: str, request: dict[str, Any]) -> dict[str, Any]:
    match action:
        case "prepare":
            return dict(engine.prepare(**request))
        case "fill":
            texts = prompts(request["batch"], request["context"], request["seed"])
            engine.reset(request["batch"], request["context"] + request["room"])
            return {"seconds": [timed(lambda: engine.fill(texts, request["room"]))]}
        case "decode":
            return {"seconds": [timed(engine.step) for _ in range(request["steps"])]}
        case "prefill":
            (text,) = prompts(1, request["length"], request["seed"])
            engine.reset(1, request["length"] + 1)
            start = time.perf_counter()
            token = engine.prefill(text)
            return {"seconds": [time.perf_counter() - start], "token": int(token)}
        case "run":
            holder, new = cast(Holder, engine), request["new"]
            texts = prompts(
                request["batch"], request["context"] - new, request["seed"], request["vocabulary"]
            )
            seconds = timed(lambda: holder.generate(texts, new))
            return {"seconds": [seconds], "peak_bytes": _peak(), "kv_bytes": holder.kv_bytes()}
        case "peak":
            return {"bytes": _peak()}
    raise ValueError(f"unknown request {action}")


def _peak() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return 0
