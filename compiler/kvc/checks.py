"""Does a compiled model keep its promises? Logits against ONNX Runtime, peak memory against the plan."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kvc_passes.errors import InputError, PlanningError

from . import perplexity
from .artifact import Artifact
from .reference import EncoderReference, Reference
from .runtime.encoder import random_inputs
from .runtime.executor import Executor
from .runtime.sequences import Sequences
from .runtime.state import Kept
from .runtime.text import Text

TOLERANCE = 1e-3
"""Largest difference of a logit: rounding of sums in another order, over some tens of layers."""
TOLERANCES = {"float32": TOLERANCE, "float16": 2e-2, "bfloat16": 2e-1}
"""The same by what keys and values are kept in: a unit in the last place of a key of order 1 is 2^-10 or
2^-7, and the logits that are compared were computed without that rounding."""


@dataclass(frozen=True)
class Check:
    """One promise: what was measured, and the most that it may be."""

    name: str
    detail: str
    measured: float
    limit: float
    unit: str = ""

    @property
    def passed(self) -> bool:
        return bool(self.measured <= self.limit)  # False for NaN


def verify(
    path: str | os.PathLike[str],
    against: str | os.PathLike[str],
    *,
    encoder: str | os.PathLike[str] | None = None,
    tolerance: float | None = None,
    text: str | os.PathLike[str] | None = None,
    seed: int = 0,
) -> list[Check]:
    """Compare the artifact `path` with the ONNX file it was compiled from.

    Logits of random tokens are compared, as the largest absolute difference, for prefill at several lengths,
    chunked prefill, decode after prefill and ragged batches; then the peak memory of a fresh process under
    the worst planned workload is compared with the plan. The tolerance is that of the type that keys and
    values are kept in, by default. A model that was compiled with permissions is measured, not judged: how
    far its logits are off, and its perplexity on a text that comes with kvc, if it has a tokenizer. With
    `text`, a file, every model's perplexity on that is measured. With `encoder`, its ONNX file, the rows that
    the encoder in the artifact makes of random inputs are compared, and logits after them.

    Raises:
        InputError: the artifact, the ONNX file or the text cannot be read, ONNX Runtime is not installed, or
            the tolerance is not a number >= 0.
    """
    if tolerance is not None and not tolerance >= 0:
        raise InputError(f"a tolerance of {tolerance} is not a distance; give a number such as {TOLERANCE:g}")
    artifact = Artifact.open(Path(path))
    sites = artifact.facts.sites
    reference = Reference(Path(against), sites[0].head_dim)
    if tolerance is None:
        tolerance = max(TOLERANCES[site.kv_dtype] for site in sites)
        tolerance = math.inf if artifact.facts.allowed else tolerance
    columns = reference.columns
    if columns is not None and columns != artifact.facts.logits:
        raise InputError(
            f"{against}: has {columns} logits, {path} has {artifact.facts.logits}: another model"
        )
    executor = Executor(artifact)
    try:
        checks = list(_Logits(executor, reference, tolerance, seed).checks())
        if encoder is not None:
            checks += _encoder(executor, reference, Path(encoder), tolerance, seed)
        if text is not None or (artifact.facts.allowed and artifact.file("tokenizer.json")):
            checks.append(_perplexity(artifact, executor, reference, None if text is None else Path(text)))
    finally:
        executor.close()
    return [*checks, _memory(artifact)]


class _Logits:
    """Runs the same random sequences through both."""

    def __init__(self, executor: Executor, reference: Reference, tolerance: float, seed: int) -> None:
        self.reference, self.tolerance = reference, tolerance
        self.plan, self.facts = executor.plan, executor.facts
        self.random = np.random.default_rng(seed)
        self.sequences = Sequences(executor, share=False, shuffle=self.random)
        self.longest = min(200, self.plan.max_context)
        own = (group.pages for group in self.plan.groups if not group.reach.memory)
        self._together = min(own) * self.plan.page_size
        """Tokens that can be computed at once."""

    def checks(self) -> Iterator[Check]:
        yield from self._prefill()
        yield self._chunked()
        yield self._decode()
        yield self._ragged()

    def _check(self, name: str, detail: str, differences: Sequence[float]) -> Check:
        return Check(name, detail, float(np.max(differences)), self.tolerance)

    def _sequence(self, length: int) -> tuple[Kept, np.ndarray]:
        """A sequence of random tokens [length] and the reference's logits [length, V].

        Where the model reads an encoder's output, it has a random one, of up to as many rows as are planned.
        """
        tokens = self.random.integers(0, self.facts.vocab, length)
        memory = None
        if self.facts.memory is not None:
            rows = int(self.random.integers(1, self.plan.max_memory, endpoint=True))
            memory = self.random.standard_normal((rows, self.facts.memory[0])).astype(np.float32)
        return self.sequences.open(tokens.tolist(), memory), self.reference.logits(tokens, memory)

    def _prefill(self) -> Iterator[Check]:
        most = min(self.longest, self.plan.chunk, self._together)
        lengths = sorted({n for n in (1, 5, 17, 64, self.longest) if n <= most})
        for length in lengths:
            kept, expected = self._sequence(length)
            (got,) = self.sequences.prefill([(kept, length)])
            self.sequences.close(kept)
            yield self._check("prefill", f"{length} tokens", [_difference(got, expected[-1])])

    def _chunked(self) -> Check:
        kept, expected = self._sequence(self.longest)
        tokens = kept.tokens
        differences, sizes = [], [1, 3, 16, 17, 50, 31, 64]
        while kept.length < len(tokens):
            count = min(sizes[0], self.plan.chunk, len(tokens) - kept.length, self.sequences.state.room(kept))
            sizes = sizes[1:] + sizes[:1]
            (got,) = self.sequences.prefill([(kept, count)])
            differences.append(_difference(got, expected[kept.length - 1]))
        self.sequences.close(kept)
        return self._check("chunked prefill", f"{len(tokens)} tokens, {len(differences)} chunks", differences)

    def _decode(self) -> Check:
        kept, expected = self._sequence(min(72, self.longest))
        tokens = kept.tokens
        first = min(max(1, len(tokens) // 2), self.plan.chunk)
        self.sequences.prefill([(kept, first)])
        differences = []
        for at in range(first, len(tokens)):
            (got,) = self.sequences.decode([kept])
            differences.append(_difference(got, expected[at]))
        self.sequences.close(kept)
        return self._check("decode", f"{len(differences)} steps after {first} tokens", differences or [0.0])

    def _ragged(self) -> Check:
        """Sequences at different points of their lives share calls: some begin, some go on."""
        plan, count = self.plan, min(self.plan.max_batch, 6)
        room = min(
            self.longest, self._together // plan.page_size // count * plan.page_size, plan.chunk // count
        )
        lengths = [max(2, int(n)) for n in self.random.integers(max(2, room // 3), max(3, room + 1), count)]
        kept, expected = zip(*(self._sequence(length) for length in lengths))
        differences = []
        while active := [i for i in range(count) if kept[i].length < lengths[i]]:
            steps = {i: min(int(self.random.integers(1, 24)), lengths[i] - kept[i].length) for i in active}
            if all(step == 1 for step in steps.values()):
                got = self.sequences.decode([kept[i] for i in active])
            else:
                got = self.sequences.prefill([(kept[i], step) for i, step in steps.items()])
            for row, i in zip(got, active):
                differences.append(_difference(row, expected[i][kept[i].length - 1]))
        self.sequences.close(*kept)
        return self._check("ragged batches", f"{count} sequences, {len(differences)} rows", differences)


def _encoder(
    executor: Executor, reference: Reference, path: Path, tolerance: float, seed: int
) -> list[Check]:
    """Rows of random inputs, and the logits of tokens that see them."""
    plan, facts, random = executor.plan.encoder, executor.facts.encoder, np.random.default_rng(seed)
    if plan is None or facts is None:
        raise InputError(f"the artifact has no encoder to compare with {path}")
    own, sequences = EncoderReference(path, reference.roles.memory), Sequences(executor, share=False)
    if set(own.inputs) != {each.name for each in facts.inputs}:
        raise InputError(f"{path}: has other inputs than the encoder in the artifact: another model")
    rows_off, logits_off, rows = [], [], 0
    extents = sorted({plan.longest, facts.least, (plan.longest + facts.least) // 2})
    for extent in extents:
        inputs = random_inputs(facts, extent, random)
        expected, memory = own.rows(inputs), executor.run_encoder(inputs)
        if memory.shape != expected.shape:
            raise InputError(f"{path}: has another output than the encoder in the artifact: another model")
        rows_off.append(_difference(memory, expected))
        tokens = random.integers(
            0, executor.facts.vocab, min(8, executor.plan.chunk, executor.plan.max_context)
        )
        kept = sequences.open(tokens.tolist(), memory)
        (got,) = sequences.prefill([(kept, len(tokens))])
        sequences.close(kept)
        logits_off.append(_difference(got, reference.logits(tokens, expected)[-1]))
        rows = max(rows, len(memory))
    detail = f"{len(extents)} inputs, up to {rows} rows"
    return [
        Check("encoder", detail, max(rows_off), tolerance),
        Check("encoder and decoder", detail, max(logits_off), tolerance),
    ]


def _perplexity(artifact: Artifact, executor: Executor, reference: Reference, text: Path | None) -> Check:
    found = perplexity.measure(Sequences(executor, share=False), reference, Text(artifact.path), text)
    detail = (
        f"{found.tokens} tokens of text; the ONNX file's is {found.reference:.3f}; the same likeliest token "
        f"at {found.agreement:.1%} of them"
    )
    return Check("perplexity", detail, found.ours, math.inf)


def _difference(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.max(np.abs(got.astype(np.float64) - expected)))


def _memory(artifact: Artifact) -> Check:
    plan = artifact.plan
    detail = f"under {','.join(map(str, plan.workload))}"
    try:
        measured: float = measure_peak(artifact.path)
    except PlanningError as error:
        measured, detail = math.nan, str(error)
    return Check("peak memory", detail, measured, min(plan.bytes.total, plan.budget), "bytes")


def measure_peak(path: Path) -> int:
    """Peak resident bytes of a fresh process that runs the artifact's worst planned workload.

    Raises:
        PlanningError: the process failed.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)}
    command = [sys.executable, "-m", "kvc.runtime.peak", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        reason = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
        raise PlanningError(f"{path}: running the worst planned workload failed: {reason}")
    return int(done.stdout.split()[-1])
