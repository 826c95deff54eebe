"""`v_only`: keys made of kept values, where both are one projection, beside layers that keep K and V."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import kvc
from kvc.planning.explain import explain
from kvc.widen import widen
from kvc_passes.errors import InputError
from kvc_passes.plans import Workload
from kvc_passes.sites import Rekeyed
from support import OnnxRuntime

from .cli_fixtures import Result
from .test_state_forms import needed, rows

pytestmark = pytest.mark.usefixtures("fixed_rates")
ModelFile = Callable[..., Path]
STATE = "v_only,paged_kv"
KEPT = Rekeyed(2, 64, 32, 8, fine=False, scaled=True)
"""Of a layer that sees all tokens: 2 heads of 64 elements, of whose 32 pairs 8 are turned."""


def test_the_logits_are_the_models(model_file: ModelFile, tmp_path: Path) -> None:
    model = model_file("gemma4")
    artifact = kvc.compile(model, budget="400MB", workload="2x200", state=STATE, output=tmp_path / "m.kvc")
    assert [site.rekeyed for site in artifact.facts.sites] == [None, KEPT]
    assert [site.kept for site in artifact.facts.sites] == ["paged_kv", "v_only"]
    assert artifact.plan.forms == ("paged_kv", "v_only")
    # Values of 128 elements and 16 angles instead of 2 x 128; the layer with windows as ever.
    paged = 2 * 2 * 32 * 4
    assert [site.token_bytes() for site in artifact.facts.sites] == [paged, 576]
    assert kvc.inspect(model).kv_token_bytes() == 1024 + paged
    windows, values = artifact.plan.groups
    assert (windows.page_bytes, values.page_bytes) == (16 * paged, 16 * 576)
    pages = sum(group.pages * group.page_bytes for group in artifact.plan.groups)
    assert pages <= artifact.plan.bytes.pools < pages + 4096  # pools begin on boundaries
    tokens = [int(t) for t in np.random.default_rng(0).integers(0, 512, 160)]
    found = rows(artifact, tokens, [30, 1, 75])
    expected = OnnxRuntime(model).logits(tokens)[[29, 30, *range(105, 160)]]
    # K and V of this model are 3e-5 off: logits go to 4.6.
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_half_precision_is_as_exact_as_keys_and_values(model_file: ModelFile, tmp_path: Path) -> None:
    """What of V is rounded enters K before it is turned, and no more of it than K loses in its own page."""
    model = model_file("gemma4", False, "float16")
    tokens = [int(t) for t in np.random.default_rng(0).integers(0, 512, 150)]
    exact = OnnxRuntime(widen(model, tmp_path / "wide.onnx")).logits(tokens)[[99, *range(100, 150)]]
    errors = {}
    for form in ("paged_kv", STATE):
        out = tmp_path / f"{form}.kvc"
        artifact = kvc.compile(model, budget="400MB", workload="2x200", state=form, output=out)
        errors[form] = float(np.sqrt(((rows(artifact, tokens, [100]) - exact) ** 2).mean()))
    assert artifact.facts.sites[1].rekeyed == replace(KEPT, fine=True)
    # As the rounding gate of other forms: of one sequence it is 0.9 to 1.2 times, of many 1.01 times.
    assert errors[STATE] < 1.5 * errors["paged_kv"]


def test_the_planner_takes_it_by_itself_where_it_is_needed(
    model_file: ModelFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_file("gemma4")
    built = kvc.planner(model)
    monkeypatch.setattr("kvc.machine.measure", lambda *_, **__: built.runtime)
    paged, smallest = needed(model, "paged_kv"), needed(model, STATE)
    assert smallest < paged - 32 * 250 * (1024 - 576) * 9 // 10
    assert abs(needed(model, None) - smallest) < 2 << 20
    tight = built.decide((paged + smallest) // 2, (Workload(32, 250),))
    assert tight.plan.forms == ("paged_kv", "v_only")
    assert tight.plan.bytes.total <= tight.plan.budget
    reasons = {form: why for _, form, why in explain(built, tight).reasons}
    assert reasons["v_only"].startswith("0.56 of the bytes of K and V; ")


def test_the_planner_offers_it_on_gpus(model_file: ModelFile) -> None:
    model, target = model_file("gemma4"), "cuda:sm_90"
    paged, smallest = (needed(model, state, target=target) for state in ("paged_kv", STATE))
    assert smallest < paged - 32 * 250 * (1024 - 576) * 9 // 10
    tight = kvc.plan(model, budget=(paged + smallest) // 2, workload="32x250", target=target)
    assert tight.forms == ("paged_kv", "v_only")
    assert tight.bytes.total <= tight.budget


def test_a_layer_that_it_is_not_legal_for_is_refused(model_file: ModelFile) -> None:
    model = model_file("gemma4")
    message = "--state v_only: layer 0, attention at node '.*', cannot be kept so: K is not made of what V is"
    with pytest.raises(InputError, match=message):
        kvc.plan(model, budget="400MB", workload="1x64", state="v_only")
    with pytest.raises(InputError, match=r"layer 0, .* K is not made of what V is"):
        kvc.plan(model_file("llama"), budget="400MB", workload="1x64", state=STATE)


def test_inspect_and_plan_say_it(model_file: ModelFile, run: Callable[..., Result]) -> None:
    model = model_file("gemma4")
    shown = re.sub(r"[│\s]+", " ", run("inspect", model).out)
    assert "144 elements: V, its cosines and sines; K is made of them" in shown
    assert "K is not made of what V is" in shown
    arguments = ["--budget", "400MB", "--workload", "2x64", "--state", STATE]
    shown = re.sub(r"[│\s]+", " ", run("plan", model, *arguments).out)
    assert "paged V [128 + 16 of angles] for K and V, float32" in shown
