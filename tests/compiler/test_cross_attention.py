"""Decoders that read an encoder's output: exact, kept once, and never mixed up between requests."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import kvc
from kvc.arguments import add_run
from kvc.chat import converse
from kvc.checks import measure_peak
from kvc.runtime.pages import Pages
from kvc.widen import widen
from kvc_passes.errors import BudgetError, InputError
from support import OnnxRuntime

from .cli_fixtures import Result

pytestmark = pytest.mark.usefixtures("fixed_rates")
ModelFile = Callable[..., Path]
Run = Callable[..., Result]
ROWS, WIDTH = 40, 64
WORKLOAD = f"3x64+{ROWS},1x100+{ROWS}"


def memories(*rows: int) -> list[np.ndarray]:
    random = np.random.default_rng(7)
    return [random.standard_normal((count, WIDTH)).astype(np.float32) for count in rows]


@pytest.fixture(scope="module")
def whisper(
    model_file: ModelFile, tmp_path_factory: pytest.TempPathFactory, fixed_rates: None
) -> kvc.Artifact:
    out = tmp_path_factory.mktemp("cross") / "whisper.kvc"
    return kvc.compile(model_file("tiny-whisper"), budget="300MB", workload=WORKLOAD, output=out)


def check(artifact: kvc.Artifact, model: Path, row: int) -> None:
    """The logits are the model's, and a row of an encoder's output takes `row` bytes."""
    own, cross = artifact.plan.groups
    assert (own.reach.memory, cross.reach.memory) == (False, True)
    assert cross.page_bytes == row * artifact.plan.page_size
    assert cross.pages == 3 * -(-ROWS // artifact.plan.page_size)
    checks = kvc.verify(artifact.path, model)
    assert [check.name for check in checks if not check.passed] == []
    assert max(check.measured for check in checks if check.name != "peak memory") < 2e-5


def test_keys_and_values_of_every_layer(model_file: ModelFile, whisper: kvc.Artifact) -> None:
    check(whisper, model_file("tiny-whisper"), 2 * 2 * 4 * WIDTH)


@pytest.mark.parametrize(
    ("family", "state"),
    [
        ("tiny-bart", "encoder_output"),
        ("tiny-whisper", "x_absorbed,encoder_output"),
        pytest.param("tiny-moonshine", "encoder_output", marks=pytest.mark.slow),
        pytest.param("tiny-t5", "x_absorbed,encoder_output", marks=pytest.mark.slow),
    ],
)
def test_the_encoders_output_once_for_all_layers(
    model_file: ModelFile, tmp_path: Path, family: str, state: str
) -> None:
    model = model_file(family)
    artifact = kvc.compile(model, budget="80MB", workload=WORKLOAD, state=state, output=tmp_path / "m.kvc")
    check(artifact, model, 4 * WIDTH)


def test_half_precision_keeps_half_the_bytes(model_file: ModelFile, tmp_path: Path) -> None:
    model, state = model_file("tiny-whisper", dtype="float16"), "encoder_output"
    artifact = kvc.compile(model, budget="80MB", workload=WORKLOAD, state=state, output=tmp_path / "m.kvc")
    assert artifact.plan.groups[1].page_bytes == artifact.plan.page_size * 2 * WIDTH
    assert artifact.facts.memory == (WIDTH, "float16")
    (memory,) = memories(30)
    tokens = list(range(5, 25))
    rounded = memory.astype(np.float16).astype(np.float32)[None]
    feeds = {"input_ids": np.array([tokens]), "encoder_hidden_states": rounded}
    expected = OnnxRuntime(widen(model, tmp_path / "wide.onnx")).run(feeds)[0][0]
    with kvc.load(artifact.path) as session:
        sequences = session._scheduler.sequences
        kept = sequences.open(tokens, memory)
        got = sequences.prefill([(kept, len(tokens))])[0]
    np.testing.assert_allclose(got, expected[-1], rtol=0, atol=2e-2)


def test_requests_get_what_they_get_alone(whisper: kvc.Artifact) -> None:
    """Rows of different numbers, the same prompt with another memory, and fewer pages than all need."""
    given = memories(40, 1, 17, 40, 33, 16)
    prompts = [[1, 2, 3] * 20, [1, 2, 3] * 20, [9], [4] * 33, [1, 2, 3] * 20, list(range(50))]
    with kvc.load(whisper.path) as session:
        alone = [
            session.generate([prompt], memory=[memory], max_new_tokens=12, ignore_eos=True)[0].tokens
            for prompt, memory in zip(prompts, given)
        ]
        together = session.generate(prompts, memory=given, max_new_tokens=12, ignore_eos=True)
        assert [completion.tokens for completion in together] == alone
        assert len({tuple(tokens) for tokens in (alone[0], alone[1], alone[4])}) == 3
        again = session.generate(prompts[:1] * 2, memory=given[:1] * 2, max_new_tokens=12, ignore_eos=True)
        assert [completion.tokens for completion in again] == alone[:1] * 2
        assert session.stats.shared_tokens > 0
        assert session.stats.pages_used == (0, 0)


def test_a_preempted_request_is_encoded_again(whisper: kvc.Artifact) -> None:
    given = memories(40, 30, 20)
    prompts = [[7, 8, 9], [1] * 17, [2] * 9]
    with kvc.load(whisper.path) as session:
        alone = [
            session.generate([prompt], memory=[memory], max_new_tokens=40, ignore_eos=True)[0].tokens
            for prompt, memory in zip(prompts, given)
        ]
        pool = session._scheduler.state.pools[0]
        assert pool.append(Pages(), pool.count - 8)  # as if the budget had been smaller
        together = session.generate(prompts, memory=given, max_new_tokens=40, ignore_eos=True)
        assert session.stats.preemptions > 0
        assert [completion.tokens for completion in together] == alone


def test_the_smallest_form_is_chosen_where_it_is_needed(model_file: ModelFile, tmp_path: Path) -> None:
    """400 requests' cross-attention: what no budget for K and V holds, the encoder's output does."""
    model, workload = model_file("tiny-whisper"), "400x16+400"
    with pytest.raises(BudgetError) as refused:
        kvc.plan(model, budget="100MB", workload=workload, state="paged_kv")
    with pytest.raises(BudgetError) as least:
        kvc.plan(model, budget="100MB", workload=workload)
    assert least.value.needed < refused.value.needed / 1.5
    artifact = kvc.compile(model, budget=least.value.needed, workload=workload, output=tmp_path / "m.kvc")
    assert [site.kept for site in artifact.facts.sites] == ["x_absorbed", "encoder_output"] * 2
    assert measure_peak(artifact.path) <= artifact.plan.bytes.total <= least.value.needed


def test_what_a_session_refuses(whisper: kvc.Artifact, tmp_path: Path) -> None:
    (memory,) = memories(8)
    wrong = {
        "give one of \\[rows, 64\\]": None,
        "has 41 rows; one request may have 1 to 40": np.zeros((41, WIDTH), np.float32),
        "has 0 rows": np.zeros((0, WIDTH), np.float32),
        "is float32 \\[8, 63\\]": np.zeros((8, 63), np.float32),
        "is int64 \\[8, 64\\]": np.zeros((8, WIDTH), np.int64),
    }
    with kvc.load(whisper.path) as session:
        for message, given in wrong.items():
            with pytest.raises(InputError, match=message):
                session.generate([[1, 2]], memory=None if given is None else [given])
        with pytest.raises(InputError, match="2 prompts, and encoder outputs for 1"):
            session.generate([[1], [2]], memory=[memory])
        assert not session.busy
        one = session.generate([[1, 2]], memory=[memory[None]], max_new_tokens=3)  # with its batch of 1
        assert len(one[0].tokens) > 0


def test_what_a_compile_refuses(model_file: ModelFile) -> None:
    whisper, llama = model_file("tiny-whisper"), model_file("llama")
    with pytest.raises(InputError, match="say how many rows of it a request has, as 2x64\\+1500"):
        kvc.plan(whisper, budget="300MB", workload="2x64")
    with pytest.raises(InputError, match="the model reads none"):
        kvc.plan(llama, budget="300MB", workload="2x64+10")
    with pytest.raises(InputError, match="no layer of the model reads an encoder's output"):
        kvc.plan(llama, budget="300MB", workload="2x64", state="encoder_output")
    with pytest.raises(InputError, match="all layers of a kind have one form"):
        kvc.plan(llama, budget="300MB", workload="2x64", state="x_absorbed,x_gemm")
    with pytest.raises(BudgetError, match="rows of encoders' output"):
        kvc.plan(whisper, budget="1MB", workload="2x64+40")


def test_a_conversation_is_refused(whisper: kvc.Artifact) -> None:
    parser = argparse.ArgumentParser()
    add_run(parser)
    with pytest.raises(InputError, match="reads an encoder's output, which a conversation has not"):
        converse(parser.parse_args([str(whisper.path)]))


def test_the_command(model_file: ModelFile, whisper: kvc.Artifact, run: Run, tmp_path: Path) -> None:
    shown = run("inspect", model_file("tiny-whisper"))
    assert shown.status == 0
    assert "rows of 64 float32 numbers; state 1,024 bytes a row" in shown.out
    assert "an encoder's output" in shown.out
    assert "layer 1 keeps it" in shown.out
    file, text = tmp_path / "memory.npy", tmp_path / "text.npy"
    np.save(file, memories(12)[0])
    text.write_text("rows")
    prompt = ("run", whisper.path, "--no-chat", "--max-new-tokens", "4", "--prompt", "once")
    assert "come with prompts" in run("run", whisper.path, "--memory", file).refusal()
    assert "come with prompts" in run("run", whisper.path, "--encoder-input", f"x={file}").refusal()
    answer = run(*prompt, "--memory", file)
    assert answer.status == 0
    assert "decode 3 tokens" in answer.err
    assert "the model reads an encoder's output: give one" in run(*prompt).refusal()
    assert "cannot be read: it is no .npy file" in run(*prompt, "--memory", text).refusal()
    assert "cannot be read: No such file" in run(*prompt, "--memory", tmp_path / "no.npy").refusal()
    assert (
        "1 prompts, and encoder outputs for 2" in run(*prompt, "--memory", file, "--memory", file).refusal()
    )
