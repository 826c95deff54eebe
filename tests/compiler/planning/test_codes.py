"""Codes as a variable of the plan: in as few layers as must be, or where they gain what they have to."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest

import kvc
from kvc import cli
from kvc.machine import CpuMachine
from kvc.permissions import explain as explained
from kvc.planning.decide import Planner
from kvc.planning.explain import curve, explain
from kvc.planning.mixes import PRICES
from kvc.planning.saved import SavedPlan, save_plan
from kvc_passes.errors import BudgetError, InputError
from kvc_passes.plans import Plan, Workload
from support import OnnxRuntime

from ..test_state_forms import rows

pytestmark = pytest.mark.usefixtures("fixed_rates")
ModelFile = Callable[..., Path]
WORK = (Workload(32, 250),)
LAYER = 32 * 256 * 2 * 2 * 32 * 4
"""Bytes of K and V of a layer of the tiny Llama, which has 2 KV heads of 32 elements."""


@pytest.fixture(scope="module")
def llama_codes(model_file: ModelFile, fixed_rates: None) -> Planner:
    """No exact form but K and V, codes of 8 and 4 bits allowed, and no choice of chunks."""
    built = kvc.planner(model_file("llama"), allow="kv-int8,kv-int4")
    machine = replace(cast(CpuMachine, built.machine), chunks=(32,))
    return Planner(built.model, machine, built.runtime, built.runner)


@pytest.fixture(scope="module")
def gpt2_codes(model_file: ModelFile, fixed_rates: None) -> Planner:
    return kvc.planner(model_file("gpt2"), allow="kv-int8")


def exact_least(built: Planner) -> int:
    """Bytes of the smallest plan with K and V in all layers."""
    found = built.estimate(None, WORK, built.usual()[:1])
    assert found is not None
    return found.bytes


def test_what_fits_exactly_stays_exact(llama_codes: Planner) -> None:
    decision = llama_codes.decide(exact_least(llama_codes) + 4096, WORK)
    assert set(decision.plan.forms) == {"paged_kv"}
    assert decision.variant.model.facts.allowed == ()
    why = explain(llama_codes, decision)
    assert [line[:2] for line in why.reasons] == [("0-1", "paged_kv")]
    assert "; kv-int8, kv-int4: allowed, and not needed here" in why.reasons[0][2]
    assert why.bound == "no choice is faster, nor gains what codes have to: gap 0%"


def test_no_more_layers_than_must_be_and_the_finest_codes_that_do(llama_codes: Planner) -> None:
    """What is missing is a part of one layer, then of two, then more than codes of 8 bits save."""
    least = exact_least(llama_codes)
    saved8, saved4 = LAYER - LAYER * 136 / 512, LAYER - LAYER * 72 / 512
    for missing, forms in (
        (saved8 / 2, ["kv-int8", "paged_kv"]),
        (saved8 + 9000, ["kv-int8", "kv-int8"]),
        (2 * saved8 + 9000, ["kv-int4", "kv-int8"]),
        (saved4 + saved8 + 9000, ["kv-int4", "kv-int4"]),
    ):
        decision = llama_codes.decide(least - int(missing), WORK)
        assert sorted(decision.plan.forms) == forms
        assert decision.plan.bytes.total <= least - missing
        used = tuple(name for name in ("kv-int8", "kv-int4") if name in forms)
        assert decision.variant.model.facts.allowed == used
        whys = [why for _, name, why in explain(llama_codes, decision).reasons if name in used]
        assert all(why.endswith("exact forms alone do not fit") for why in whys)
    with pytest.raises(BudgetError) as refused:
        llama_codes.decide(least - int(2 * saved4) - 20000, WORK)
    plan = llama_codes.decide(refused.value.needed, WORK).plan
    assert "paged_kv" not in plan.forms
    assert plan.bytes.total <= refused.value.needed


def test_layers_of_both_kinds_run(
    llama_codes: Planner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saved, compiled from that, and as near to the model as codes of 8 bits in one layer are."""
    monkeypatch.setattr("kvc.machine.measure", lambda *_, **__: llama_codes.runtime)
    plan = llama_codes.decide(exact_least(llama_codes) - LAYER // 2, WORK).plan
    model, saved = llama_codes.model.imported.file.path, tmp_path / "plan.json"
    save_plan(saved, SavedPlan(llama_codes.model.facts.name, "cpu", ("kv-int8",), plan))
    artifact = kvc.compile(model, plan=saved, output=tmp_path / "m.kvc")
    assert artifact.plan.forms == plan.forms
    assert artifact.facts.allowed == ("kv-int8",)
    assert {site.stored for site in artifact.facts.sites} == {None, "int8"}
    assert "; " in artifact.plan.groups[0].form
    tokens = [int(t) for t in np.random.default_rng(0).integers(0, 512, 150)]
    expected = OnnxRuntime(model).logits(tokens)[[29, 30, *range(50, 150)]]
    difference = np.abs(rows(artifact, tokens, [30, 1, 20]) - expected).max()
    assert 1e-4 < difference < 0.1  # logits up to 6; a step is 1/127 of the largest element
    data = json.loads(saved.read_text()) | {"allow": []}
    saved.write_text(json.dumps(data))
    with pytest.raises(InputError, match=r"kv-int8: layer ., .* --allow kv-int8 would permit it"):
        kvc.compile(model, plan=saved, output=tmp_path / "n.kvc")


def test_no_other_choice_of_forms_chunk_and_slices_costs_less(gpt2_codes: Planner) -> None:
    """Against everything, lowered and counted in full: each of two layers as K and V, X or codes."""
    legal = [{f.name: f for f in forms if f.legal} for forms in gpt2_codes.model.facts.forms]
    names = ("paged_kv", "x_absorbed", "kv-int8")
    chosen = [(legal[0][a], legal[1][b]) for a, b in itertools.product(names, repeat=2)]
    slices = gpt2_codes.variant(chosen[0]).costs.slices
    calls = [(chunk, ffn) for chunk in gpt2_codes.chunks(WORK) for ffn in (0, *slices(chunk, 32))]
    points = curve(gpt2_codes, WORK)
    low, high = points[0].bytes + 4096, points[-1].bytes
    for budget in (low, *range(low + 100_000, high + 1, (high - low) // 4)):
        plan = gpt2_codes.decide(budget, WORK).plan
        found = [
            gpt2_codes.plan_of(each, *call[:1], budget, WORK, call[1]) for each in chosen for call in calls
        ]
        fitting = [decision.plan for decision in found if decision is not None]
        unit = min(other.seconds for other in fitting) / 2

        def cost(plan: Plan, unit: float = unit) -> float:
            return plan.seconds + unit * sum(PRICES.get(name, 0.0) for name in plan.forms)

        # Mixes are weighed by the parts of whole models, whose other kernels differ by less than that.
        assert cost(plan) <= min(map(cost, fitting)) * 1.001


def test_codes_that_gain_enough_are_taken_although_all_fits(llama_codes: Planner) -> None:
    """Where all time goes into reading pages, a quarter of the bytes is worth more than their price."""
    slow = replace(llama_codes.machine.rates, read=1e7, source="made up")
    machine = replace(cast(CpuMachine, llama_codes.machine))
    object.__setattr__(machine, "rates", slow)
    planner = Planner(llama_codes.model, machine, llama_codes.runtime, llama_codes.runner)
    decision = planner.decide(200_000_000, WORK)
    assert set(decision.plan.forms) == {
        "kv-int8"
    }  # those of 4 bits save a little more, and have to gain more
    (reason,) = explain(planner, decision).reasons
    assert "as it is allowed; exact forms alone would take" in reason[2]


def test_what_permissions_would_buy_is_said_in_bytes_and_seconds(model_file: ModelFile) -> None:
    """The seconds of the plan that would be made, from which nothing but the permission differs."""
    built = kvc.planner(model_file("llama"))
    budget = exact_least(built) + 4096
    decision = built.decide(budget, WORK)
    gains = {gain.allow: gain for gain in explain(built, decision).gains}
    allowed = kvc.planner(model_file("llama"), allow="kv-int8")
    assert gains["kv-int8"].seconds == pytest.approx(allowed.decide(budget, WORK).plan.seconds, rel=1e-6)
    assert gains["kv-int8"].saved == 2 * (LAYER - LAYER * 136 // 512)
    assert gains["kv-int4"].context == 256 == decision.plan.capacities[0].context
    again = {gain.allow for gain in explain(allowed, allowed.decide(budget, WORK)).gains}
    assert again == {"kv-fp8", "kv-int4"}


def test_the_command_says_which_layers_are_in_codes(
    llama_codes: Planner, capsys: pytest.CaptureFixture[str]
) -> None:
    least = exact_least(llama_codes)
    for missing, notes in (
        (-4096, ["kv-int8: not used: no layer needs it, or gains enough by it", "kv-int4: not used: "]),
        (LAYER, [f"kv-int8: {explained('kv-int8')}, in layers 0-1", "kv-int4: not used: "]),
    ):
        decision = llama_codes.decide(least - missing, WORK)
        cli._notes(decision.variant.model.facts, decision.plan)
        said = capsys.readouterr().err.splitlines()
        assert len(said) == len(notes)
        assert all(line.startswith(f"kvc: allowed: {note}") for line, note in zip(said, notes))


def test_layers_that_read_an_encoder_have_one_form_together(model_file: ModelFile) -> None:
    """One of them keeps the rows for all: alone in codes it would leave the others without."""
    built = kvc.planner(model_file("tiny-whisper"), allow="kv-int8,kv-int4")
    reading = [site.index for site in built.model.facts.sites if site.mask.reach.memory]
    found = [{chosen[i].name for i in reading} for chosen in built.usual()]
    assert all(len(names) == 1 for names in found)
    assert {name for names in found for name in names} == {"paged_kv", "encoder_output", "kv-int8", "kv-int4"}
