"""Random decoders: correct ones are mostly accepted; what is accepted computes what ONNX Runtime does."""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import pytest
from hypothesis import HealthCheck, given, settings

sys.path.append(str(Path(__file__).resolve().parents[2]))

from tools.judging import Verdict, judge

from .random_decoders import Writer
from .random_specs import FAULTS, Spec, specs


def verdict_of(spec: Spec) -> Verdict:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "random.onnx"
        onnx.save(Writer(spec).model(), path)
        return judge("random", str(spec), path)


def attack(faults: Any, examples: int) -> Counter[str]:
    """How many random decoders ended how; fails on one that is silently different, or crashes."""
    found: Counter[str] = Counter()

    @settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(specs(faults))
    def run(spec: Spec) -> None:
        verdict = verdict_of(spec)
        found[verdict.result] += 1
        if verdict.result == "refused":
            print(f"{verdict.reason}: {spec}")
        assert verdict.result in ("equal", "refused"), verdict

    run()
    return found


def test_correct_decoders() -> None:
    found = attack((None,), 4)
    assert found["equal"] >= 3, found


def test_faulty_decoders() -> None:
    found = attack(FAULTS, 16)
    assert found["refused"] >= 13, found  # of what is wrong for no sequence, something may be accepted


@pytest.mark.slow
def test_many_correct_decoders() -> None:
    found = attack((None,), 100)
    assert found["equal"] >= 85, found


@pytest.mark.slow
def test_many_faulty_decoders() -> None:
    found = attack(FAULTS, 150)
    assert found["refused"] >= 120, found
