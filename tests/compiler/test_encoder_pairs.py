"""A decoder and its encoder in one artifact and one budget: answers are those of both ONNX files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvc
from kvc.checks import measure_peak
from kvc.options import format_size
from kvc.plan_report import plan_tables
from kvc.planning.decide import Planner
from kvc.planning.saved import SavedPlan, checked, read_plan, save_plan
from kvc.runtime.encoder import random_inputs
from kvc.runtime.pages import Pages
from kvc.runtime.sampler import SamplingParams, sample
from kvc_passes.errors import BudgetError, InputError
from support import OnnxRuntime

from .cli_fixtures import Result
from .encoder_files import wide

pytestmark = pytest.mark.usefixtures("fixed_rates")
ModelFile = Callable[..., Path]
Run = Callable[..., Result]
ROWS, NEW = 40, 6
CHOICE: dict[str, Any] = {"temperature": 2.0, "seed": 3}
"""Random tokens depend on all logits; the likeliest one of a tiny model is the same for any text."""
WORKLOAD = f"2x32+{ROWS}"
WANTED = (kvc.Workload(2, 32, memory=ROWS),)
PROMPTS = [[1, 2, 3], [1, 2, 3], [9] * 7, [4, 5]]


def texts() -> list[dict[str, np.ndarray]]:
    """Token ids of four requests."""
    random = np.random.default_rng(5)
    return [{"input_ids": random.integers(3, 512, (1, length))} for length in (40, 17, 1, 30)]


@pytest.fixture(scope="module")
def bart(model_file: ModelFile, tmp_path_factory: pytest.TempPathFactory, fixed_rates: None) -> kvc.Artifact:
    return compiled(model_file, "tiny-bart", tmp_path_factory.mktemp("pairs") / "bart.kvc")


def compiled(model_file: ModelFile, family: str, out: Path, **options: Any) -> kvc.Artifact:
    encoder = model_file(f"{family}-encoder")
    return kvc.compile(
        model_file(family), encoder=encoder, budget="300MB", workload=WORKLOAD, output=out, **options
    )


class Both:
    """Answers of both files in ONNX Runtime, by the logits of every step and kvc's own choice of tokens."""

    def __init__(self, model_file: ModelFile, family: str) -> None:
        self.encoder = OnnxRuntime(model_file(f"{family}-encoder"))
        self.decoder = OnnxRuntime(model_file(family))

    def answer(self, prompt: list[int], inputs: Mapping[str, np.ndarray]) -> list[int]:
        first = next(iter(inputs.values()))
        masks = {"attention_mask": np.ones_like(first)} if "attention_mask" in self.encoder.inputs else {}
        (rows,) = self.encoder.run({**inputs, **masks})
        tokens, params = list(prompt), SamplingParams(**CHOICE)
        random = np.random.default_rng(params.seed)
        for _ in range(NEW):
            feeds = {"input_ids": np.array([tokens]), "encoder_hidden_states": rows}
            tokens.append(sample(self.decoder.run(feeds)[0][0, -1], params, random))
        return tokens[len(prompt) :]


def answers(session: kvc.Session, prompts: list[list[int]], inputs: Any) -> list[list[int]]:
    options = {"max_new_tokens": NEW, "ignore_eos": True, **CHOICE}
    done = session.generate(prompts, encoder_inputs=inputs, **options)
    return [completion.tokens for completion in done]


def test_answers_are_those_of_both_files(model_file: ModelFile, bart: kvc.Artifact) -> None:
    """More requests than a call holds, of different lengths; the same prompt with another text."""
    both, given = Both(model_file, "tiny-bart"), texts()
    expected = [both.answer(prompt, inputs) for prompt, inputs in zip(PROMPTS, given)]
    assert len(set(map(tuple, expected))) == len(expected)
    with kvc.load(bart.path) as session:
        assert answers(session, PROMPTS, given) == expected
        alone = [answers(session, [p], inputs)[0] for p, inputs in zip(PROMPTS, given)]
        assert alone == expected
        assert session.stats.pages_used == (0, 0)


def test_requests_along_the_first_axis(bart: kvc.Artifact) -> None:
    ids = np.random.default_rng(6).integers(3, 512, (2, 12))
    with kvc.load(bart.path) as session:
        expected = answers(session, PROMPTS[:2], [{"input_ids": row} for row in ids])
        together = {"input_ids": ids.astype(np.int32), "attention_mask": np.ones_like(ids)}
        assert answers(session, PROMPTS[:2], together) == expected
        one = session.stream("a", encoder_inputs={"input_ids": ids[0]}, max_new_tokens=2, ignore_eos=True)
        assert "".join(one)
        text = {"input_ids": ["a text", "another"]}
        ids = [{"input_ids": session.text.encode(each)} for each in text["input_ids"]]
        assert answers(session, PROMPTS[:2], text) == answers(session, PROMPTS[:2], ids)


