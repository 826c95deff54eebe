"""`kvc tune` and `--tune-db` as a person uses them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvc
from kvc.artifact import Artifact
from kvc.targets import parse_target
from kvc.tuning.command import parse_time
from kvc.tuning.database import NAME, Database, Record
from kvc.tuning.space import Values
from kvc.tuning.target import targets_of
from kvc.tuning.tasks import Task, find_tasks
from kvc_passes.errors import InputError
from kvc_passes.plans import Workload

from ..cli_fixtures import BUDGET, Result, copy_artifact, edit_json, seal, start
from ..cli_fixtures import kvc as command
from ..test_state_forms import rows
from .tuning_cases import OTHERS, FakeWorker, record

Run = Callable[..., Result]
QUICK = (sys.executable, str(Path(__file__).with_name("quick_worker.py")))
KEY = parse_target("cpu").key


def times(task: Task, values: Values, n: int) -> float:
    """Half the time with the parameters of OTHERS."""
    return 0.5 if values.items() <= OTHERS[task.kernel].items() else 1.1


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeWorker:
    """Nothing is measured; times are made up."""
    worker = FakeWorker(times)
    monkeypatch.setattr("kvc.tuning.api.Worker", lambda *_: worker)
    return worker


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / NAME).read_text().splitlines()]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("MODEL",), "say where the records are kept: --db DIR"),
        (("--db", "DB"), "which model? give an ONNX file or an artifact"),
        (("MODEL", "--db", "DB", "--trials", "0"), "--trials 0: at least one candidate"),
        (("MODEL", "--db", "DB", "--trials", "-3"), "--trials -3: at least one candidate"),
        (("MODEL", "--db", "DB", "--trials", "many"), "argument --trials: invalid int value: 'many'"),
        (("MODEL", "--db", "DB", "--time", "soon"), "--time soon: write it as 90s, 30m or 2h"),
        (("MODEL", "--db", "DB", "--time", "0"), "--time 0: write it as"),
        (("MODEL", "--db", "DB", "--time", "5d"), "--time 5d: write it as"),
        (("MODEL", "--db", "DB", "--time", "nan"), "--time nan: write it as"),
        (("MODEL", "--db", "DB", "--timeout", "0"), "--timeout 0: a candidate needs some time"),
        (("MODEL", "--db", "DB", "--timeout", "nan"), "--timeout nan: a candidate needs some time"),
        (("MODEL", "--db", "DB", "--kernels", "conv"), "--kernels conv: there are: gemm, attention"),
        (("MODEL", "--db", "DB", "--kernels", "gemm,"), "--kernels : there are: gemm, attention"),
        (
            ("MODEL", "--db", "DB", "--rpc", "localhost:9190"),
            "--rpc HOST:PORT and --key NAME belong",
        ),
        (("MODEL", "--db", "DB", "--key", "k"), "--rpc HOST:PORT and --key NAME belong"),
        (("MODEL", "--db", "DB", "--rpc", "localhost", "--key", "k"), "write it as HOST:PORT"),
        (
            ("MODEL", "--db", "DB", "--target", "cuda:sm_90"),
            "kernels are measured on a GPU, and this machine has none of use",
        ),
        (("MODEL", "--db", "DB", "--target", "cuda:sm_90"), "give --rpc HOST:PORT and --key NAME of servers"),
        (
            ("MODEL", "--db", "DB", "--target", "cuda:sm_80,sm_90"),
            "the kernels of one architecture are tuned at a time: give --target cuda:sm_80 or ",
        ),
        (
            ("MODEL", "--db", "DB", "--target", "cuda:sm_90", "--rpc", "h:9190", "--key", "k"),
            "what the servers' GPUs have free is not known here: give a --budget",
        ),
        (("MODEL", "--db", "DB", "--target", "tpu"), "unknown target 'tpu'"),
        (("MODEL", "--db", "DB", "--budget", "much"), "'much' is not a size"),
        (("MODEL", "--db", "DB", "--budget", "1MB"), "cannot hold the workload"),
        (("MODEL", "--db", "DB", "--workload", "1x9999"), "the model has 256 positions"),
        (("MODEL", "--db", "DB", "--plot", "c.pdf"), "the picture is written as .svg or .png"),
        (("MODEL", "--db", "/proc/none"), "cannot be written"),
        (("MODEL", "--db", "DB", "--merge", "DB"), "give no model"),
        (("--db", "DB", "--merge", "missing"), "there is no database of kvc tune"),
        (("missing.onnx", "--db", "DB"), "missing.onnx"),
    ],
)
def test_what_cannot_be_tuned(
    run: Run, llama: Path, tmp_path: Path, fake: FakeWorker, arguments: tuple[str, ...], message: str
) -> None:
    """Nothing is made, either."""
    given = {"MODEL": llama, "DB": tmp_path / "db"}
    assert message in run("tune", *(given.get(a, a) for a in arguments)).refusal()
    assert not (tmp_path / "db").exists()
    assert fake.asked == []


def test_a_tracker_that_is_not_there(run: Run, llama: Path, tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        message = run("tune", llama, "--db", tmp_path, "--rpc", address, "--key", "k").refusal()
    assert f"--rpc {address}: no tracker of TVM's RPC can be reached there" in message


def test_help_says_what_there_is(run: Run) -> None:
    result = run("tune", "--help")
    assert result.status == 0
    for option in ("--db", "--trials", "--time", "--kernels", "--rpc", "--key", "--merge", "--plot"):
        assert option in result.out


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("30m", 1800), ("1.5h", 5400), ("7", 7), (" 2m ", 120)]
)
def test_times_as_a_person_writes_them(text: str, seconds: float) -> None:
    assert parse_time(text) == seconds
    for wrong in ("", "s", "-1s", "1 m", "1e3", "inf", "0h", "1d"):
        with pytest.raises(InputError, match="write it as"):
            parse_time(wrong)


@pytest.mark.parametrize("contents", ["hello\n", "{}\n", "\x00" * 50 + "\n"])
def test_a_database_of_something_else(
    run: Run, llama: Path, tmp_path: Path, fake: FakeWorker, contents: str
) -> None:
    (tmp_path / NAME).write_text(contents)
    for arguments in (
        ("tune", llama, "--db", tmp_path, "--trials", "1"),
        ("compile", llama, *BUDGET, "--tune-db", tmp_path, "-o", tmp_path / "m.kvc"),
        ("plan", llama, *BUDGET, "--tune-db", tmp_path),
    ):
        assert "no line of it is a record of kvc tune" in run(*arguments).refusal()
    assert (tmp_path / NAME).read_text() == contents
    assert fake.asked == []
    assert not (tmp_path / "m.kvc").exists()


def test_no_database_to_compile_with(run: Run, llama: Path, tmp_path: Path) -> None:
    message = run("compile", llama, *BUDGET, "--tune-db", tmp_path / "no", "-o", tmp_path / "m.kvc").refusal()
    assert f"{tmp_path / 'no'}: there is no database of kvc tune" in message
    message = run("plan", llama, *BUDGET, "--tune-db", tmp_path, "--target", "cuda:sm_90").refusal()
    assert "there is no database of kvc tune" in message


def test_a_run_says_what_it_found(run: Run, llama: Path, tmp_path: Path, fake: FakeWorker) -> None:
    result = run("tune", llama, *BUDGET, "--db", tmp_path, "--trials", "25")
    assert (result.status, result.err) == (0, "")
    assert f"{tmp_path / NAME}: 25 candidates measured; kvc compile --tune-db {tmp_path}" in " ".join(
        result.out.split()
    )
    assert "all of them together: " in result.out
    found = records(tmp_path)
    assert len(found) == len(fake.asked) - sum(asked[2] == 21 for asked in fake.asked) == 25
    assert {r["target"] for r in found} == {KEY}
    better = {r["task"]: r["knobs"] for r in found if r["outcome"] == "better"}
    assert result.out.count(" 2.000 ") == len(better) > 0
    first = [next(iter(knobs.items())) for knobs in better.values() if len(knobs) == 1]
    assert first
    assert all(f"{name} {value} (" in result.out for name, value in first)  # and the default
    again = run("tune", llama, *BUDGET, "--db", tmp_path, "--trials", "5")
    assert again.status == 0
    assert records(tmp_path)[:25] == found
    assert len(records(tmp_path)) == 30


def test_kernels_of_one_kind_alone(run: Run, llama: Path, tmp_path: Path, fake: FakeWorker) -> None:
    for name, kinds in (("gemm", {"product_few", "product_many"}), ("attention", {"prefill", "decode"})):
        assert run("tune", llama, "--db", tmp_path / name, "--trials", "9", "--kernels", name).status == 0
        assert {r["task"].split()[0] for r in records(tmp_path / name)} == kinds


def test_a_time_limit(run: Run, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(task: Task, values: Values, n: int) -> float:
        time.sleep(0.3)
        return 1.0

    monkeypatch.setattr("kvc.tuning.api.Worker", lambda *_: FakeWorker(slow))
    assert run("tune", llama, "--db", tmp_path, "--time", "0.2s").status == 0
    assert len(records(tmp_path)) == 1


@pytest.mark.parametrize(("name", "begin"), [("c.svg", b"<?xml"), ("c.png", b"\x89PNG")])
def test_the_picture(
    run: Run, llama: Path, tmp_path: Path, fake: FakeWorker, name: str, begin: bytes
) -> None:
    result = run("tune", llama, "--db", tmp_path, "--trials", "6", "--plot", tmp_path / name)
    assert (result.status, result.err) == (0, "")
    assert (tmp_path / name).read_bytes().startswith(begin)


def test_a_picture_that_cannot_be_written(run: Run, llama: Path, tmp_path: Path, fake: FakeWorker) -> None:
    """The records are there all the same."""
    path = tmp_path / "none" / "c.svg"
    result = run("tune", llama, "--db", tmp_path, "--trials", "2", "--plot", path)
    assert result.status == 0
    assert f"{path}: cannot be written" in result.err
    assert len(records(tmp_path)) == 2


def test_pictures_without_matplotlib(
    run: Run, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name)
    )
    message = run("tune", llama, "--db", tmp_path / "db", "--plot", "c.svg").refusal()
    assert "pip install 'kvc[plot]'" in message


def test_merged_databases(run: Run, tmp_path: Path) -> None:
    for name, some in (("a", [record()]), ("b", [record(), record(target="other")])):
        database = Database(tmp_path / name)
        database.create()
        database.append(*some)
    merge = ("tune", "--db", tmp_path / "all", "--merge", tmp_path / "a", tmp_path / "b")
    assert run(*merge) == Result(0, f"{tmp_path / 'all'}: 2 records added\n", "")
    assert run(*merge).out.endswith(": 0 records added\n")
    assert len(records(tmp_path / "all")) == 2


def test_an_artifact_is_tuned(run: Run, artifact: Path, tmp_path: Path, fake: FakeWorker) -> None:
    """Its kernels are those of the model it was made of; the model is not needed."""
    result = run("tune", artifact, "--db", tmp_path / "db", "--trials", "8")
    assert (result.status, result.err) == (0, "")
    data = json.loads((artifact / "tasks.json").read_text())
    keys = {Task.of(task).key for task in data["tasks"]}
    assert {r["task"] for r in records(tmp_path / "db")} <= keys
    assert len(records(tmp_path / "db")) == 8


def test_an_artifact_that_does_not_say_its_kernels(run: Run, artifact: Path, tmp_path: Path) -> None:
    copy = copy_artifact(artifact, tmp_path)
    edit_json(copy / "manifest.json", lambda data: data["files"].pop("tasks.json"))
    message = run("tune", copy, "--db", tmp_path / "db").refusal()
    assert "does not say what its kernels are; tune its ONNX file" in message


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"tasks": [{}], "predicted": 1}', '{"tasks": 3}'])
def test_an_artifact_whose_tasks_are_damaged(run: Run, artifact: Path, tmp_path: Path, text: str) -> None:
    copy = copy_artifact(artifact, tmp_path)
    (copy / "tasks.json").write_text(text)
    seal(copy)
    assert "tasks.json" in run("tune", copy, "--db", tmp_path / "db").refusal()
    assert not (tmp_path / "db").exists()


def test_a_folder_that_is_no_artifact(run: Run, tmp_path: Path) -> None:
    assert str(tmp_path) in run("tune", tmp_path, "--db", tmp_path / "db").refusal()


def forced(model: Path, folder: Path, workload: Workload) -> list[Task]:
    """A database that says of every kernel of a plan that OTHERS are better."""
    built = kvc.planner(model, state="paged_kv")
    tasks = find_tasks(built.decide(1_000_000_000, (workload,)), targets_of(built.machine)[0])
    database = Database(folder)
    database.create()
    database.append(*(record(task, target=KEY, knobs=OTHERS[task.kernel]) for task in tasks))
    return list(tasks)


def test_what_is_compiled_with_other_parameters_computes_the_same(
    run: Run, model_file: Callable[..., Path], tmp_path: Path
) -> None:
    """gemma2 has layers with a window and without, whose prefill has one tile."""
    model, work = model_file("gemma2"), ("--budget", "1GB", "--workload", "4x200", "--state", "paged_kv")
    plain, tuned = tmp_path / "plain.kvc", tmp_path / "tuned.kvc"
    tasks = forced(model, tmp_path / "db", Workload(4, 200))
    assert {task.kernel for task in tasks} == set(OTHERS)
    assert run("compile", model, *work, "-o", plain).status == 0
    result = run("compile", model, *work, "-o", tuned, "--tune-db", tmp_path / "db")
    assert result.status == 0
    table = result.out[: result.out.index("4x200")]
    assert table.count("measured") == len(tasks)
    assert table.count("accumulators 16, ahead 32") == sum(t.kernel == "product_few" for t in tasks)
    assert "transferred" not in table
    tokens = [int(t) for t in np.random.default_rng(0).integers(0, 512, 120)]
    one, other = (rows(Artifact.open(path), tokens, [30, 1, 60]) for path in (plain, tuned))
    np.testing.assert_allclose(other, one, rtol=0, atol=1e-4)
    assert (other != one).any()


def test_records_of_no_use_are_noted_and_change_nothing(llama: Path, artifact: Path, tmp_path: Path) -> None:
    database = Database(tmp_path)
    database.create()
    database.append(record(target="another CPU"), record(target=KEY, version="0"))
    result = command("compile", llama, *BUDGET, "-o", tmp_path / "m.kvc", "--tune-db", tmp_path)
    assert result.status == 0
    notes = result.err.splitlines()
    assert [note.partition(f"{NAME}: ")[2] for note in notes] == [
        "1 records ignored: for another target",
        "1 records ignored: of other kernels, measured before this version",
        "no record is of use here",
    ]
    assert all(note.startswith("kvc: note: ") for note in notes)
    assert "measured" not in result.out.split("4x64")[0]
    for name in ("tasks.json", "weights.safetensors"):
        assert (tmp_path / "m.kvc" / name).read_bytes() == (artifact / name).read_bytes()
    tokens = [int(t) for t in np.random.default_rng(0).integers(0, 512, 40)]
    one, other = (rows(Artifact.open(path), tokens, [30]) for path in (artifact, tmp_path / "m.kvc"))
    assert (one == other).all()


def test_plans_know_what_was_measured(run: Run, llama: Path, tmp_path: Path) -> None:
    forced(llama, tmp_path, Workload(4, 64))
    work = (*BUDGET, "--state", "paged_kv", "--json")
    plain = json.loads(run("plan", llama, *work).out)
    tuned = json.loads(run("plan", llama, *work, "--tune-db", tmp_path).out)
    # 0.8 ms a call of tiny products is more than the rates of any machine say.
    assert tuned["times"][0]["decode_seconds"] > 2 * plain["times"][0]["decode_seconds"]
    assert "as tuned" in json.dumps(tuned)


def test_a_real_run_and_what_it_is_good_for(
    run: Run, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvc.tuning.runner.Worker.command", QUICK)
    result = run("tune", llama, *BUDGET, "--db", tmp_path, "--trials", "8")
    assert (result.status, result.err) == (0, "")
    found = records(tmp_path)
    assert len(found) == 8
    assert {r["outcome"] for r in found} <= {"better", "worse", "even"}
    result = run("plan", llama, *BUDGET, "--tune-db", tmp_path, "--json")
    assert (result.status, result.err) == (0, "")
    assert "as tuned" in result.out


def _wait_for_records(folder: Path, count: int, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 120
    while not (folder / NAME).exists() or len((folder / NAME).read_text().splitlines()) < count:
        assert time.monotonic() < end
        assert process.poll() is None
        time.sleep(0.02)


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_a_run_that_is_killed_is_gone_on_with(
    run: Run, llama: Path, tmp_path: Path, fake: FakeWorker
) -> None:
    """Its process that measures ends, too."""
    process = start("tune", llama, *BUDGET, "--db", tmp_path / "db", TMPDIR=str(tmp_path))
    try:
        _wait_for_records(tmp_path / "db", 2, process)
        threads = Path(f"/proc/{process.pid}/task").glob("*/children")
        children = [child for path in threads for child in path.read_text().split()]
        assert children
        os.kill(process.pid, signal.SIGKILL)
        process.communicate(timeout=60)
        end = time.monotonic() + 60
        while any(_alive(int(child)) for child in children):
            assert time.monotonic() < end
            time.sleep(0.05)
    finally:
        process.kill()
    database = Database(tmp_path / "db")
    kept = database.read(KEY).records
    assert len(kept) >= 2
    assert run("tune", llama, *BUDGET, "--db", tmp_path / "db", "--trials", "3").status == 0
    after = database.read(KEY)
    assert after.records[: len(kept)] == kept
    assert len(after.records) == len(kept) + 3
    tried = {(r.task, tuple(r.knobs.items())) for r in kept}
    assert len({(r.task, tuple(r.knobs.items())) for r in after.records}) == len(tried) + 3


def test_an_interrupt_keeps_the_records(llama: Path, tmp_path: Path) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    process = start("tune", llama, *BUDGET, "--db", tmp_path / "db", TMPDIR=str(temporary))
    try:
        _wait_for_records(tmp_path / "db", 1, process)
        os.kill(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, out, err) == (130, "", "kvc: interrupted\n")
    assert Database(tmp_path / "db").read(KEY).broken == 0
    assert list(temporary.glob("kvc-tune-*")) == []


def test_tune_as_a_function(llama: Path, tmp_path: Path, fake: FakeWorker) -> None:
    stages: list[str] = []
    trials: list[Any] = []
    outcome = kvc.tune(
        llama, db=tmp_path, trials=10, workload="2x100", on_trial=trials.append, report=stages.append
    )
    assert len(trials) == 10
    assert stages[-1] == "measure"
    assert outcome.database == tmp_path / NAME
    assert outcome.predicted > 0
    assert sum(t.trials for t in outcome.tasks) == 10
    assert [Record.of(data) for data in records(tmp_path)] == [t.record for t in trials]
    for options in ({"trials": 0}, {"seconds": -1.0}, {"seconds": 0}, {"timeout": 0}, {"kernels": ["conv"]}):
        with pytest.raises(InputError):
            kvc.tune(llama, db=tmp_path, **options)  # type: ignore[arg-type]
