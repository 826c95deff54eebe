"""Prefill with feed-forward parts in slices: logits of the model, bytes of the plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import kvc
from kvc.checks import measure_peak
from kvc.planning.budget import Draft
from kvc.planning.decide import Planner
from kvc.planning.saved import SavedPlan, save_plan
from kvc_passes.plans import Workload
from support import OnnxRuntime

from .test_state_forms import rows

pytestmark = pytest.mark.usefixtures("fixed_rates")
ModelFile = Callable[..., Path]
WORK = (Workload(2, 200),)
TOKENS = [int(t) for t in np.random.default_rng(0).integers(0, 512, 150)]
CHUNKS = [32, 64, 54]
"""Tokens of calls; before each stands one of half as many, and one more, of another sequence."""


def compiled(planner: Planner, ffn: int, folder: Path) -> kvc.Artifact:
    """With chunks of 128 tokens, in slices of `ffn`."""
    decision = planner.plan_of(planner.usual()[0], 128, 1 << 30, WORK, ffn)
    assert decision is not None
    file = folder / "plan.json"
    plan = replace(decision.plan, budget=decision.plan.bytes.total + (4 << 20))
    save_plan(file, SavedPlan(planner.model.facts.name, "cpu", (), plan))
    path = planner.model.imported.file.path
    artifact = kvc.compile(path, plan=file, output=folder / f"{ffn}.kvc")
    assert (artifact.plan.chunk, artifact.plan.ffn_chunk) == (128, ffn)
    return artifact


def test_the_logits_are_bit_by_bit_those_of_the_whole(model_file: ModelFile, tmp_path: Path) -> None:
    """As long as no slice has fewer rows than a register tile, whose sums are in another order."""
    planner = kvc.planner(model_file("llama"))
    whole, sliced = (compiled(planner, ffn, tmp_path) for ffn in (0, 32))
    assert sliced.plan.bytes.arena < 0.8 * whole.plan.bytes.arena
    found = rows(sliced, TOKENS, CHUNKS)
    np.testing.assert_array_equal(found, rows(whole, TOKENS, CHUNKS))
    ends = np.cumsum(CHUNKS) - 1
    expected = OnnxRuntime(model_file("llama")).logits(TOKENS)[ends]
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)


def test_experts_in_slices_where_they_would_not_fit(
    model_file: ModelFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every token gathers the weights of its two experts: of a small slice there are few at a time."""
    planner = kvc.planner(model_file("mixtral"))
    monkeypatch.setattr("kvc.machine.measure", lambda *_, **__: planner.runtime)
    budget = planner.least(WORK) + (4 << 20)
    model, out = model_file("mixtral"), tmp_path / "m.kvc"
    artifact = kvc.compile(model, budget=budget, workload=list(WORK), output=out)
    plan = artifact.plan
    assert 0 < plan.ffn_chunk < plan.chunk
    assert plan.bytes.total <= budget
    costs = planner.variant(planner.usual()[0]).costs
    assert Draft(costs, budget, WORK, 32).smallest().bytes.total > budget
    tokens = TOKENS[:40]
    expected = OnnxRuntime(model).logits(tokens)[[29, *range(30, 40)]]
    np.testing.assert_allclose(rows(artifact, tokens, [30]), expected, rtol=0, atol=2e-5)
    assert measure_peak(artifact.path) <= plan.bytes.total
