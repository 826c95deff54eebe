"""Attack on the proofs: decoders with one thing changed are refused, or compiled to what they compute.

    python tools/mutants.py                         a sample for every base
    python tools/mutants.py --sample 40 --seed 1    another, larger one
    python tools/mutants.py --only 'llama*' --match '*mask*'

A mutant is an export of which one node, constant, attribute or connection is changed. What ONNX Runtime still
runs must be refused by kvc with a reason, or give the same logits in every kind of call. `different` and
`crashed` are bugs.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fnmatch
import functools
import itertools
import json
import math
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from unittest import mock

ROOT: Final = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # not this folder: a package is called coverage, too

import numpy as np  # noqa: E402
import onnx  # noqa: E402
from tools.coverage_rows import Row, model_file  # noqa: E402
from tools.mutations import Editor, Mutation, mutations  # noqa: E402

BASES: Final = (
    "llama/dynamo-20/float32",
    "llama/dynamo-20-past/float32",
    "llama/dynamo-23/float32",
    "llama/dynamo-23-past/float32",
    "mistral/dynamo-20-past/float32",
    "gemma2/dynamo-20/float32",
    "gpt2/dynamo-20/float32",
    "bloom/dynamo-20-past/float32",
    "llama4/dynamo-20/float32",
    "gpt-oss/dynamo-20/float32",
    "mistral/genai/float32",
)
PROMPTS: Final = (1, 7, 30, 61)
CHUNKS: Final = (1, 7, 13, 3, 17, 14)
DECODED: Final = 4
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


class Reference:
    """A graph in ONNX Runtime, fed a whole sequence, or token by token through its caches.

    Raises:
        Exception: of ONNX Runtime, if it cannot load the file.
    """

    def __init__(self, path: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 4
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        providers = ["CPUExecutionProvider"]
        self.session = onnxruntime.InferenceSession(str(path), options, providers=providers)
        self.inputs = {value.name: value for value in self.session.get_inputs()}
        self.caches = [name for name in self.inputs if name.startswith("past")]
        settings = path.with_suffix(".assets") / "config.json"
        config = json.loads(settings.read_text()) if settings.exists() else {"head_dim": 1}
        whole, heads = config.get("hidden_size", 0), config.get("num_attention_heads", 1)
        self.head_dim = config.get("head_dim") or whole // heads

    def whole(self, tokens: Sequence[int]) -> np.ndarray:
        """float32 [len(tokens), V], nothing cached."""
        return self._run(tokens, 0, self._empty())[0]

    def pieces(self, tokens: Sequence[int], counts: Sequence[int]) -> np.ndarray:
        """The same, a piece at a time through the caches."""
        past, start, rows = self._empty(), 0, []
        for count in counts:
            logits, past = self._run(tokens[start : start + count], start, past)
            rows.append(logits)
            start += count
        return np.concatenate(rows)

    def _empty(self) -> dict[str, np.ndarray]:
        made = {}
        for name in self.caches:
            shape = self.inputs[name].shape
            dim = shape[3] if isinstance(shape[3], int) else self.head_dim
            made[name] = np.zeros((1, shape[1], 0, dim), np.float32)
        return made

    def _run(
        self, tokens: Sequence[int], start: int, past: dict[str, np.ndarray]
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        end = start + len(tokens)
        known: dict[str, Any] = {
            "input_ids": np.array([tokens], np.int64),
            "attention_mask": np.ones((1, end), np.int64),
            "position_ids": np.arange(start, end, dtype=np.int64)[None],
            **past,
        }
        feeds = {name: known[name] for name in self.inputs}
        names = ["logits", *(name.replace("past_key_values", "present") for name in self.caches)]
        logits, *presents = self.session.run(names, feeds)
        return logits[0], dict(zip(self.caches, presents))


@contextlib.contextmanager
def unmeasured() -> Iterator[None]:
    """The size of a process is measured once, not for every model: that takes 2 s."""
    with mock.patch("kvc.api.measure", return_value=_process_size()):
        yield


@functools.cache
def _process_size() -> int:
    from kvc.runtime.overhead import measure

    return measure(None)


def judge(base: str, mutant: str, path: Path, original: np.ndarray | None = None) -> Verdict:
    """Run `path` by ONNX Runtime and by kvc. `original`: the base's logits of `sample_tokens(30)`."""
    import kvc

    try:
        reference = Reference(path)
        logits = reference.whole(sample_tokens(30))
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
    return [int(t) for t in np.random.default_rng(seed + length).integers(0, 512, length)]


