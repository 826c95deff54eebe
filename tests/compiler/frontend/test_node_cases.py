"""ONNX's own node cases: none may fail, and those of attention, rotary embedding and RMSNorm must pass."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[3]
sys.path.append(str(ROOT))
from tools import node_cases, node_cases_report  # noqa: E402  (no package: it lies in the project's folder)

WHOLE = ("RotaryEmbedding", "RMSNormalization")
SPREAD = 6  # every sixth of the attention cases runs in the quick test


@pytest.fixture(scope="session")
def cases() -> Callable[..., list[node_cases.Case]]:
    found = node_cases.cases()
    return lambda *operators: [case for case in found if case.op in operators]


def test_quick_subset(cases: Callable[..., list[node_cases.Case]]) -> None:
    attention = cases("Attention")
    assert len(attention) > 150
    plain = [case for case in cases(*WHOLE) if "expanded" not in case.name]
    outcomes = node_cases.run_all([*plain, *attention[::SPREAD]])
    assert {o.op for o in outcomes} == {*WHOLE, "Attention"}
    assert not [o for o in outcomes if o.status != "passed"]


def test_scattering_is_right_or_refused(cases: Callable[..., list[node_cases.Case]]) -> None:
    outcomes = node_cases.run_all(cases("GatherND", "ScatterElements", "ScatterND", "Tile"))
    assert not [o for o in outcomes if o.status == "failed"]
    passed = {o.name for o in outcomes if o.status == "passed"}
    assert {"scatter_elements_with_axis", "scatter_elements_with_negative_indices"} <= passed


@pytest.mark.slow
def test_all_cases(cases: Callable[..., list[node_cases.Case]]) -> None:
    everything = [op for group in node_cases_report.OPERATORS.values() for op in group]
    outcomes = node_cases.run_all(cases(*everything))
    assert not [o for o in outcomes if o.status == "failed"]
    assert not [o for o in outcomes if o.op in WHOLE and o.status != "passed"]
    attention = [o.status == "passed" for o in outcomes if o.op == "Attention"]
    assert np.mean(attention) >= 0.95
    assert not [o for o in outcomes if o.status == "refused" and len(o.reason.splitlines()) != 1]


def test_wrong_numbers_types_and_shapes_fail(cases: Callable[..., list[node_cases.Case]]) -> None:
    case = next(c for c in cases("Neg") if c.name == "neg_example")
    assert node_cases.run_case(case).status == "passed"
    (inputs, (expected,)), *_ = case.data
    for wrong, reason in (
        (expected + 1, "Not equal to tolerance"),
        (expected.astype(np.float64), "not float64"),
        (expected[None], "float32 (1, "),
    ):
        changed: Any = node_cases.dataclasses.replace(case, data=((inputs, [wrong]),))
        outcome = node_cases.run_case(changed)
        assert outcome.status == "failed"
        assert reason in outcome.reason


def test_a_crash_is_the_failure_of_its_case_alone(cases: Callable[..., list[node_cases.Case]]) -> None:
    good = next(c for c in cases("Neg") if c.name == "neg_example")
    bad: Any = node_cases.dataclasses.replace(good, name="bad", model=b"\xff")  # the worker dies of it
    after: Any = node_cases.dataclasses.replace(good, name="after")
    outcomes = node_cases.run_all([good, bad, after], jobs=1)
    assert [o.status for o in outcomes] == ["passed", "failed", "passed"]
    assert outcomes[1].reason == "the process crashed"
