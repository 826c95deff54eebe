"""`kvc tune` measuring, killed and interrupted; models compiled and planned with what was measured."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import kvc
from kvc.artifact import Artifact
from kvc.targets import parse_target
from kvc.tuning.database import NAME, Database
from kvc.tuning.target import targets_of
from kvc.tuning.tasks import Task, find_tasks
from kvc_passes.plans import Workload

from ..cli_fixtures import BUDGET, Result, start
from ..cli_fixtures import kvc as command
from ..test_state_forms import rows
from .tuning_cases import OTHERS, FakeWorker, record, records

Run = Callable[..., Result]
QUICK = (sys.executable, str(Path(__file__).with_name("quick_worker.py")))
KEY = parse_target("cpu").key


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
