"""`kvc tune` and `--tune-db` as a person uses them."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import kvc
from kvc.targets import parse_target
from kvc.tuning.command import parse_time
from kvc.tuning.database import NAME, Database, Record
from kvc.tuning.space import Values
from kvc.tuning.tasks import Task
from kvc_passes.errors import InputError

from ..cli_fixtures import BUDGET, Result, copy_artifact, edit_json, seal
from .tuning_cases import FakeWorker, record, records

Run = Callable[..., Result]
KEY = parse_target("cpu").key


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
