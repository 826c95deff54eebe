"""A whole tuning run for a GPU, on a pretend one: its times mean nothing, everything else is real."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tvm import IRModule

import kvc
from kvc.cuda_machine import CudaMachine
from kvc.kernels.attention import AttentionShape
from kvc.kernels.cuda.device import Compiled, DeviceKernel
from kvc.kernels.cuda.knobs import BY_ENGINE, DEFAULTS, Defaults, PrefillKnobs
from kvc.pipeline import Runner
from kvc.tuning.cuda import CudaTarget
from kvc.tuning.database import NAME, Database, Record
from kvc.tuning.records import Choice
from kvc.tuning.tasks import TASKS, Task
from kvc_passes.errors import PlanningError
from support import site

from ..test_cuda import LIMITS, Built, worst
from ..test_cuda import run as run_artifact

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[3]
TARGET = CudaTarget("sm_90")
WORK = ("--target", "cuda:sm_90", "--budget", "2GB", "--workload", "2x64")


@dataclass
class Run:
    """A run of kvc tune, and the records that it left behind."""

    process: subprocess.CompletedProcess[str]
    records: list[dict[str, Any]]


@pytest.fixture(scope="module")
def llama(model_file: Callable[..., Path]) -> Path:
    return model_file("llama", True, "float16")


@pytest.fixture(scope="module")
def tune(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    libraries, db = tmp_path_factory.mktemp("libraries"), tmp_path_factory.mktemp("records")
    paths = [str(ROOT / name) for name in ("tests", "compiler", "passes", "models")]

    def run(*arguments: str, **machine: str) -> Run:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **machine}
        command = [sys.executable, "-m", "pretend_gpu.run_tune", str(libraries), "tune", str(llama)]
        process = subprocess.run(
            [*command, *WORK, "--db", str(db), "--timeout", "600", *arguments],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=1200,
        )
        file = db / NAME
        lines = file.read_text().splitlines() if file.exists() else []
        return Run(process, [json.loads(line) for line in lines])

    return run


@pytest.fixture(scope="module")
def runs(tune: Callable[..., Run]) -> list[Run]:
    """A candidate of each kind of kernel, one of which computes something else; then, going on, one more."""
    return [
        tune("--trials", "3", PRETEND_WRONG="keys=16"),
        tune("--trials", "1", "--kernels", "attention"),
    ]


def test_a_run_measures_and_records(runs: list[Run]) -> None:
    assert [(run.process.returncode, run.process.stderr) for run in runs] == [(0, "")] * 2
    wrong, *others = runs[1].records
    assert (wrong["outcome"], wrong["knobs"]) == ("wrong", {"keys": 16})
    assert "2 rows: the result differs by" in wrong["detail"]
    for found in others:
        assert found["outcome"] in ("better", "worse", "even"), found
        assert all(seconds > 0 for seconds in (*found["seconds"], *found["default"]))
        assert len(found["seconds"]) == len(found["sizes"]) == len(found["default"])
    assert {(r["target"], r["version"]) for r in runs[1].records} == {("sm_90", TARGET.version)}
    kernels = [r["task"].split()[0] for r in runs[1].records]
    assert kernels == ["gpu_decode", "gpu_prefill", "gpu_product", "gpu_decode"]
    assert [found["knobs"] for found in others[:2]] == [{"copy": BY_ENGINE}] * 2


def test_a_run_goes_on_where_records_end(runs: list[Run]) -> None:
    first, second = (run.records for run in runs)
    assert second[:3] == first
    assert second[3]["knobs"] not in ({}, {"keys": 16})


def test_what_was_measured_is_compiled_and_computes_the_same(
    runs: list[Run], llama: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """With valid candidates as if they had been the best: a GPU would say which are."""
    folder = Database(tmp_path / "db")
    folder.create()
    valid = [r for r in runs[1].records if r["outcome"] not in ("wrong", "failed")]
    valid += [
        {**r, "knobs": {**r["knobs"], "splits": 3}} for r in valid if r["task"].startswith("gpu_decode")
    ]
    for number, each in enumerate(valid):
        folder.append(Record.of({**each, "outcome": "better", "share": 0.9 - number / 100}))
    chosen: list[tuple[str, Choice]] = []
    built = Built(llama, tmp_path / "m.kvc", tmp_path / "dump")
    artifact = kvc.compile(
        llama,
        target="cuda:sm_90",
        budget="2GB",
        workload="2x64",
        output=built.artifact,
        dump=built.dump,
        tune_db=tmp_path / "db",
        kernels=chosen,
    )
    sources = [choice.source for _, choice in chosen]
    assert sources.count("measured") == 3
    assert {choice.values.get("splits") for _, choice in chosen} == {None, 3}
    entries = json.loads((built.artifact / "kernels.json").read_text())
    boxed = {e["function"] for e in entries if "tensordesc" in str(e["types"])}
    assert boxed == {"attention.prefill", "products.boxed"}
    (merge,) = (dict(map(tuple, e["constants"])) for e in entries if e["function"] == "attention.merge")
    assert merge["SP"] == 4  # places for 3 shares
    (decode,) = (dict(map(tuple, e["constants"])) for e in entries if e["function"] == "attention.decode")
    knobs = next(r["knobs"] for r in valid if "splits" in r["knobs"])
    assert decode["BN"] == knobs.get("keys", 64)
    file = artifact.file(TASKS)
    assert file is not None
    tasks = [Task.of(task) for task in json.loads(file.read_text())["tasks"]]
    assert {r["task"] for r in runs[1].records} <= {task.key for task in tasks}
    done = run_artifact(built, tmp_path_factory.mktemp("libraries"))
    assert done.returncode == 0, done.stderr
    assert worst(built, tmp_path) < LIMITS["float16"]


class Large(Defaults):
    """More keys a block than the registers of so few warps hold."""

    def prefill(self, arch: int, shape: AttentionShape, tile: int) -> PrefillKnobs:
        return PrefillKnobs(keys=128, warps=1)


SITE = site(heads=4, kv_heads=2, head_dim=32, value_dim=32, kv_dtype="float16")


def attention(machine: CudaMachine) -> IRModule:
    function = machine.attention((SITE,), 1024).prefill(SITE, "float16")
    return IRModule({"prefill": function.with_attr("global_symbol", "prefill")})


def compiling(monkeypatch: pytest.MonkeyPatch, least: int) -> None:
    """Kernels of fewer than `least` warps do not compile."""

    def compiled(kernel: DeviceKernel, arch: int) -> Compiled:
        if kernel.warps < least:
            raise PlanningError(f"kernel {kernel.name} for sm_{arch} spills")
        return Compiled(b"", "", 0, 100, 0, kernel.warps)

    monkeypatch.setattr("kvc.cuda_machine.compile_kernel", compiled)


def test_transferred_parameters_that_do_not_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel is as by default then, and a note says so."""
    compiling(monkeypatch, least=2)
    machine, plain = CudaMachine(("sm_90",), knobs=Large()), CudaMachine(("sm_90",))
    module = attention(machine)
    with pytest.warns(UserWarning, match=r"kernel kvc_attention_prefill_\w+ .*: it is built as by default"):
        made, code = machine._compiled(module, "sm_90", Runner())
    assert machine.launched(module) != machine.launched(made)
    assert sorted(code) == machine.launched(made) == plain.launched(attention(plain))


@pytest.mark.parametrize("tuned", [True, False])
@pytest.mark.filterwarnings("ignore:.*it is built as by default")
def test_what_does_not_compile_as_by_default(monkeypatch: pytest.MonkeyPatch, tuned: bool) -> None:
    compiling(monkeypatch, least=100)
    machine = CudaMachine(("sm_90",), knobs=Large() if tuned else DEFAULTS)
    with pytest.raises(PlanningError, match="spills"):
        machine._compiled(attention(machine), "sm_90", Runner())
