"""The choice of forms and chunk on a real model: fits, is the fastest, can be saved, edited and refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvc
from kvc.planning.decide import Planner
from kvc.planning.explain import curve, explain, longest, most_requests, timeline
from kvc.planning.mixes import Chosen, Variant
from kvc.planning.saved import SavedPlan, checked, read_plan, save_plan
from kvc_passes.errors import BudgetError, InputError
from kvc_passes.plans import Plan, Workload
from support import OnnxRuntime

from ..test_state_forms import rows

pytestmark = pytest.mark.usefixtures("fixed_rates")
ModelFile = Callable[..., Path]
WORK = (Workload(32, 250),)


@pytest.fixture(scope="module")
def built(model_file: ModelFile, fixed_rates: None) -> Planner:
    return kvc.planner(model_file("gpt2"))


def calls_of(built: Planner) -> list[tuple[int, int]]:
    """Every chunk, whole and in all slices that it can be cut into."""
    chunks = built.machine.chunks
    return [(c, ffn) for c in chunks for ffn in (0, c // 2, c // 4, c // 8)]


def between(built: Planner) -> int:
    """A budget that holds one of two layers as K and V."""
    points = curve(built, WORK)
    return next(p.bytes for p in points if "x1" in p.forms) + 4096


def test_layers_may_differ_and_the_promise_is_theirs(
    built: Planner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvc.machine.measure", lambda *_, **__: built.runtime)  # 4096 bytes are to spare
    budget = between(built)
    plan = built.decide(budget, WORK).plan
    assert sorted(plan.forms) == ["paged_kv", "x_absorbed"]
    assert plan.bytes.total <= budget
    model = built.model.imported.file.path
    saved = tmp_path / "plan.json"
    save_plan(saved, SavedPlan(built.model.facts.name, "cpu", (), plan))
    artifact = kvc.compile(model, plan=saved, output=tmp_path / "m.kvc")
    assert artifact.plan.forms == plan.forms
    assert {s.kept for s in artifact.facts.sites} == {"paged_kv", "x_absorbed"}
    tokens = [int(t) for t in np.random.default_rng(0).integers(0, 512, 150)]
    expected = OnnxRuntime(model).logits(tokens)[[29, 30, *range(105, 150)]]
    np.testing.assert_allclose(rows(artifact, tokens, [30, 1, 75]), expected, rtol=0, atol=2e-5)


def test_no_forced_alternative_is_predicted_to_be_faster(built: Planner) -> None:
    """Over budgets, against every uniform form with every chunk, whole and in slices, counted in full."""
    points = curve(built, WORK)
    for budget in range(points[0].bytes, points[-1].bytes + 1, 1_500_000):
        chosen = built.decide(budget, WORK).plan
        for forms in built.usual():
            for chunk, ffn in calls_of(built):
                other = built.plan_of(forms, chunk, budget, WORK, ffn)
                if other is not None:
                    assert chosen.times[0].seconds <= other.plan.times[0].seconds * (1 + 1e-9)


def test_a_plan_is_deterministic(built: Planner, model_file: ModelFile) -> None:
    again = Planner(built.model, built.machine, built.runtime, built.runner)
    budget = between(built)
    assert again.decide(budget, WORK).plan == built.decide(budget, WORK).plan


def test_the_curve_falls_and_each_point_is_a_budget_that_works(built: Planner) -> None:
    points = curve(built, WORK)
    assert len(points) > 3
    assert [p.bytes for p in points] == sorted({p.bytes for p in points})
    assert [p.seconds for p in points] == sorted({p.seconds for p in points}, reverse=True)
    for point in (points[0], points[-1]):
        assert built.decide(point.bytes, WORK).plan.bytes.total <= point.bytes
    with pytest.raises(BudgetError):
        built.decide(points[0].bytes - 4096, WORK)


def test_the_search_the_other_way_round(built: Planner) -> None:
    budget = 90_000_000
    batch = most_requests(built, budget, 250, 0)
    assert built.decide(budget, (Workload(batch, 250),)).plan.max_batch == batch
    with pytest.raises(BudgetError):
        built.decide(budget, (Workload(batch + 1, 250),))
    small = built.least((Workload(32, 100),))
    context = longest(built, small, 32, 0)
    assert 100 <= context < 120
    with pytest.raises(BudgetError):
        built.decide(small, (Workload(32, context + 1),))


def test_what_is_said_of_a_plan(built: Planner) -> None:
    decision = built.decide(between(built), WORK)
    why = explain(built, decision)
    assert [line[1] for line in why.reasons] == list(decision.plan.forms)
    decision = built.decide(next(p.bytes for p in curve(built, WORK) if p.ffn) + 4096, WORK)
    assert decision.plan.ffn_chunk
    slices = explain(built, decision).slices
    assert slices.startswith(f"feed-forward in slices of {decision.plan.ffn_chunk} tokens: whole, ")
    roomy = explain(built, built.decide(200_000_000, WORK))
    assert roomy.slices == "feed-forward whole: no slices of a chunk of 512 make temporaries less"
    whole = built.plan_of(built.usual()[-1], decision.plan.chunk, 200_000_000, WORK)
    assert whole is not None
    assert (
        explain(built, whole).slices
        == "feed-forward whole: it fits, and slices would read weights more often"
    )
    gains = {gain.allow: gain.saved for gain in roomy.gains}
    # 32 x 256 tokens of 2 layers with K and V of 128 float32: codes of 8 bits and a scale of 16 for each head
    assert gains["kv-int8"] == 32 * 256 * 2 * 2 * (128 * 3 - 4 * 2)
    assert gains["kv-int4"] > gains["kv-int8"]
    lowered, plan = decision.variant.lowered, decision.plan
    bounds = {"n": plan.chunk, "r": 32, "b": 32}
    alive = timeline(lowered.functions["prefill"], bounds, lowered.segments, plan.ffn_chunk)
    assert 0 < max(alive) <= plan.bytes.arena
    assert max(alive) <= max(timeline(lowered.functions["prefill"], bounds))
    assert alive[-1] == 0 or len(alive) > 10


class Dear(Planner):
    """Mixes take 64 MiB more than their parts."""

    def variant(self, chosen: Chosen) -> Variant:
        found = super().variant(chosen)
        more = (64 << 20) * (len(set(chosen)) > 1)
        return replace(found, costs=replace(found.costs, weights=found.costs.weights + more))


def test_where_no_mix_fits_the_best_uniform_choice_does(built: Planner) -> None:
    planner = Dear(built.model, built.machine, built.runtime, built.runner)
    budget = between(built)
    mixed, plain = built.decide(budget, WORK), planner.decide(budget, WORK)
    assert set(plain.plan.forms) == {"x_absorbed"}
    assert plain.plan.bytes.total <= budget
    forms = planner.usual()[1]
    others = [planner.plan_of(forms, chunk, budget, WORK, ffn) for chunk, ffn in calls_of(built)]
    seconds = plain.plan.times[0].seconds
    assert seconds == min(o.plan.times[0].seconds for o in others if o is not None)
    assert (mixed.gap, explain(built, mixed).gap) == (0, 0)
    bound = planner.estimate(budget, WORK, planner.usual())
    assert bound is not None
    assert explain(planner, plain).gap == pytest.approx(seconds / bound.seconds - 1)
    assert plain.gap > 0
    with pytest.raises(BudgetError) as refused:
        planner.decide(80_000_000, WORK)
    assert planner.decide(refused.value.needed, WORK).plan.bytes.total <= refused.value.needed


def test_what_was_not_measured_is_not_called_illegal(model_file: ModelFile) -> None:
    for family, why in (("phi", "--state k_plus_r would"), ("llama", "kvc inspect says why")):
        planner = kvc.planner(model_file(family))
        reasons = explain(planner, planner.decide(200_000_000, WORK)).reasons
        assert [why in line[2] for line in reasons] == [True]


MIXED = ["mla_latent", "paged_kv"]


def edited(tmp_path: Path, built: Planner, change: Callable[[dict[str, Any]], object]) -> Path:
    path = tmp_path / "plan.json"
    plan = built.decide(200_000_000, WORK).plan
    save_plan(path, SavedPlan(built.model.facts.name, "cpu", (), plan))
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    return path


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda d: d["plan"].update(budget=80_000_000), BudgetError, r"\d+ bytes .*, its budget is 80000000"),
        (lambda d: d["plan"]["groups"][0].update(pages=3), InputError, "has 3 pages; .* 32x250 needs 512"),
        (lambda d: d["plan"].update(forms=MIXED), InputError, "mla_latent: layer 0, .* projections alone"),
        (lambda d: d["plan"].update(forms=["paged_kv"]), InputError, "1 layers, not for gpt2 with 2"),
        (lambda d: d["plan"].update(forms=["kv", "kv"]), InputError, "there is no form of state 'kv'"),
        (lambda d: d["plan"].update(chunk=0), InputError, "chunk is 0"),
        (lambda d: d["plan"].update(ffn_chunk=-32), InputError, "ffn_chunk is -32: .* below the chunk"),
        (lambda d: d["plan"].update(ffn_chunk=512), InputError, "ffn_chunk is 512: .* below the chunk"),
        (lambda d: d["plan"].update(ffn_chunk=True), InputError, "ffn_chunk is True"),
        (lambda d: d["plan"].update(workload=[]), InputError, "the workload is empty"),
        (lambda d: d["plan"]["workload"][0].update(context=9999), InputError, "asks for 9999 tokens"),
        (lambda d: d["plan"]["workload"][0].update(prefix="a"), InputError, "'32x250/a' is not a workload"),
        (lambda d: d["plan"]["workload"][0].update(prefix="5"), InputError, "32x250/5 is none"),
        (lambda d: d["plan"]["workload"][0].update(prefix=-1), InputError, "'32x250/-1' is not a workload"),
        (lambda d: d["plan"]["workload"][0].update(prefix=10**9), InputError, "no tokens behind its common"),
        (lambda d: d["plan"]["workload"][0].update(memory=-5), InputError, "32x250.-5 is -5"),
        (lambda d: d["plan"]["workload"][0].update(memory=True), InputError, "32x250.True is True"),
        (lambda d: d["plan"]["groups"].clear(), InputError, "1 groups of layers, not 0"),
        (lambda d: d.update(model="other"), InputError, "is a plan for other"),
        (lambda d: d.pop("plan"), InputError, "is no plan that kvc plan --save wrote"),
        (lambda d: d.update(kvc_plan=99), InputError, "is no plan that kvc plan --save wrote"),
        (lambda d: d.update(target="tpu"), kvc.TargetError, "unknown target 'tpu'"),
        (lambda d: d.update(allow=["window=4"]), InputError, "a window is at least a page"),
    ],
)  # fmt: skip
def test_an_edited_plan_is_checked_again(
    built: Planner, tmp_path: Path, change: Callable[[dict[str, Any]], object], error: type, message: str
) -> None:
    path = edited(tmp_path, built, change)
    with pytest.raises(error, match=message):
        kvc.compile(built.model.imported.file.path, plan=path, output=tmp_path / "m.kvc")
    assert not (tmp_path / "m.kvc").exists()


def test_more_pages_and_a_smaller_chunk_may_be_asked_for(built: Planner, tmp_path: Path) -> None:
    def change(data: dict[str, Any]) -> None:
        data["plan"]["groups"][0]["pages"] += 7
        data["plan"]["chunk"] = 100
        data["plan"]["bytes"]["pools"] = 1  # counted again

    path = edited(tmp_path, built, change)
    before = read_plan(path).plan
    artifact = kvc.compile(built.model.imported.file.path, plan=path, output=tmp_path / "m.kvc")
    plan = artifact.plan
    assert (plan.chunk, plan.groups[0].pages) == (100, before.groups[0].pages)
    assert plan.bytes.pools == plan.groups[0].pages * plan.groups[0].page_bytes
    assert plan.bytes.total <= plan.budget


def test_slices_where_there_are_none_are_refused(model_file: ModelFile, tmp_path: Path) -> None:
    planner = kvc.planner(model_file("phi"))  # attention takes the most, whatever the feed-forward part does
    path = edited(tmp_path, planner, lambda d: d["plan"].update(ffn_chunk=64))
    with pytest.raises(InputError, match="ffn_chunk is 64, but nothing of phi takes less in slices"):
        checked(planner, read_plan(path), path)


def test_slices_are_taken_where_they_buy_time(built: Planner) -> None:
    """And not where the whole chunk fits: every slice reads the weights again."""
    points = curve(built, WORK)
    assert points[-1].ffn == 0
    sliced = next(p for p in points if p.ffn)
    plan = built.decide(sliced.bytes + 4096, WORK).plan
    assert 0 < plan.ffn_chunk < plan.chunk
    forms = {form.name: form for form in built.usual()[0] + built.usual()[1]}
    chosen = tuple(forms[name] for name in plan.forms)
    whole = [built.plan_of(chosen, chunk, plan.budget, WORK) for chunk in built.machine.chunks]
    assert plan.times[0].seconds < min(w.plan.times[0].seconds for w in whole if w is not None)
    costs = built.variant(chosen).costs
    assert plan.bytes.arena == costs.arena(plan.chunk, 32, plan.ffn_chunk) < costs.arena(plan.chunk, 32, 0)


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_a_process_that_takes_more_is_given_pages(model_file: ModelFile, family: str, tmp_path: Path) -> None:
    """Up to 2 MiB, as long as the workload keeps its own."""
    planner, work = kvc.planner(model_file(family)), (Workload(64, 20),)
    planner.runtime = 70 << 20
    budget = planner.decide(1 << 30, work).plan.bytes.total - (1 << 20)  # less than the model's context takes
    plan = planner.decide(budget, work).plan
    saved = SavedPlan(planner.model.facts.name, "cpu", (), plan)

    def again(more: int, saved: SavedPlan = saved) -> Plan:
        grown = Planner(planner.model, planner.machine, planner.runtime + more, planner.runner)
        return checked(grown, saved, tmp_path).plan

    assert again(0) == plan
    for more in (1 << 20, 2 << 20):
        found = again(more)
        assert (found.forms, found.chunk) == (plan.forms, plan.chunk)
        assert budget - 2 * sum(g.page_bytes for g in plan.groups) - 16384 < found.bytes.total <= budget
        assert sum(g.pages for g in found.groups) < sum(g.pages for g in plan.groups)
    with pytest.raises(BudgetError, match="raise its budget"):
        again(3 << 20)
    groups = (*plan.groups[:-1], replace(plan.groups[-1], pages=plan.groups[-1].pages + 4000))
    with pytest.raises(BudgetError, match="raise its budget"):  # too many, whatever the process takes
        again(1 << 20, replace(saved, plan=replace(plan, groups=groups)))
    tight = planner.decide(planner.least(work), work).plan
    with pytest.raises(BudgetError, match="raise its budget"):
        again(1 << 20, replace(saved, plan=tight))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": "1GB"}, "--plan says the budget"),
        ({"workload": "1x1"}, "--plan says the workload"),
        ({"state": "paged_kv"}, "--plan says the state"),
        ({"allow": "kv-int8"}, "--plan says the allow"),
        ({"target": "cuda"}, "--plan says the target"),
    ],
)
def test_a_plan_says_everything(
    built: Planner, tmp_path: Path, options: dict[str, str], message: str
) -> None:
    path = edited(tmp_path, built, lambda data: None)
    with pytest.raises(InputError, match=message):
        kvc.compile(built.model.imported.file.path, plan=path, output=tmp_path / "m.kvc", **options)


def test_the_fastest_form_is_taken_even_if_all_fit(built: Planner) -> None:
    """Where attention over K and V waits for memory and operations are free, half the bytes win."""
    rates = replace(built.machine.rates, read=1e7, shared=(1e15, 1e15), rebuild=1e15, source="made up")
    machine = replace(built.machine)
    object.__setattr__(machine, "rates", rates)
    planner = Planner(built.model, machine, built.runtime, built.runner)
    assert set(planner.decide(200_000_000, WORK).plan.forms) == {"x_absorbed"}
    assert set(built.decide(200_000_000, WORK).plan.forms) == {"paged_kv"}
