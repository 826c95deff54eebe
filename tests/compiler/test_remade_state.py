"""`x_gemm`: keys and values made again from what they are projections of, where nothing else fits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import kvc
from kvc.planning.decide import Planner
from kvc.planning.explain import explain
from kvc.widen import widen
from kvc_passes.errors import BudgetError, InputError
from kvc_passes.plans import Workload
from kvc_passes.sites import Remade
from support import OnnxRuntime

from .cli_fixtures import Result
from .test_state_forms import needed, rows

pytestmark = pytest.mark.usefixtures("fixed_rates")
ModelFile = Callable[..., Path]
WORK = (Workload(32, 250),)
ANGLES = {"llama": 32, "phi3": 32, "phi": 16}
"""Cosines and sines of a token."""


@pytest.fixture(scope="module")
def models(model_file: ModelFile, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Tiny models with as many KV heads as heads, as Llama-2, Phi-3-mini (one product) and Phi have."""
    from kvc_models.export import export_decoder, save_assets
    from kvc_models.tiny import make_tiny, tokenizer

    folder = tmp_path_factory.mktemp("models")

    def model(family: str) -> Path:
        if family == "phi":
            return model_file(family)
        out = folder / f"{family}.onnx"
        if not out.exists():
            save_assets(made := make_tiny(family, num_key_value_heads=4), tokenizer(), out)
            export_decoder(made, out)
        return out

    return model


@pytest.mark.parametrize("family", ANGLES)
def test_the_logits_are_the_models(models: Callable[..., Path], tmp_path: Path, family: str) -> None:
    model = models(family)
    artifact = kvc.compile(model, budget="400MB", workload="2x200", state="x_gemm", output=tmp_path / "m.kvc")
    facts = kvc.inspect(model)
    for site, own in zip(artifact.facts.sites, facts.forms):
        (form,) = (f for f in own if f.name == "x_gemm")
        assert (site.kept, site.remade) == ("x_gemm", Remade(128, ANGLES[family] // 2, fine=False))
        assert form.legal
        assert form.token_bytes == site.token_bytes() == 4 * (128 + ANGLES[family])
    # Weights are kept once: what made keys and values of new tokens makes them again.
    plain = kvc.plan(model, budget="400MB", workload="2x200", state="paged_kv")
    assert artifact.plan.bytes.weights == plain.bytes.weights
    (group,) = artifact.plan.groups
    assert group.page_bytes == 2 * 16 * 4 * (128 + ANGLES[family])
    assert artifact.plan.bytes.pools == group.pages * group.page_bytes
    tokens = [int(t) for t in np.random.default_rng(0).integers(0, 512, 160)]
    found = rows(artifact, tokens, [30, 1, 75])
    expected = OnnxRuntime(model).logits(tokens)[[29, 30, *range(105, 160)]]
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)


def test_half_precision_is_as_exact_as_keys_and_values(model_file: ModelFile, tmp_path: Path) -> None:
    model = model_file("phi", False, "float16")
    tokens = [int(t) for t in np.random.default_rng(0).integers(0, 512, 150)]
    exact = OnnxRuntime(widen(model, tmp_path / "wide.onnx")).logits(tokens)[[99, *range(100, 150)]]
    errors = {}
    for form in ("paged_kv", "x_gemm"):
        out = tmp_path / f"{form}.kvc"
        artifact = kvc.compile(model, budget="400MB", workload="2x200", state=form, output=out)
        errors[form] = float(np.sqrt(((rows(artifact, tokens, [100]) - exact) ** 2).mean()))
    assert {site.remade for site in artifact.facts.sites} == {Remade(128, 8, fine=True)}
    assert errors["x_gemm"] < 1.2 * errors["paged_kv"]


def test_the_last_resort_of_a_plan(
    models: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys and values while they fit, keys while their weights allow that, then as few layers as must be."""
    built: Planner = kvc.planner(models("llama"))
    monkeypatch.setattr("kvc.machine.measure", lambda *_, **__: built.runtime)
    roomy = built.decide(1 << 30, WORK)  # whose reasons are asked for before weights are judged
    assert "x_gemm" not in roomy.plan.forms
    why = explain(built, roomy).reasons[0][2]
    assert why.startswith("no smaller form but x_gemm, for where nothing else fits, is ")
    with pytest.raises(BudgetError) as refused:
        built.decide(1 << 20, WORK)
    least = refused.value.needed
    decision = built.decide(least, WORK)
    assert decision.plan.forms == ("x_gemm", "x_gemm")
    assert decision.plan.bytes.total <= least
    reasons = explain(built, decision).reasons
    assert reasons == (("0-1", "x_gemm", "no other form fits; a step makes all keys and values again"),)
    forms = set()
    for more in range(0, 12 << 20, 1 << 20):
        plan = built.decide(least + more, WORK).plan
        forms.add(plan.forms)
        if "x_gemm" in plan.forms:  # nothing else would do
            for chosen in built.usual():
                assert built.plan_of(chosen, 32, plan.budget, WORK) is None
    assert ("paged_kv", "paged_kv") in forms
    # A layer of one kind and a layer of the other.
    mixed = next(f for f in forms if "x_gemm" in f and set(f) != {"x_gemm"})
    assert set(mixed) <= {"x_gemm", "k_plus_r", "paged_kv"}


def test_a_layer_that_it_is_not_legal_for_is_refused(
    model_file: ModelFile, models: Callable[..., Path]
) -> None:
    message = "--state x_gemm: layer 0, attention at node '.*', cannot be kept so: 128 elements .* no smaller"
    with pytest.raises(InputError, match=message):
        kvc.plan(model_file("llama"), budget="400MB", workload="1x64", state="x_gemm")


def test_the_smallest_budget_is_that_of_the_last_resort(models: Callable[..., Path]) -> None:
    model = models("phi")
    assert abs(needed(model, None) - needed(model, "x_gemm")) < 2 << 20


def test_inspect_and_plan_say_it(models: Callable[..., Path], run: Callable[..., Result]) -> None:
    shown = run("inspect", models("phi")).out
    assert "x_gemm" in shown
    assert "they are made again" in " ".join(shown.replace("│", " ").split())
    arguments = ["--budget", "400MB", "--workload", "2x64", "--state", "x_gemm"]
    assert "paged X [128 + 16 of angles] for K and V, float32" in run("plan", models("phi"), *arguments).out
