"""Judge one mutant: is it refused, or compiled to what ONNX Runtime computes, in every kind of call?"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from unittest import mock

import numpy as np
from tools.onnx_graph import Graph

PROMPTS: Final = (1, 7, 30, 61)
CHUNKS: Final = (1, 7, 13, 3, 17, 14)
DECODED: Final = 4
VOCAB: Final = 64
"""Tokens that are used: no more than the smallest base has."""
_NUMBERS: Final = itertools.count()
LIMIT: Final = 1e-4
"""Most that a logit may differ, relative to the largest one where that is above 1."""


@dataclass(frozen=True)
class Verdict:
    """What came of a mutant.

    Attributes:
        base: the row that was changed.
        mutant: what was changed.
        result: "refused", "equal", "different", "crashed", or "invalid" if ONNX Runtime does not run it.
        reason: of a refusal or crash, or how far the logits are apart.
        changed: whether ONNX Runtime computes something else than from the base.
    """

    base: str
    mutant: str
    result: str
    reason: str = ""
    changed: bool = True


@contextlib.contextmanager
def unmeasured() -> Iterator[None]:
    """The size of a process is measured once, not for every model: that takes 2 s."""
    with mock.patch("kvc.machine.measure", return_value=_process_size()):
        yield


@functools.cache
def _process_size() -> int:
    from kvc.runtime.overhead import measure

    return measure(None)


def judge(base: str, mutant: str, path: Path, original: np.ndarray | None = None) -> Verdict:
    """Run `path` by ONNX Runtime and by kvc. `original`: the base's logits of `sample_tokens(30)`."""
    import kvc

    try:
        reference = Graph(path, basic=True)
        logits = reference.logits(sample_tokens(30))
    except Exception as error:
        return Verdict(base, mutant, "invalid", _line(error))
    same = original is not None and logits.shape == original.shape and error_of(logits, original) < LIMIT
    output = path.with_name(f"{next(_NUMBERS)}.kvc")  # a process loads a library of one path once
    try:
        with unmeasured():
            artifact = kvc.compile(path, budget="2GB", workload="4x64", output=output, force=True)
        worst, where = _worst(artifact, reference)
    except kvc.UnsupportedModel as error:
        reason = str(error).replace(str(path), "").removeprefix(": ")
        return Verdict(base, mutant, "refused", reason.splitlines()[0], not same)
    except Exception as error:
        return Verdict(base, mutant, "crashed", f"{type(error).__name__}: {_line(error)}", not same)
    finally:
        shutil.rmtree(output, ignore_errors=True)
    good = worst <= LIMIT
    return Verdict(base, mutant, "equal" if good else "different", f"{worst:.1e} at {where}", not same)


def sample_tokens(length: int, seed: int = 0) -> list[int]:
    return [int(t) for t in np.random.default_rng(seed + length).integers(0, VOCAB, length)]


def error_of(got: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference, relative to the largest number above 1; NaN where it was expected counts as 0."""
    if not np.array_equal(np.isnan(got), np.isnan(expected)):
        return math.inf
    apart = np.abs(np.nan_to_num(got).astype(np.float64) - np.nan_to_num(expected))
    return float(apart.max() / max(1.0, np.abs(np.nan_to_num(expected)).max()))


def _worst(artifact: Any, reference: Graph) -> tuple[float, str]:
    """The largest error over all kinds of calls, and in which."""
    from kvc.runtime.executor import Executor

    executor = Executor(artifact)
    try:
        return max(_compared(executor, reference), key=lambda each: each[0])
    finally:
        executor.close()


def _compared(executor: Any, reference: Graph) -> Iterator[tuple[float, str]]:
    from kvc.runtime.sequences import Sequences

    served = Sequences(executor, share=False, shuffle=np.random.default_rng(1))
    for length in PROMPTS:
        tokens = sample_tokens(length)
        kept = served.open(tokens)
        got = served.prefill([(kept, length)])[0].copy()
        served.close(kept)
        with contextlib.suppress(*_runtime_errors()):
            yield error_of(got, reference.logits(tokens)[-1]), f"a prompt of {length}"
    tokens = sample_tokens(sum(CHUNKS) + DECODED, 1)
    kept = served.open(tokens)
    rows = [served.prefill([(kept, piece)])[0].copy() for piece in CHUNKS]
    rows += [served.decode([kept])[0].copy() for _ in range(DECODED)]
    served.close(kept)
    pieces = [*CHUNKS, *[1] * DECODED]
    ends = np.cumsum(pieces) - 1
    with contextlib.suppress(*_runtime_errors()):
        yield from _rows("chunks, then decode", rows, reference, tokens, ends)
        if reference.caches:
            expected = reference.pieces(tokens, pieces)[ends]
            yield error_of(np.stack(rows), expected), "chunks, against ONNX Runtime's caches"
    lengths = (33, 5)
    sequences = [sample_tokens(n + DECODED, 2) for n in lengths]
    live = [served.open(tokens) for tokens in sequences]
    both = [[row.copy()] for row in served.prefill(list(zip(live, lengths)))]
    for _ in range(DECODED):
        for found, row in zip(both, served.decode(live)):
            found.append(row.copy())
    served.close(*live)
    with contextlib.suppress(*_runtime_errors()):
        for found, tokens, n in zip(both, sequences, lengths):
            yield from _rows("a ragged batch", found, reference, tokens, range(n - 1, n + DECODED))


def _rows(
    what: str, rows: Sequence[np.ndarray], reference: Graph, tokens: Sequence[int], ends: Any
) -> Iterator[tuple[float, str]]:
    """Row i against the last logits of a whole prompt of ends[i] + 1 tokens: what a server would ask for."""
    for row, end in zip(rows, ends):
        yield error_of(row, reference.logits(tokens[: end + 1])[-1]), what


@functools.cache
def _runtime_errors() -> tuple[type[Exception], ...]:
    """What ONNX Runtime raises for lengths that a graph does not take."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    return (state.Fail, state.InvalidArgument, state.RuntimeException)


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:300]
