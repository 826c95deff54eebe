"""Forms of the state: equal results from fewer bytes, chosen where they are needed, refused where illegal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import kvc
from kvc.reconstruction import Solver
from kvc.runtime.executor import Executor
from kvc.runtime.sequences import Sequences
from kvc.widen import widen
from kvc_passes.errors import BudgetError, InputError
from support import OnnxRuntime

from .cli_fixtures import Result

pytestmark = pytest.mark.usefixtures("fixed_rates")
ModelFile = Callable[..., Path]
FORMS = {"gpt2": "x_absorbed", "opt": "x_absorbed", "bloom": "x_absorbed", "mpt": "x_absorbed"}
FORMS |= {"deepseek": "mla_latent", "phi": "k_plus_r"}


def rows(artifact: kvc.Artifact, tokens: list[int], chunks: list[int]) -> np.ndarray:
    """Logits after every chunk and then after every token, beside a second sequence."""
    executor = Executor(artifact)
    try:
        sequences = Sequences(executor, share=False, shuffle=np.random.default_rng(2))
        kept, other = sequences.open(tokens), sequences.open(tokens[::-1])
        found = []
        for count in chunks:
            sequences.prefill([(other, count // 2 + 1)])
            found.append(sequences.prefill([(kept, count)])[0].copy())
        while kept.length < len(tokens):
            found.append(sequences.decode([other, kept])[1].copy())
        return np.stack(found)
    finally:
        executor.close()


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=pytest.mark.slow) if f in ("opt", "mpt") else f for f in FORMS]
)
def test_the_logits_are_the_models(model_file: ModelFile, tmp_path: Path, family: str) -> None:
    model, form = model_file(family), FORMS[family]
    artifact = kvc.compile(model, budget="400MB", workload="2x200", state=form, output=tmp_path / "m.kvc")
    facts = kvc.inspect(model)
    for site, own in zip(artifact.facts.sites, facts.forms):
        (size,) = (f.token_bytes for f in own if f.name == form)
        assert (site.kept, site.token_bytes()) == (form, size)
    if form == "x_absorbed":  # of as many KV heads as query heads
        assert 2 * artifact.facts.kv_token_bytes() == facts.kv_token_bytes()
    tokens = [int(t) for t in np.random.default_rng(0).integers(0, 512, 150)]
    found = rows(artifact, tokens, [30, 1, 75])
    expected = OnnxRuntime(model).logits(tokens)[[29, 30, *range(105, 150)]]
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("family", "other", "limit"), [("gpt2", "x_absorbed", 1.3), ("phi", "k_plus_r", 1.5)]
)
def test_half_precision_keeps_the_models_own_type(
    model_file: ModelFile, tmp_path: Path, family: str, other: str, limit: float
) -> None:
    """The error is at most so many times that of 16-bit keys and values, over all logits."""
    model = model_file(family, False, "float16")
    tokens = [int(t) for t in np.random.default_rng(0).integers(0, 512, 150)]
    exact = OnnxRuntime(widen(model, tmp_path / "wide.onnx")).logits(tokens)[[99, *range(100, 150)]]
    errors = {}
    for form in ("paged_kv", other):
        out = tmp_path / f"{form}.kvc"
        artifact = kvc.compile(model, budget="400MB", workload="2x200", state=form, output=out)
        assert {s.kv_dtype for s in artifact.facts.sites} == {"float16"}
        errors[form] = float(np.sqrt(((rows(artifact, tokens, [100]) - exact) ** 2).mean()))
    assert errors[other] < limit * errors["paged_kv"]


def needed(model: Path, state: str | None, target: str = "cpu") -> int:
    with pytest.raises(BudgetError) as refused:
        kvc.plan(model, budget="1MB", workload="32x250", state=state, target=target)
    return refused.value.needed


def test_keys_and_values_while_they_fit_then_the_smallest_exact_form(model_file: ModelFile) -> None:
    model = model_file("gpt2")
    paged, absorbed = needed(model, "paged_kv"), needed(model, "x_absorbed")
    assert absorbed < paged - 32 * 250 * 1024 * 9 // 10  # half of 2048 bytes a token
    assert abs(needed(model, None) - absorbed) < 2 << 20  # what another process takes
    roomy = kvc.plan(model, budget=paged + (8 << 20), workload="32x250")
    tight = kvc.plan(model, budget=(paged + absorbed) // 2, workload="32x250")
    assert [g.form for g in roomy.groups] == ["paged K and V, float32"]
    assert [g.form for g in tight.groups] == ["paged X [128], float32"]
    assert tight.bytes.total <= tight.budget


def test_weights_are_judged_only_where_that_can_help(
    model_file: ModelFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A refusal is quick; a budget that keys alone may do with is tried before keys are made again."""
    model, judged = model_file("phi"), []
    judge = Solver.judge
    monkeypatch.setattr(Solver, "judge", lambda *a, **k: judged.append(1) or judge(*a, **k))
    paged, last = needed(model, "paged_kv"), needed(model, "x_gemm")
    assert abs(needed(model, None) - last) < 2 << 20
    assert not judged
    keys = needed(model, "k_plus_r")
    assert last < keys < paged
    judged.clear()
    tight = kvc.plan(model, budget=(paged + keys) // 2, workload="32x250")
    assert "paged K [128 + " in tight.groups[0].form
    assert judged


@pytest.mark.parametrize(
    ("family", "state", "options", "message"),
    [
        (
            "llama",
            "x_absorbed",
            {},
            "layer 0, attention at node '.*', cannot be kept so: K is no projection: ",
        ),
        ("gpt2", "mla_latent", {}, "cannot be kept so: keys are projections alone"),
        ("deepseek", "x_absorbed", {}, "cannot be kept so: keys have elements that are no projection"),
        ("gpt2", "kv-int8", {}, "--allow kv-int8 would permit it: it changes results beyond rounding"),
        ("gpt2", "kv-int4", {"allow": "kv-int8"}, "--state kv-int4: layer 0, .* --allow kv-int4 would"),
        ("gpt2", "k_v", {}, "there is no form of state 'k_v'; there are: paged_kv, x_absorbed, mla_latent"),
        ("llama", "k_only", {}, "K has 64 elements, fewer than the 128 that V is a projection of"),
        ("phi", "k_only", {}, "error .* times that of K and V in float32, .*; at most 1.5 is allowed"),
    ],
)
def test_a_form_that_is_not_legal_is_refused(
    model_file: ModelFile, family: str, state: str, options: dict[str, str], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        kvc.plan(model_file(family), budget="400MB", workload="1x64", state=state, **options)


def test_inspect_lists_the_forms_and_why_not(model_file: ModelFile, run: Callable[..., Result]) -> None:
    shown = run("inspect", model_file("deepseek")).out
    assert "mla_latent" in shown
    assert "keys have elements that are no projection" in shown
    assert "its position turns it" in run("inspect", model_file("llama")).out


def test_the_command_forces_a_form(model_file: ModelFile, run: Callable[..., Result]) -> None:
    arguments = ["plan", model_file("gpt2"), "--budget", "400MB", "--workload", "2x64", "--state"]
    assert "paged X [128], float32" in run(*arguments, "x_absorbed").out
    refused = run(*arguments, "mla_latent")
    assert (refused.status, refused.out) == (2, "")
    assert refused.err.startswith("kvc: --state mla_latent: layer 0, attention at node")
