"""Decoders with one thing changed: refused with a reason, or compiled to what they compute."""

from __future__ import annotations

import fnmatch
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2]))

from tools.judging import Verdict, judge
from tools.mutants import BASES, Base, attack, counts
from tools.onnx_graph import Graph

ModelFile = Callable[..., Path]
SOME = {
    ("llama", False): {
        "mean over tokens*": "reduces over the tokens",
        "a count from the length*": "reads the number of tokens as a value",
        "other at one length*": "compares the sequence's length with several numbers",
        "their mean taken off on scores 0": "found subtract",
        "no mask at 1": "the attention is bidirectional",
        "a hidden state before the logits": None,
        "logits as logarithms": None,
        "positions 0 times 2": None,
    },
    ("llama", True): {
        "*0.value exchanged with that of the next layer": "is not what attention reads",
        "present.1.value doubled on its way out": "is not what attention reads",
        "past behind the new in*": r"is not concat\(past, new\)",
        "attention mask ignored": None,
    },
    ("mistral", False): {"no mask at 0": "the attention is bidirectional"},
}
"""For graphs that the tests export: mutants, and the reason of the refusal, None for those that are equal."""


def mutant(base: Base, pattern: str, folder: Path) -> Verdict:
    mutation = next(m for m in base.chosen(0) if fnmatch.fnmatch(m.name, pattern))
    return judge(base.row, mutation.name, base.write(mutation, folder))


CASES = [(*key, pattern, reason) for key, mutants in SOME.items() for pattern, reason in mutants.items()]


@pytest.mark.parametrize(("family", "past", "pattern", "reason"), CASES, ids=[c[2] for c in CASES])
def test_some_mutants(
    model_file: ModelFile, tmp_path: Path, family: str, past: bool, pattern: str, reason: str | None
) -> None:
    verdict = mutant(Base(family, model_file(family, past)), pattern, tmp_path)
    if reason is None:
        assert verdict.result == "equal", verdict
    else:
        assert verdict.result == "refused", verdict
        assert re.search(reason, verdict.reason), verdict


def test_a_difference_is_seen(model_file: ModelFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check itself: ONNX Runtime is given other tokens."""
    base = Base("llama", model_file("llama"))
    whole = Graph.logits
    monkeypatch.setattr(Graph, "logits", lambda self, tokens: whole(self, [*tokens[:-1], tokens[-1] ^ 1]))
    assert judge("llama", "", base.write(None, tmp_path)).result == "different"


def test_the_bases_are_equal(model_file: ModelFile, tmp_path: Path) -> None:
    verdict = judge("gemma2", "", Base("gemma2", model_file("gemma2")).write(None, tmp_path))
    assert verdict.result == "equal", verdict


@pytest.mark.slow
def test_many_mutants() -> None:
    with tempfile.TemporaryDirectory() as folder:
        bases = [Base.of(row, Path(folder)) for row in BASES]
        verdicts = list(attack(bases, 30, seed=0))
    found = counts(verdicts)
    assert not [v for v in verdicts if v.result in ("different", "crashed")]
    assert found["refused"] + found["equal"] == found["mutants"] >= 200
    assert found["equal"] >= 30
    assert found["mutants"] - found["unchanged"] >= 100
