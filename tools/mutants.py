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
import dataclasses
import fnmatch
import itertools
import json
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # not this folder: a package is called coverage, too

import onnx  # noqa: E402
from tools.coverage_rows import Row, model_file  # noqa: E402
from tools.judging import Verdict, judge, sample_tokens  # noqa: E402
from tools.mutations import Editor, Mutation, mutations  # noqa: E402
from tools.onnx_graph import Graph  # noqa: E402

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
            original = Graph(base.write(None, folder), basic=True).logits(sample_tokens(30))
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
