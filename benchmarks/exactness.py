"""How exact compiled SmolLM2-135M is: logits against ONNX Runtime in every phase, text against transformers.

Logits of random tokens are compared for prefill at several lengths, chunked prefill, decode and ragged
batches; the largest absolute difference must be at most 1e-3. Then greedy continuations of 128 tokens must be
those of transformers, token for token. The status is 1 when either fails.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.common import WORK, destination, parser, require_model, run_python, show, write_results

TOLERANCE = 1e-3
PROMPTS = [
    "What is the capital of France? Tell me about its history.",
    "Write a short story about a lighthouse keeper and a storm.",
    "Explain how photosynthesis works, step by step.",
    "Write a Python program that sorts a list of numbers, and explain it.",
    "Give detailed instructions for baking bread at home.",
]
"""Questions whose answers are longer than what is compared."""


class Phases:
    """Runs the same random sequences through the artifact and through ONNX Runtime."""

    def __init__(self, artifact: Path, model: Path) -> None:
        from kvc.artifact import Artifact
        from kvc.reference import Reference
        from kvc.runtime.executor import Executor
        from kvc.runtime.sequences import Sequences

        executor = Executor(Artifact.open(artifact))
        self.plan, self.vocab = executor.plan, executor.facts.vocab
        self.reference = Reference(model)
        self.random = np.random.default_rng(7)
        self.sequences = Sequences(executor, share=False, shuffle=self.random)

    def all(self, quick: bool) -> Iterator[tuple[str, str, float]]:
        """(phase, what was run, largest absolute difference)."""
        for length in (1, 17, 300) if quick else (1, 2, 15, 16, 17, 64, 127, 300, 512):
            yield "prefill", f"{length} tokens", self.chunked([length])
        sizes = [1, 5, 64, 130] if quick else [1, 3, 16, 17, 200, 31, 512, 256, 100]
        yield "chunked prefill", f"chunks of {sizes}", self.chunked(sizes)
        if not quick:
            yield "chunked prefill", "2048 tokens in full chunks", self.chunked([512] * 4)
        for first in (1, 100) if quick else (1, 16, 127, 1000):
            yield "decode", f"48 steps after {first} tokens", self.decode(first, 48)
        for number in range(1 if quick else 4):
            yield "ragged batches", f"mix {number + 1} of 8 sequences", self.ragged(8, 120)

    def _sequence(self, length: int) -> tuple[list[int], np.ndarray]:
        tokens = self.random.integers(0, self.vocab, length)
        return tokens.tolist(), self.reference.logits(tokens)

    def chunked(self, sizes: Sequence[int]) -> float:
        """Prefill in chunks of these sizes (split further where the plan's chunk is smaller)."""
        tokens, expected = self._sequence(sum(sizes))
        kept, worst = self.sequences.open(tokens), 0.0
        for size in sizes:
            stop = kept.length + size
            while kept.length < stop:
                got = self.sequences.prefill([(kept, min(stop - kept.length, self.plan.chunk))])
                worst = max(worst, _difference(got[0], expected[kept.length - 1]))
        self.sequences.close(kept)
        return worst

    def decode(self, first: int, steps: int) -> float:
        """Prefill `first` tokens, then decode."""
        tokens, expected = self._sequence(first + steps)
        kept = self.sequences.open(tokens)
        while kept.length < first:
            self.sequences.prefill([(kept, min(first - kept.length, self.plan.chunk))])
        rows = [
            _difference(self.sequences.decode([kept])[0], expected[at]) for at in range(first, first + steps)
        ]
        self.sequences.close(kept)
        return max(rows)

    def ragged(self, count: int, longest: int) -> float:
        """Sequences of different lengths that begin at different calls, prefilled and decoded together."""
        lengths = self.random.integers(longest // 4, longest, count).tolist()
        sequences = [self._sequence(length) for length in lengths]
        kept, worst = [self.sequences.open(tokens) for tokens, _ in sequences], 0.0
        begins = self.random.integers(0, 5, count)
        call = 0
        while any(k.length < n for k, n in zip(kept, lengths)):
            live = [i for i in range(count) if call >= begins[i] and kept[i].length < lengths[i]]
            call += 1
            if not live:
                continue
            if call % 2 == 0 and all(kept[i].length for i in live):
                got = self.sequences.decode([kept[i] for i in live])
            else:
                steps = {i: min(int(self.random.integers(1, 20)), lengths[i] - kept[i].length) for i in live}
                got = self.sequences.prefill([(kept[i], step) for i, step in steps.items()])
            for row, i in zip(got, live):
                worst = max(worst, _difference(row, sequences[i][1][kept[i].length - 1]))
        self.sequences.close(*kept)
        return worst


def texts(artifact: Path, new: int) -> list[dict[str, Any]]:
    """Greedy continuations by kvc, alone and all at once, against those of transformers."""
    import kvc
    from kvc_models.reference import transformers_greedy

    with kvc.load(artifact) as session:
        chats = [session.tokens(prompt, chat=True) for prompt in PROMPTS]
        alone = [session.generate([chat], max_new_tokens=new)[0] for chat in chats]
        together = session.generate(chats, max_new_tokens=new)
    print("kvc has generated; now transformers", file=sys.stderr)
    expected = transformers_greedy("smollm2-135m", chats, new)
    return [
        {
            "prompt": prompt,
            "tokens": len(want),
            "identical_alone": one.tokens == want,
            "identical_in_a_batch": both.tokens == want,
            "first_difference": _first_difference(one.tokens, both.tokens, want),
            "text": one.text,
        }
        for prompt, one, both, want in zip(PROMPTS, alone, together, expected)
    ]


def main() -> int:
    result = parser(__doc__, "exactness")
    result.add_argument("--budget", default="1.2GB")
    result.add_argument("--workload", default="8x256,1x2560")
    result.add_argument("--artifact", type=Path, help="use this artifact instead of compiling")
    result.add_argument("--new-tokens", type=int, default=128)
    options = result.parse_args()
    model, artifact = require_model(options.model), options.artifact
    if artifact is None:
        artifact = WORK / "exactness.kvc"
        arguments = ["-m", "kvc.cli", "compile", str(model), "--output", str(artifact), "--force"]
        run_python([*arguments, "--budget", options.budget, "--workload", options.workload])
    rows: list[dict[str, Any]] = []
    phases = Phases(artifact, model)
    for phase, what, worst in phases.all(options.quick):
        rows.append({"phase": phase, "run": what, "largest_difference": worst})
        print(f"{phase}, {what}: {worst:.2e}", file=sys.stderr)
    phases.sequences.model.close()
    del phases  # ONNX Runtime's threads would compete with those of PyTorch
    continuations = texts(artifact, 32 if options.quick else options.new_tokens)
    identical = [c["identical_alone"] and c["identical_in_a_batch"] for c in continuations]
    by_phase: dict[str, float] = {}
    for row in rows:
        by_phase[row["phase"]] = max(by_phase.get(row["phase"], 0.0), row["largest_difference"])
    body = {
        "model": "SmolLM2-135M-Instruct, float32",
        "tolerance": TOLERANCE,
        "largest_difference": by_phase,
        "rows": rows,
        "continuations": continuations,
    }
    path = write_results("exactness", body, destination(options, "exactness"))
    show(
        "largest difference of a logit from ONNX Runtime",
        ["phase", "largest difference", "at most"],
        [(phase, f"{worst:.2e}", TOLERANCE) for phase, worst in by_phase.items()],
    )
    columns = ["prompt", "tokens", "alone", "in a batch"]
    cells = [
        [c["prompt"], c["tokens"], c["identical_alone"], c["identical_in_a_batch"]] for c in continuations
    ]
    show("greedy continuations identical to those of transformers", columns, cells)
    print(f"written: {path.name}")
    return 0 if all(identical) and all(worst <= TOLERANCE for worst in by_phase.values()) else 1


def _difference(got: np.ndarray, expected: np.ndarray) -> float:
    worst = float(np.max(np.abs(got.astype(np.float64) - expected)))
    return worst if np.isfinite(worst) else float("inf")


def _first_difference(*texts: Sequence[int]) -> int | None:
    """The first index at which the token lists differ, None when they are the same."""
    for index in range(max(map(len, texts))):
        if len({text[index] if index < len(text) else None for text in texts}) > 1:
            return index
    return None


if __name__ == "__main__":
    sys.exit(main())