def error_of(got: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference, relative to the largest number above 1; NaN where it was expected counts as 0."""
    if not np.array_equal(np.isnan(got), np.isnan(expected)):
        return math.inf
    apart = np.abs(np.nan_to_num(got).astype(np.float64) - np.nan_to_num(expected))
    return float(apart.max() / max(1.0, np.abs(np.nan_to_num(expected)).max()))


def _worst(artifact: Any, reference: Reference) -> tuple[float, str]:
    """The largest error over all kinds of calls, and in which."""
    from kvc.runtime.executor import Executor

    executor = Executor(artifact)
    try:
        return max(_compared(executor, reference), key=lambda each: each[0])
    finally:
        executor.close()


def _compared(executor: Any, reference: Reference) -> Iterator[tuple[float, str]]:
    from kvc.runtime.executor import Segment

    pages = [int(p) for p in np.random.default_rng(1).permutation(executor.plan.pages)]
    for length in PROMPTS:
        tokens = sample_tokens(length)
        got = executor.prefill([Segment(tokens, 0, pages[:4])])[0].copy()
        with contextlib.suppress(*_runtime_errors()):
            yield error_of(got, reference.whole(tokens)[-1]), f"a prompt of {length}"
    count = sum(CHUNKS) + DECODED
    tokens, start, rows = sample_tokens(count, 1), 0, []
    for piece in CHUNKS:
        rows.append(executor.prefill([Segment(tokens[start : start + piece], start, pages[:4])])[0].copy())
        start += piece
    for at in range(start, count):
        rows.append(executor.decode([Segment([tokens[at]], at, pages[:4])])[0].copy())
    pieces = [*CHUNKS, *[1] * DECODED]
    ends = np.cumsum(pieces) - 1
    with contextlib.suppress(*_runtime_errors()):
        yield from _rows("chunks, then decode", rows, reference, tokens, ends)
        if reference.caches:
            expected = reference.pieces(tokens, pieces)[ends]
            yield error_of(np.stack(rows), expected), "chunks, against ONNX Runtime's caches"
    lengths = (33, 5)
    sequences = [sample_tokens(n + DECODED, 2) for n in lengths]
    place = [pages[4:8], pages[8:12]]
    got = executor.prefill([Segment(t[:n], 0, p) for t, n, p in zip(sequences, lengths, place)])
    both = [[row.copy()] for row in got]
    for step in range(DECODED):
        again = [Segment([t[n + step]], n + step, p) for t, n, p in zip(sequences, lengths, place)]
        for kept, row in zip(both, executor.decode(again)):
            kept.append(row.copy())
    with contextlib.suppress(*_runtime_errors()):
        for kept, tokens, n in zip(both, sequences, lengths):
            yield from _rows("a ragged batch", kept, reference, tokens, range(n - 1, n + DECODED))


def _rows(
    what: str, rows: Sequence[np.ndarray], reference: Reference, tokens: Sequence[int], ends: Any
) -> Iterator[tuple[float, str]]:
    """Row i against the last logits of a whole prompt of ends[i] + 1 tokens: what a server would ask for."""
    for row, end in zip(rows, ends):
        yield error_of(row, reference.whole(tokens[: end + 1])[-1]), what


@functools.cache
def _runtime_errors() -> tuple[type[Exception], ...]:
    """What ONNX Runtime raises for lengths that a graph does not take."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    return (state.Fail, state.InvalidArgument, state.RuntimeException)


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:300]