def test_a_request_that_gives_way_gets_the_same_answer(bart: kvc.Artifact) -> None:
    given, prompts = texts()[:2], [[7, 8, 9], [1] * 5]
    new = 24
    options: dict[str, Any] = {"max_new_tokens": new, "ignore_eos": True, **CHOICE}
    with kvc.load(bart.path) as session:
        alone = [session.generate([p], encoder_inputs=i, **options)[0].tokens for p, i in zip(prompts, given)]
        pool = session._scheduler.state.pools[0]
        assert pool.append(Pages(), pool.count - 3)  # as if the budget had been smaller
        together = session.generate(prompts, encoder_inputs=given, **options)
        assert session.stats.preemptions > 0
        assert [completion.tokens for completion in together] == alone


def test_the_encoders_output_may_still_be_given(model_file: ModelFile, bart: kvc.Artifact) -> None:
    inputs = texts()[1]
    encoder = OnnxRuntime(model_file("tiny-bart-encoder"))
    (rows,) = encoder.run({**inputs, "attention_mask": np.ones_like(inputs["input_ids"])})
    with kvc.load(bart.path) as session:
        (expected,) = answers(session, [[1, 2]], inputs)
        options = {"max_new_tokens": NEW, "ignore_eos": True, **CHOICE}
        done = session.generate([[1, 2]], memory=[rows[0]], **options)
        assert done[0].tokens == expected
        with pytest.raises(InputError, match="output and its inputs were given: give one"):
            session.generate([[1, 2]], memory=[rows[0]], encoder_inputs=[inputs])
        assert not session.busy


def test_every_check_is_kept(model_file: ModelFile, bart: kvc.Artifact) -> None:
    checks = kvc.verify(bart.path, model_file("tiny-bart"), encoder=model_file("tiny-bart-encoder"))
    assert [check.name for check in checks if not check.passed] == []
    assert {"encoder", "encoder and decoder"} <= {check.name for check in checks}
    assert max(check.measured for check in checks if check.name != "peak memory") < 2e-5
    bytes_ = bart.plan.bytes
    assert bart.plan.encoder is not None
    assert bart.plan.encoder.weights < bytes_.weights
    assert bytes_.arena >= bart.plan.encoder.arena
    assert bytes_.encoder >= 3 * 2 * 8 * ROWS  # ids and mask, of a call and of two requests


def test_verifying_another_encoder(model_file: ModelFile, bart: kvc.Artifact, tmp_path: Path) -> None:
    other = wide(tmp_path / "other.onnx", ROWS, 64)
    with pytest.raises(InputError, match="other inputs than the encoder in the artifact"):
        kvc.verify(bart.path, model_file("tiny-bart"), encoder=other)


def test_the_command(bart: kvc.Artifact, run: Run, tmp_path: Path) -> None:
    one, two = tmp_path / "one.npy", tmp_path / "two.npy"
    np.save(one, texts()[0]["input_ids"])
    np.save(two, np.concatenate([texts()[0]["input_ids"]] * 2))
    first = ("run", bart.path, "--no-chat", "--max-new-tokens", "4", "--prompt", "once")
    both = (*first, "--prompt", "twice")
    assert "decode 3 tokens" in run(*first, "--encoder-input", f"input_ids={one}").err
    assert run(*both, "--encoder-input", f"input_ids={two}").status == 0
    twice = run(*both, "--encoder-input", f"input_ids={one}", "--encoder-input", f"input_ids={one}")
    assert twice.status == 0
    refused = run(*both, "--encoder-input", f"input_ids={one}").refusal()
    assert "2 prompts, and the encoder's input 'input_ids' for 1: give one for each prompt, or" in refused
    assert "write it as NAME=FILE.npy" in run(*first, "--encoder-input", one).refusal()
    assert "has no input 'ids'; it reads input_ids" in run(*first, "--encoder-input", f"ids={one}").refusal()
    wanted = "or its inputs: input_ids int64 [1, any], attention_mask int64 [1, any] (optional)"
    assert wanted in run(*first).refusal()


@dataclass(frozen=True)
class Tight:
    """A decoder, an encoder whose temporaries are much larger, and the smallest budget that holds both."""

    model: Path
    encoder: Path
    planner: Planner
    needed: int


