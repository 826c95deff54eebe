"""What was measured on GPUs, in plans and libraries: records of several architectures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tvm import relax, tirx

import kvc
from kvc.cuda_machine import CudaMachine
from kvc.kernels.cuda import knobs as cuda
from kvc.kernels.cuda.launches import launched
from kvc.planning.rates import nominal_gpu
from kvc.tuning import database
from kvc.tuning.cuda_programs import product_of, site_of
from kvc.tuning.database import Database
from kvc.tuning.records import Choice, CudaRecords
from kvc.tuning.tasks import Task, find_tasks
from kvc.tuning.tuned import chosen_kernels, with_records
from kvc_passes.plans import Workload

from .cuda_cases import CODES, SHAPE, TARGET, decode, measured, prefill, product
from .tuning_cases import record

pytest.importorskip("triton")

ModelFile = Callable[..., Path]


def test_the_version_is_that_of_the_cuda_templates(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "cuda").mkdir()
    found = []
    for cpu, gpu in (("a", "a"), ("b", "a"), ("b", "b")):
        (tmp_path / "matmul.py").write_text(cpu)
        (tmp_path / "cuda" / "triton_products.py").write_text(gpu)
        monkeypatch.setattr("kvc.kernels.__file__", str(tmp_path / "__init__.py"))
        database.version.cache_clear()
        found.append((database.version(), TARGET.version))
    monkeypatch.undo()
    database.version.cache_clear()
    assert found[0][0] != found[1][0] == found[2][0]
    assert len({of_gpu for _, of_gpu in found}) == 3  # which depend on what shapes are, too


def test_records_are_for_their_architecture() -> None:
    known = CudaRecords({90: [measured(decode(), knobs={"keys": 32})], 80: [measured(prefill(), "sm_80")]})
    assert known.decode(90, SHAPE, 33) == cuda.DecodeKnobs(keys=32)
    assert known.decode(80, SHAPE, 33) == cuda.DecodeKnobs()
    assert known.prefill(80, SHAPE, 32) == cuda.PrefillKnobs(stages=2)
    assert known.prefill(90, SHAPE, 32) == cuda.PrefillKnobs()
    assert known.attention_times(90, SHAPE) == ([], [(3, 100, 0.8e-3)])


def test_tiles_and_shares_are_of_use_for_one_architecture_alone() -> None:
    """What is best without them is taken where an artifact has several."""
    some = [
        measured(decode(), knobs={"keys": 32}, share=0.9),
        measured(decode(), knobs={"splits": 8, "keys": 32}, share=0.7),
        measured(prefill(), knobs={"tile": 16}),
    ]
    one, two = CudaRecords({90: some}), CudaRecords({90: some, 80: []})
    assert one.decode(90, SHAPE, 33) == cuda.DecodeKnobs(keys=32, splits=8)
    assert one.prefill(90, SHAPE, 32).tile == 16
    assert two.decode(90, SHAPE, 33) == cuda.DecodeKnobs(keys=32)
    assert two.prefill(90, SHAPE, 32) == cuda.PrefillKnobs()


@pytest.mark.parametrize(
    ("task", "source"),
    [
        (product(), "measured"),
        (product(8192), "transferred"),
        (product(residual=True), "transferred"),
        (product(40000), "default"),
        (product(most=64), "default"),
        (product(dtype="bfloat16"), "default"),
        (product(format=CODES), "default"),
        (decode(splits=8), "transferred"),
        (decode(replace(SHAPE, heads=16, kv_heads=4)), "transferred"),
        (decode(replace(SHAPE, heads=16)), "default"),
        (prefill(), "default"),
    ],
)
def test_what_is_near(task: Task, source: str) -> None:
    known = CudaRecords({90: [measured(product()), measured(decode())]})
    assert known.of[90].of(task).source == source
    values = {"stages": 2} if source != "default" else {}
    if task.kernel == "gpu_product":
        assert known.product(90, product_of(task)) == cuda.ProductKnobs(**values)


def test_plans_and_libraries_know_what_was_measured(model_file: ModelFile, tmp_path: Path) -> None:
    """Of two architectures one has records: its kernels alone are others, and say so."""
    model, target = model_file("llama", True, "float16"), "cuda:sm_80,sm_90"
    plain = kvc.planner(model, target=target)
    before = plain.decide(2_000_000_000, (Workload(4, 64),))
    tasks = find_tasks(before, TARGET)
    folder = Database(tmp_path)
    folder.create()
    folder.append(
        *(measured(task) for task in tasks), measured(tasks[0], version="0"), record(target="a CPU")
    )
    with pytest.warns(UserWarning, match="records ignored") as notes:
        tuned = kvc.planner(model, target=target, tune_db=tmp_path)
    assert [str(n.message).partition("jsonl: ")[2] for n in notes] == [
        "1 records ignored: for another target",
        "1 records ignored: of other kernels, measured before this version",
    ]
    after = tuned.decide(2_000_000_000, (Workload(4, 64),))
    chosen = dict(chosen_kernels(after, tuned.machine))
    assert chosen == {
        **{f"sm_80: {task.name}": Choice("default", {}) for task in tasks},
        **{f"sm_90: {task.name}": Choice("measured", {"stages": 2}, 0.8) for task in tasks},
    }
    for phase in ("prefill", "decode"):
        own, other = (d.variant.lowered for d in (after, before))
        for arch in (80, 90):
            names = []
            for lowered in (own, other):
                assert isinstance(lowered.machine, CudaMachine)
                module = relax.transform.AttachGlobalSymbol()(lowered.functions[phase])  # type: ignore[index]
                made = lowered.machine.variants.remade(module, arch)
                names.append({n for v in made.functions if (n := frozenset(_launched(made[v])))})
            assert (names[0] == names[1]) is (arch == 80)


def _launched(function: Any) -> set[str]:
    return launched(function) if isinstance(function, tirx.PrimFunc) else set()


def test_measured_seconds_are_those_of_the_first_architecture(model_file: ModelFile, tmp_path: Path) -> None:
    folder = Database(tmp_path)
    folder.create()
    folder.append(measured(product(most=0, rows=300), seconds=(5.0,), default=(6.0,)), measured(decode()))
    machine = with_records(CudaMachine(("sm_90",)), tmp_path)
    assert machine.rates.source == f"{nominal_gpu('sm_90').source}, products as tuned"
    assert machine.rates.product(16, 4096 * 4096, 300) == pytest.approx(5.0)
    assert machine.attention_times(site_of(SHAPE)) == ([], [(3, 100, 0.8e-3)])
    with pytest.warns(UserWarning, match="records ignored|no record is of use here"):
        other = with_records(CudaMachine(("sm_80",)), tmp_path)
    assert other.rates == nominal_gpu("sm_80")