@dataclass(frozen=True)
class Base:
    """An export to change."""

    row: str
    path: Path

    @classmethod
    def of(cls, row: str, work: Path) -> Base:
        return cls(row, model_file(Row.parse(row), work))

    def write(self, mutation: Mutation | None, folder: Path) -> Path:
        """The mutant, or the base itself, as a file. Raises ValueError if the change cannot be made."""
        editor = Editor(onnx.load(self.path))
        if mutation is not None:
            mutation.change(editor)
        out = folder / "mutant.onnx"
        onnx.save(editor.finish(), out)
        assets = out.with_suffix(".assets")
        shutil.rmtree(assets, ignore_errors=True)
        shutil.copytree(self.path.with_suffix(".assets"), assets)
        return out

    def chosen(self, seed: int, patterns: Sequence[str] = ("*",)) -> Iterator[Mutation]:
        """All mutations in a random order in which every kind comes equally often."""
        source = random.Random(f"{seed} {self.row}")
        kinds = []
        for found in mutations(Editor(onnx.load(self.path))).values():
            kinds.append([m for m in found if any(fnmatch.fnmatch(m.name, p) for p in patterns)])
            source.shuffle(kinds[-1])
        for turn in itertools.zip_longest(*kinds):
            yield from (mutation for mutation in turn if mutation is not None)


def attack(
    bases: Sequence[Base], sample: int, seed: int, patterns: Sequence[str] = ("*",)
) -> Iterator[Verdict]:
    """Judge mutants of every base; of those that ONNX Runtime runs, `sample` a base.

    Yields:
        verdicts; none is "invalid".
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for base in bases:
            original = Reference(base.write(None, folder)).whole(sample_tokens(30))
            left = sample
            for mutation in base.chosen(seed, patterns):
                if not left:
                    break
                try:
                    path = base.write(mutation, folder)
                except (ValueError, KeyError, StopIteration):
                    continue
                verdict = judge(base.row, mutation.name, path, original)
                if verdict.result == "invalid":
                    continue
                left -= 1
                yield verdict


def counts(verdicts: Sequence[Verdict]) -> dict[str, int]:
    """How many mutants ended how; "unchanged" of them compute what their base does."""
    found = Counter(v.result for v in verdicts)
    found["unchanged"] = sum(not v.changed for v in verdicts)
    kinds = ("refused", "equal", "different", "crashed", "unchanged")
    return {"mutants": len(verdicts), **{kind: found[kind] for kind in kinds}}


def read_counts(path: Path = ROOT / "build" / "coverage" / "mutants.json") -> dict[str, int] | None:
    """The counts of the last run, None if there was none."""
    if not path.exists():
        return None
    found: dict[str, int] = json.loads(path.read_text())["counts"]
    return found


def main() -> int:
    """Run the command line; 1 if a mutant is silently different or crashes the compiler."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "coverage", help="folder for all files")
    parser.add_argument("--json", type=Path, default=ROOT / "build" / "coverage" / "mutants.json")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="of the base, such as 'llama*'")
    parser.add_argument("--match", action="append", metavar="PATTERN", help="of the mutant's name")
    parser.add_argument("--sample", type=int, default=12, help="mutants a base (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    work = options.work.resolve()
    bases = [Base.of(row, work) for row in BASES if fnmatch.fnmatch(row, options.only)]
    verdicts = []
    for verdict in attack(bases, options.sample, options.seed, options.match or ("*",)):
        verdicts.append(verdict)
        same = "" if verdict.changed else " (unchanged)"
        print(f"{verdict.result:9} {verdict.base}: {verdict.mutant}{same}: {verdict.reason}", flush=True)
    summary = {"counts": counts(verdicts), "mutants": [dataclasses.asdict(v) for v in verdicts]}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(summary, indent=1))
    print(summary["counts"])
    return int(any(v.result in ("different", "crashed") for v in verdicts))


if __name__ == "__main__":
    sys.exit(main())
