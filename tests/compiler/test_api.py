"""`import kvc`: what it costs, and the functions behind the command."""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import kvc
from kvc_passes.facts import to_json
from kvc_passes.plans import plan_from_json

from .cli_fixtures import environment, files_in

HEAVY = ("tvm", "tvm_ffi", "onnx", "torch", "onnxruntime", "transformers", "tokenizers", "numpy", "rich")


def _modules_after(code: str) -> set[str]:
    """Which of the heavy packages a new process has imported after `code`."""
    show = f"import sys; print(*[name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{show}"],
        capture_output=True,
        text=True,
        env=environment(),
        check=True,
    )
    return set(done.stdout.split())


def test_importing_kvc_imports_nothing_heavy() -> None:
    assert _modules_after("import kvc; import kvc.cli; kvc.BudgetError; kvc.__version__; dir(kvc)") == set()


def test_running_imports_the_runtime_alone(artifact: Path) -> None:
    code = (
        f"import kvc\nwith kvc.load({str(artifact)!r}) as session: session.generate('hi', max_new_tokens=2)"
    )
    assert _modules_after(code) == {"tvm_ffi", "tokenizers", "numpy"}


def test_compiling_imports_no_torch(llama: Path) -> None:
    code = f"import kvc; kvc.plan({str(llama)!r}, budget='1GB', workload='1x8')"
    assert not _modules_after(code) & {"torch", "transformers", "onnxruntime"}


