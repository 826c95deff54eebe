"""What a user allows: windows on layers that see all, codes for keys and values; and what cannot be."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import kvc
from kvc.permissions import Permissions, explain, parse_permissions
from kvc.runtime.executor import Executor
from kvc.runtime.sequences import Sequences
from kvc_models.tiny import make_tiny
from kvc_passes.errors import InputError
from kvc_passes.sites import AttentionSite, MaskFact, Reach
from support import OnnxRuntime

CAUSAL = AttentionSite(0, "n0", 4, 2, 32, 32, 0.1, None, MaskFact("causal", None, "given"), None)
LOCAL = dataclasses.replace(CAUSAL, index=1, node="n1", mask=MaskFact("window", 8, "given"))


def test_what_is_written_is_what_is_allowed() -> None:
    assert parse_permissions([]) == Permissions()
    assert parse_permissions("window=4096, sinks=4,kv-int8") == Permissions(False, 4096, 4, ("kv-int8",))
    assert parse_permissions(["token-scales", "kv-fp8"]) == Permissions(True, codes=("kv-fp8",))
    assert parse_permissions("kv-int4,kv-int8").codes == ("kv-int8", "kv-int4")
    assert parse_permissions("token-scales").names == {"token-scales"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("windows", "there is no permission 'windows'; there are: .*window=N.*kv-int4"),
        ("window", "there is no permission 'window'"),
        ("window=", "there is no permission 'window='"),
        ("window=-4", "there is no permission"),
        ("window=0", "hides a token from itself"),
        ("window=32,window=64", "window=32 is allowed, too; give one"),
        ("sinks=4", "sinks=4 needs window=N beside it"),
        ("window=16,sinks=17", "more sinks than the window has tokens; give fewer sinks or a larger window"),
    ],
)
def test_what_cannot_be_meant_is_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_permissions(text)


def test_a_window_is_put_on_layers_that_see_all_tokens_alone() -> None:
    first, second = parse_permissions("window=64,sinks=4").applied([CAUSAL, LOCAL], 16)
    assert (first.mask.kind, first.mask.window, first.mask.sinks) == ("sinks", 64, 4)
    assert first.mask.reach == Reach(64, None, 4)
    assert "not proved" in first.mask.proof
    assert eval(first.mask.predicate, {"q": 100, "k": 3})
    assert not eval(first.mask.predicate, {"q": 100, "k": 36})
    assert second is LOCAL
    (plain,) = parse_permissions("window=64").applied([CAUSAL], 16)
    assert (plain.mask.kind, plain.mask.reach) == ("window", Reach(64))


@pytest.mark.parametrize(
    ("text", "sites", "message"),
    [
        ("window=15", [CAUSAL], "a window is at least a page, 16 tokens on this target"),
        ("window=64", [LOCAL], "applies to no layer: none of this model sees all tokens"),
    ],
)
def test_what_a_model_cannot_have_is_refused(text: str, sites: list[AttentionSite], message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_permissions(text).applied(sites, 16)


def test_what_was_used_is_said() -> None:
    used = parse_permissions("window=64,sinks=4,kv-fp8").used(["token-scales"])
    assert used == ("token-scales", "window=64", "sinks=4")
    assert explain("window=64") == "layers that see all tokens see the last 64 only"
    assert all(explain(name) for name in (*used, "kv-fp8"))


@pytest.mark.parametrize(
    ("stored", "size"), [(None, 2 * 64 * 2), ("int8", 2 * 66), ("fp8", 2 * 66), ("int4", 2 * 34)]
)
def test_bytes_of_a_token(stored: str | None, size: int) -> None:
    """2 for a scale of bfloat16 beside the codes of 64 elements."""
    site = dataclasses.replace(
        CAUSAL, kv_heads=1, head_dim=64, value_dim=64, kv_dtype="float16", stored=stored
    )
    assert site.token_bytes() == size
    for transposed in (True, False):
        shapes = site.state(16, transposed)
        assert list(shapes) == (["k", "v", "k_scale", "v_scale"] if stored else ["k", "v"])


@pytest.fixture(scope="module")
def llama(model_file: Callable[..., Path]) -> Path:
    return model_file("llama", True)


def _rows(artifact: kvc.Artifact, tokens: list[int], chunks: list[int]) -> np.ndarray:
    """Logits after every chunk and then after every token."""
    executor = Executor(artifact)
    try:
        sequences = Sequences(executor, share=False, shuffle=np.random.default_rng(2))
        kept = sequences.open(tokens)
        rows = [sequences.prefill([(kept, count)])[0].copy() for count in chunks]
        while kept.length < len(tokens):
            rows.append(sequences.decode([kept])[0].copy())
        return np.stack(rows)
    finally:
        executor.close()


def _tokens(count: int) -> list[int]:
    return [int(t) for t in np.random.default_rng(0).integers(0, 512, count)]


@pytest.mark.parametrize("sinks", [0, 4])
def test_an_allowed_window_is_streaming_attention(llama: Path, tmp_path: Path, sinks: int) -> None:
    """Against PyTorch with the mask written out. Positions are kept: rotations see distances as they were."""
    tokens, chunks, allow = _tokens(100), [30, 1, 40], f"window=16,sinks={sinks}"
    artifact = kvc.compile(llama, budget="400MB", workload="2x120", allow=allow, output=tmp_path / "m.kvc")
    (group,) = artifact.plan.groups
    assert group.reach == Reach(16, None, sinks)
    assert group.pages < 2 * 16  # what two whole contexts would take
    assert artifact.facts.allowed == ("window=16", "sinks=4")[: 1 + bool(sinks)]
    q, k = torch.arange(100)[:, None], torch.arange(100)[None]
    seen = (k <= q) & ((k > q - 16) | (k < sinks))
    mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]
    with torch.no_grad():
        logits = make_tiny("llama")(input_ids=torch.tensor([tokens]), attention_mask=mask).logits[0].numpy()
    rows = _rows(artifact, tokens, chunks)
    np.testing.assert_allclose(rows, logits[[29, 30, *range(70, 100)]], rtol=0, atol=2e-5)


@pytest.mark.parametrize(("name", "limit"), [("kv-int8", 0.1), ("kv-fp8", 0.5), ("kv-int4", 1.0)])
def test_codes_deviate_a_little_and_take_what_the_plan_says(
    llama: Path, tmp_path: Path, name: str, limit: float
) -> None:
    """Limits: of logits up to 6, for steps of 1/127, 1/16 and 1/7 of the largest element."""
    tokens = _tokens(60)
    options = {"budget": "400MB", "workload": "2x64", "allow": name, "state": name}
    artifact = kvc.compile(llama, output=tmp_path / "m.kvc", **options)
    difference = np.abs(_rows(artifact, tokens, [59]) - OnnxRuntime(llama).logits(tokens)[58:]).max()
    assert 1e-4 < difference < limit
    assert artifact.facts.allowed == (name,)
    assert artifact.plan.forms == (name, name)
    exact = kvc.plan(llama, budget="400MB", workload="2x64")
    ratio = artifact.plan.groups[0].page_bytes / exact.groups[0].page_bytes
    assert ratio == (18 / 128 if name == "kv-int4" else 34 / 128)


def test_a_model_that_was_allowed_to_differ_is_measured_not_judged(llama: Path, tmp_path: Path) -> None:
    from kvc.checks import verify

    options = {"budget": "400MB", "workload": "2x256", "allow": "kv-int4", "state": "kv-int4"}
    kvc.compile(llama, output=tmp_path / "m.kvc", **options)
    text = tmp_path / "text.txt"
    text.write_text("All is well that ends well. " * 8)
    checks = {check.name: check for check in verify(tmp_path / "m.kvc", llama, text=text)}
    assert checks["decode"].measured > 1e-3
    assert all(check.passed for check in checks.values())
    perplexity = checks["perplexity"]
    reference = float(perplexity.detail.split("file's is ")[1].split(";")[0])
    assert 0.8 < perplexity.measured / reference < 1.25
    assert perplexity.measured != pytest.approx(reference, rel=1e-6)
    with pytest.raises(InputError, match="the text cannot be read"):
        verify(tmp_path / "m.kvc", llama, text=tmp_path / "none.txt")