@pytest.fixture(scope="module")
def tight(model_file: ModelFile, tmp_path_factory: pytest.TempPathFactory, fixed_rates: None) -> Tight:
    model = model_file("tiny-whisper")
    encoder = wide(tmp_path_factory.mktemp("tight") / "wide.onnx", ROWS, 64)
    planner = kvc.planner(model, encoder=encoder)
    with pytest.raises(BudgetError, match=r"cannot hold the workload 2x32\+40: it needs") as refused:
        planner.decide(10_000_000, WANTED)
    return Tight(model, encoder, planner, refused.value.needed)


def test_an_encoder_takes_less_where_it_must(tight: Tight, tmp_path: Path) -> None:
    """The plan can be saved, and is then obeyed, for this encoder alone."""
    built, needed = tight.planner, tight.needed
    large, small = built.decide(300_000_000, WANTED).plan, built.decide(needed, WANTED).plan
    assert large.encoder is not None
    assert small.encoder is not None
    assert large.encoder.arena == large.encoder.natural == large.bytes.arena
    assert small.encoder.natural == large.encoder.natural
    assert small.encoder.arena <= small.bytes.arena < large.bytes.arena // 10
    assert small.bytes.total <= needed < large.bytes.total
    with pytest.raises(BudgetError):
        built.decide(needed - (3 << 20), WANTED)
    shown = [str(cell) for cell in plan_tables(small, "m")[0].columns[3].cells]
    assert any(f" instead of {format_size(large.encoder.natural)}" in cell for cell in shown)
    file = tmp_path / "plan.json"
    save_plan(file, SavedPlan("tiny-whisper", "cpu", (), small))
    again = checked(built, read_plan(file), file).plan
    assert (again.encoder, again.groups) == (small.encoder, small.groups)
    alone = copy(built)
    alone.encoder = None
    with pytest.raises(InputError, match=r"with the encoder wide: give wide\.onnx as --encoder"):
        checked(alone, read_plan(file), file)
    save_plan(file, SavedPlan("tiny-whisper", "cpu", (), replace(small, encoder=None)))
    with pytest.raises(InputError, match="is a plan without encoder: give none"):
        checked(built, read_plan(file), file)


def test_what_the_command_refuses(model_file: ModelFile, run: Run, tmp_path: Path) -> None:
    pair = ("plan", model_file("tiny-whisper"), "--encoder", wide(tmp_path / "wide.onnx", ROWS, 64))
    budget = ("--budget", "300MB", "--workload")
    assert "room for 39: write BATCHxCONTEXT+40" in run(*pair, *budget, "2x32+39").refusal()
    assert (
        "--encoder-dim n: write it as NAME=N" in run(*pair, *budget, WORKLOAD, "--encoder-dim", "n").refusal()
    )
    alone = run("plan", model_file("tiny-whisper"), *budget, WORKLOAD, "--encoder-dim", "n=3")
    assert "--encoder-dim is for an encoder" in alone.refusal()
    missing = run("plan", model_file("tiny-whisper"), "--encoder", tmp_path / "no.onnx", *budget, WORKLOAD)
    assert "no such file" in missing.refusal()


@pytest.mark.slow
def test_what_is_promised_of_less_is_kept(tight: Tight, tmp_path: Path) -> None:
    artifact = kvc.compile(
        tight.model,
        encoder=tight.encoder,
        budget=tight.needed,
        workload=WORKLOAD,
        output=tmp_path / "tight.kvc",
    )
    checks = kvc.verify(artifact.path, tight.model, encoder=tight.encoder)
    assert [check.name for check in checks if not check.passed] == []
    assert measure_peak(artifact.path) <= artifact.plan.bytes.total <= tight.needed


@pytest.mark.slow
@pytest.mark.parametrize("family", ["tiny-whisper", "tiny-moonshine", "tiny-t5"])
def test_answers_of_other_pairs_are_those_of_both_files(
    model_file: ModelFile, tmp_path: Path, family: str
) -> None:
    artifact = compiled(model_file, family, tmp_path / "pair.kvc")
    facts, plan = artifact.facts.encoder, artifact.plan.encoder
    assert facts is not None
    assert plan is not None
    random, both = np.random.default_rng(4), Both(model_file, family)
    middle = (facts.least + plan.longest) // 2
    given = [random_inputs(facts, n, random) for n in (plan.longest, middle, facts.least)]
    given = [{name: a for name, a in each.items() if name != "attention_mask"} for each in given]
    expected = [both.answer(prompt, inputs) for prompt, inputs in zip(PROMPTS, given)]
    with kvc.load(artifact.path) as session:
        assert answers(session, PROMPTS[:3], given) == expected
    checks = kvc.verify(artifact.path, model_file(family), encoder=model_file(f"{family}-encoder"))
    assert [check.name for check in checks if not check.passed] == []