def test_every_name_is_there() -> None:
    for name in kvc.__all__:
        assert getattr(kvc, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'frobnicate'"):
        kvc.frobnicate  # noqa: B018
    errors = (kvc.InputError, kvc.UnsupportedModel, kvc.BudgetError, kvc.TargetError, kvc.PlanningError)
    assert all(issubclass(error, kvc.Error) for error in errors)


def test_compile(model: Path, tmp_path: Path) -> None:
    stages: list[str] = []
    timings: list[tuple[str, float, int]] = []
    workload = [kvc.Workload(2, 32), "1x64"]
    built = kvc.compile(
        str(model), budget=200_000_000, workload=workload, report=stages.append, timings=timings
    )
    assert built.path == tmp_path / "model.kvc"
    assert built.plan.budget == 200_000_000
    assert built.plan.workload == (kvc.Workload(2, 32), kvc.Workload(1, 64))
    assert built.facts == kvc.inspect(model)
    assert [name for name, _, _ in timings] == [name for name in stages if name in {t[0] for t in timings}]
    assert all(seconds >= 0 and changed >= 0 for _, seconds, changed in timings)
    assert stages[0] == "import"
    for stage in ("generate code", "link", "write weight"):
        assert any(name.startswith(stage) for name in stages)
    again = kvc.Artifact.open(built.path)
    assert again.plan == built.plan
    with pytest.raises(kvc.InputError, match="--force"):
        kvc.compile(model, budget="1GB", workload="1x8")
    with kvc.load(built.path) as session:
        assert session.generate("hi", max_new_tokens=3)[0].text


def test_inspect_without_a_budget(llama: Path, tmp_path: Path) -> None:
    before = files_in(llama.parent)
    facts = kvc.inspect(llama)
    assert (facts.name, facts.vocab, facts.logits, facts.context) == ("llama", 512, 512, 256)
    assert [(s.heads, s.kv_heads, s.head_dim, s.mask.kind) for s in facts.sites] == [(4, 2, 32, "causal")] * 2
    assert facts.kv_token_bytes() == 2 * 2 * 2 * 32 * 4
    assert files_in(llama.parent) == before


def test_plan(llama: Path, artifact: Path) -> None:
    plan = kvc.plan(llama, budget="1GB", workload="4x64")
    built = kvc.Artifact.open(artifact).plan
    assert abs(plan.bytes.runtime - built.bytes.runtime) <= 4 << 20
    assert dataclasses.replace(plan, bytes=built.bytes) == built
    assert dataclasses.replace(plan.bytes, runtime=built.bytes.runtime) == built.bytes
    assert plan_from_json(to_json(plan)) == plan
    assert plan.bytes.total == sum(dataclasses.astuple(plan.bytes)) <= plan.budget
    assert plan.bytes.weights == sum(-(-s.bytes // 64) * 64 for s in kvc.Artifact.open(artifact).layout())


def test_more_budget_never_gives_less(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvc.machine.measure", lambda *_, **__: 70 << 20)
    with pytest.raises(kvc.BudgetError) as refusal:
        kvc.plan(llama, budget="1MB", workload="4x64")
    assert refusal.value.given == 10**6
    needed = refusal.value.needed
    budgets = [needed, needed + 300_000, needed + 1_000_000, needed + 5_000_000]
    plans = [kvc.plan(llama, budget=budget, workload="4x64") for budget in budgets]
    for plan, budget in zip(plans, budgets):
        assert plan.bytes.total <= budget == plan.budget
        assert plan.groups[0].pages * plan.page_size >= 4 * 64
    for less, more in itertools.pairwise(plans):
        assert more.chunk > less.chunk or (
            more.chunk == less.chunk and more.groups[0].pages >= less.groups[0].pages
        )
    assert plans[-1].groups[0].pages > plans[0].groups[0].pages


def test_errors_from_python(llama: Path, tmp_path: Path) -> None:
    for budget in (0, -5, "8XB"):
        with pytest.raises(kvc.InputError):
            kvc.plan(llama, budget=budget, workload="1x8")
    with pytest.raises(kvc.InputError, match="empty"):
        kvc.plan(llama, budget="1GB", workload=[])
    with pytest.raises(kvc.TargetError, match="'tpu'"):
        kvc.plan(llama, budget="1GB", workload="1x8", target="tpu")
    with pytest.raises(kvc.InputError, match="no such file"):
        kvc.inspect(tmp_path / "missing.onnx")
    with pytest.raises(kvc.InputError, match="no such file"):
        kvc.compile(tmp_path / "missing.onnx", budget="1GB", workload="1x8")
    with pytest.raises(kvc.InputError, match="does not exist"):
        kvc.load(tmp_path / "missing.kvc")


def test_a_report_that_fails_stops_the_compile(llama: Path, tmp_path: Path) -> None:
    class StopError(Exception):
        pass

    def stop(name: str) -> None:
        if name == "flatten-tokens":
            raise StopError

    with pytest.raises(StopError):
        kvc.compile(llama, budget="1GB", workload="1x8", output=tmp_path / "m.kvc", report=stop)
    assert files_in(tmp_path) == {}


@pytest.mark.parametrize("token", [-1, 512, 513, 1 << 40])
def test_token_ids_outside_the_vocabulary(artifact: Path, token: int) -> None:
    with kvc.load(artifact) as session:
        for prompt in ([token], [1, 2, token], [token, 1]):
            with pytest.raises(kvc.InputError, match=rf"token id {token} .* 0 \.\. 511"):
                session.generate([prompt])
        assert session.generate([[511, 0]], max_new_tokens=1)[0].tokens


@pytest.mark.parametrize("token", [1.0, "1", None, True])
def test_token_ids_that_are_no_integers(artifact: Path, token: object) -> None:
    with kvc.load(artifact) as session, pytest.raises(kvc.InputError, match=r"token ids|prompt"):
        session.generate([[1, token]])  # type: ignore[list-item]


def test_prompts_that_cannot_be_served(artifact: Path) -> None:
    with kvc.load(artifact) as session:
        for prompts in ([[]], [""], [[1], []]):
            with pytest.raises(kvc.InputError, match="empty"):
                session.generate(prompts)  # type: ignore[arg-type]
        with pytest.raises(kvc.InputError, match=str(session.limit)):
            session.generate([[1] * (session.limit + 1)])
        assert session.generate([[1] * session.limit], max_new_tokens=1)[0].finish_reason
        assert session.generate([]) == []
        tokens = np.array([3, 4, 5])
        assert session.generate([tokens], max_new_tokens=2)[0].prompt_tokens == [3, 4, 5]
    with pytest.raises(kvc.InputError, match="closed"):
        session.generate("hi")


def test_answers_do_not_depend_on_company(artifact: Path) -> None:
    """One by one, streamed, and more prompts together than fit at once."""
    prompts = [f"Once upon a time there were {n} small machines" for n in range(9)]
    with kvc.load(artifact) as session:
        assert len(prompts) > kvc.Artifact.open(artifact).plan.max_batch
        together = [c.text for c in session.generate(prompts, max_new_tokens=12)]
        alone = [session.generate(p, max_new_tokens=12)[0].text for p in prompts]
        streamed = ["".join(session.stream(p, max_new_tokens=12)) for p in prompts]
    assert together == alone == streamed
    assert len(set(together)) > 1


def test_tokens_as_they_come(artifact: Path) -> None:
    seen: dict[int, list[tuple[int, str]]] = {0: [], 1: []}
    with kvc.load(artifact) as session:
        done = session.generate(
            ["The weights", "Every token"],
            max_new_tokens=6,
            on_token=lambda index, token, text: seen[index].append((token, text)),
        )
    for index, completion in enumerate(done):
        assert [token for token, _ in seen[index]] == completion.tokens
        assert "".join(text for _, text in seen[index]) == completion.text


def test_what_replaces_a_loaded_model_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system remembers libraries by their path."""
    monkeypatch.setattr("kvc.machine.measure", lambda *args, **options: 100 << 20)
    for name in ("llama", "gpt2"):
        model = Path(__file__).parents[1] / "fixtures" / "optimum" / f"{name}.onnx"
        artifact = kvc.compile(model, budget="300MB", workload="1x16", output=tmp_path / "m.kvc", force=True)
        assert artifact.facts.name == name
        kvc.load(artifact.path).close()  # loading runs the largest calls, which fail with another's weights
