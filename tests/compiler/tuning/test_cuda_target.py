"""GPUs as targets of tuning: tasks, candidates, operands, and records of several architectures."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from tvm import relax, tirx

import kvc
from kvc.cuda_machine import CudaMachine
from kvc.kernels.attention import AttentionShape
from kvc.kernels.cuda import knobs as cuda
from kvc.kernels.cuda.knobs import BY_ENGINE
from kvc.kernels.cuda.launches import launched
from kvc.kernels.shapes import attention_shape
from kvc.planning.rates import nominal_gpu
from kvc.runtime.cuda import Device
from kvc.targets import described, parse_target
from kvc.tuning import database, runner, worker
from kvc.tuning.api import _of_artifact
from kvc.tuning.cuda import CudaTarget, _facts, _found
from kvc.tuning.cuda_programs import product_of, site_of
from kvc.tuning.database import Database, Record
from kvc.tuning.programs import filled
from kvc.tuning.records import Choice, CudaRecords
from kvc.tuning.space import KNOBS, Values, default_of, frozen, knobs_of, propose
from kvc.tuning.target import targets_of
from kvc.tuning.tasks import Bucket, Serving, Task, find_tasks, product_parameters, shape_parameters
from kvc.tuning.tuned import chosen_kernels, with_records
from kvc_passes.errors import PlanningError, TargetError
from kvc_passes.plans import Workload
from kvc_passes.weight_format import WeightFormat

from .tuning_cases import record

pytest.importorskip("triton")

ModelFile = Callable[..., Path]
TARGET = CudaTarget("sm_90")
HALF = WeightFormat("float16")
CODES = WeightFormat("uint4", 32, "float16")
SHAPE = AttentionShape(32, 8, 128, 128, 0.0884, kv_dtype="float16", page_size=64)
MORE = {"bias": False, "residual": False, "flat": False, "dtype": "float16", "most": 16}


def product(
    columns: int = 4096, depth: int = 4096, format: WeightFormat = HALF, rows: int = 4, **more: Any
) -> Task:
    return Task(
        "gpu_product", product_parameters(columns, depth, format, **{**MORE, **more}), (Bucket(rows, 0, 9.0),)
    )


def prefill(shape: AttentionShape = SHAPE, tile: int = 32) -> Task:
    return Task("gpu_prefill", shape_parameters(shape, tile=tile), (Bucket(100, 70, 3.0),))


def decode(shape: AttentionShape = SHAPE, splits: int = 33) -> Task:
    return Task("gpu_decode", shape_parameters(shape, splits=splits), (Bucket(3, 100, 8.0),))


TASKS = {
    "few": product(),
    "some": product(most=64, residual=True, rows=40),
    "many": product(most=0, bias=True, rows=300),
    "codes": product(format=CODES),
    "logits": product(flat=True),
    "float32": product(format=WeightFormat(), dtype="float32", most=0),
    "prefill": prefill(),
    "prefill of wide heads": prefill(replace(SHAPE, head_dim=256, value_dim=256), 16),
    "decode": decode(),
    "codes as keys": decode(replace(SHAPE, stored="int8")),
    "bfloat16": decode(replace(SHAPE, kv_dtype="bfloat16")),
}


def proposals(task: Task, target: CudaTarget = TARGET) -> list[Values]:
    choices, tried, rng = target.space(task, True), set(), np.random.default_rng(0)
    found: list[Values] = []
    while True:
        possible = lambda values: target.possible(task, values)  # noqa: E731
        values = propose(task, choices, {}, tried, rng, possible)
        if values is None or len(found) == 60:
            return found
        tried.add(frozen(values))
        found.append(values)


@pytest.mark.parametrize("name", TASKS)
def test_candidates_are_parameters_and_no_default_in_disguise(name: str) -> None:
    task = TASKS[name]
    usual = _facts(task, 90).usual
    choices = TARGET.space(task, True)
    assert set(choices) == set(usual)
    for parameter, values in choices.items():
        assert values[0] == default_of(task, parameter) == 0
        assert len(set(values)) == len(values)
        assert usual[parameter] not in values
    found = proposals(task)
    assert len(found) > 8
    for values in found:
        assert type(knobs_of(task.kernel, values)) is KNOBS[task.kernel]


def test_candidates_fit_their_architecture() -> None:
    """163 KiB of shared memory on sm_80, 99 on sm_86; 255 registers a thread."""
    task, tall, older = TASKS["many"], {"rows": 256}, CudaTarget("sm_86")
    deep = {**tall, "stages": 4}  # three steps of 48 KiB under way while one is computed
    assert CudaTarget("sm_80").possible(task, deep)
    assert not older.possible(task, deep)
    assert older.possible(task, tall)
    assert not CudaTarget("sm_80").possible(task, {**deep, "depth": 128})
    assert not TARGET.possible(task, {**tall, "warps": 4})
    assert not TARGET.possible(task, {**tall, "columns": 256})


def test_rows_beyond_a_tile_are_no_candidates() -> None:
    """A tile of 32 tokens and 4 heads a group has 128 rows, which one block of them takes by default."""
    assert not TARGET.possible(TASKS["prefill"], {"rows": 256})
    assert TARGET.possible(TASKS["prefill"], {"rows": 256, "tile": 64, "keys": 16, "stages": 1})
    assert TARGET.possible(TASKS["prefill"], {"rows": 64})


def test_boxes_are_candidates_where_the_engine_can_copy_them() -> None:
    assert TARGET.space(TASKS["many"], True)["copy"] == (0, BY_ENGINE)
    assert TARGET.space(TASKS["prefill"], True)["copy"] == (0, BY_ENGINE)
    narrow = prefill(replace(SHAPE, window=128))
    for task in (TASKS["codes"], TASKS["float32"], product(depth=100), narrow):
        assert TARGET.space(task, True)["copy"] == (0,)
    assert CudaTarget("sm_86").space(TASKS["many"], True)["copy"] == (0,)
    assert TARGET.possible(TASKS["prefill"], {"copy": BY_ENGINE, "keys": 32})
    assert not TARGET.possible(TASKS["prefill"], {"copy": BY_ENGINE, "keys": 128, "rows": 64})  # pages of 64


def test_tiles_vary_where_they_are_free() -> None:
    assert TARGET.space(TASKS["prefill"], False)["tile"] == (0,)
    assert TARGET.space(TASKS["prefill"], True)["tile"] == (0, 8, 16, 64)


@pytest.mark.parametrize("name", TASKS)
def test_every_candidate_runs_on_the_operands_of_the_default(name: str) -> None:
    """As many copies of the same; all of them together are more than a cache holds."""
    task = TASKS[name]
    default = TARGET.operands(task, task.buckets[0], {})
    assert default.copies * sum(t.bytes for t in default.cold.values()) > 2**26 or default.copies == 80
    for values in proposals(task)[:20]:
        other = TARGET.operands(task, task.buckets[0], values)
        assert (other.copies, other.cold, other.order) == (default.copies, default.cold, default.order)
        assert other.results[-1] == default.results[-1]
        for key, array in default.warm.items():
            if key != "tiles":
                assert array.tobytes() == other.warm[key].tobytes()


def test_results_of_products_are_of_about_one() -> None:
    """Or float16 would not hold those of codes, which are of about 100."""
    for task in (product(64), product(64, format=CODES), product(64, 28672)):
        of = product_of(task)
        given = TARGET.operands(task, task.buckets[0], {})
        x = given.warm["x"].astype(np.float64)
        w = (
            filled(given.cold["w0"]).astype(np.float64)[:64]
            if not of.format.coded
            else np.full((1, of.depth), 100.0)
        )
        assert 0.1 < np.abs(x @ w.T).std() < 500


def test_bfloat16_operands() -> None:
    given = TARGET.operands(TASKS["bfloat16"], TASKS["bfloat16"].buckets[0], {})
    assert given.warm["q"].dtype == ml_dtypes.bfloat16
    assert {t.dtype for t in given.cold.values()} == {"bfloat16"}
    assert TARGET.tolerance(TASKS["bfloat16"]) == 2**-6
    assert TARGET.tolerance(TASKS["decode"]) == 2**-9
    assert TARGET.tolerance(TASKS["logits"]) == 2e-4


SHAPES = {
    "causal": {},
    "window": {"window": 37},
    "sinks": {"window": 37, "sink_keys": 4},
    "chunk": {"chunk": 64},
    "predicate": {"predicate": "k <= q and k > 2", "window": 8},
    "memory": {"whole": True},
    "scores": {"slopes": True, "sink_scores": True, "softcap": 30.0, "guarded": True},
    "int4": {"stored": "int4"},
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_is_that_of_its_site(name: str) -> None:
    shape = replace(SHAPE, **SHAPES[name])
    assert attention_shape(site_of(shape), shape.page_size) == shape


LAYERS, HIDDEN, INNER, KV = 2, 128, 256, 2 * 32


def test_the_tasks_of_a_llama(model_file: ModelFile) -> None:
    """By hand: the last layer's products behind attention, and the logits, are for the last tokens."""
    built = kvc.planner(model_file("llama", True, "float16"), target="cuda:sm_90")
    decision = built.decide(2_000_000_000, (Workload(4, 64),))
    tasks = find_tasks(decision, TARGET)
    found = {}
    for task in tasks:
        if task.kernel == "gpu_product":
            of = product_of(task)
            key = (of.columns, of.depth, of.residual, of.flat, of.most)
            found[key] = {b.rows: b.calls for b in task.buckets}
            assert (of.format, of.dtype, of.bias) == (HALF, "float16", False)
    answer, prompt = 16, 4 * 48
    qkv, out, gates, down, logits = (
        (HIDDEN + 2 * KV, HIDDEN, False, False),
        (HIDDEN, HIDDEN, True, False),
        (2 * INNER, HIDDEN, False, False),
        (HIDDEN, INNER, True, False),
        (512, HIDDEN, False, True),
    )
    wanted = {(*logits, 16): {4: 1 + answer}, (*qkv, 16): {4: LAYERS * answer}, (*qkv, 256): {prompt: LAYERS}}
    for weight in (out, gates, down):
        wanted[*weight, 16] = {4: 1 + LAYERS * answer}
        wanted[*weight, 256] = {prompt: LAYERS - 1}
    assert found == wanted
    others = {task.kernel: task for task in tasks if task.kernel != "gpu_product"}
    assert set(others) == {"gpu_prefill", "gpu_decode"}
    assert [(b.rows, b.calls) for b in others["gpu_decode"].buckets] == [(4, LAYERS * answer)]
    assert [(b.rows, b.length, b.calls) for b in others["gpu_prefill"].buckets] == [(prompt, 48, LAYERS)]
    assert json.loads(others["gpu_prefill"].parameters)["tile"] == 64
    assert len({task.name for task in tasks}) == len(tasks)
    tuned = Task.of(
        json.loads(json.dumps({**vars(tasks[0]), "buckets": [vars(b) for b in tasks[0].buckets]}))
    )
    assert tuned == tasks[0]


def test_what_has_no_parameters_is_no_task() -> None:
    """Attention over what is key and value in one, mixtures of types, and all other functions."""
    phase, workload = Serving("decode", {"b": 4}, 9), Workload(4, 64)
    plan: Any = SimpleNamespace(chunk=64)

    def found(key: tuple[Any, ...]) -> list[str]:
        return [kernel for kernel, *_ in _found(plan, workload, phase, key, 4, 9)]

    one = replace(SHAPE, kv_heads=1, shared=True)
    assert found(("decode", SHAPE, None, 33, 1024, "float16")) == ["gpu_decode"]
    assert found(("decode", one, None, 33, 1024, "float16")) == []
    assert found(("decode", SHAPE, None, 33, 1024, "float32")) == []
    assert found(("append", SHAPE, 33, 1024, "float16")) == []


def test_machines_of_another_process() -> None:
    machine = described(json.loads(json.dumps(TARGET.description)))
    assert targets_of(machine) == (TARGET,)
    assert [t.key for t in targets_of(parse_target("cuda:sm_80,sm_90"))] == ["sm_80", "sm_90"]
    cpu = parse_target("cpu")
    assert described(cpu.description).description == cpu.description


def test_a_machine_that_cannot_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        TargetError, match=r"a GPU, and this machine has none.*no NVIDIA driver.*give --rpc HOST:PORT"
    ):
        TARGET.check()
    monkeypatch.setattr(Device, "find", lambda: Device((8, 9), 1, 1))
    with pytest.raises(TargetError, match=r"this machine's GPU is sm_89; tune for that, or give --rpc"):
        TARGET.check()
    CudaTarget("sm_89").check()
    monkeypatch.setattr(Device, "find", lambda: Device((10, 0), 1, 1))
    CudaTarget("sm_100").check()


def test_parameters_that_do_not_compile(tmp_path: Path) -> None:
    """The sums alone are more than registers hold: a candidate that fails, with its reason."""
    task, few = product(256, 256, most=0), {"depth": 32, "warps": 1, "stages": 1}
    with pytest.raises(PlanningError, match=r"kernel kvc_products_product_\w+ for sm_90 (spills|takes) "):
        TARGET.build(task, {"rows": 64, **few}, tmp_path / "kernel.so")
    assert not (tmp_path / "kernel.so").exists()


@pytest.mark.parametrize(
    ("error", "remote", "spoilt"),
    [
        (RuntimeError("CUDA: an illegal memory access"), False, True),
        (RuntimeError("CUDA: an illegal memory access"), True, False),
        (PlanningError("kernel spills"), False, False),
    ],
)
def test_an_error_of_the_gpu_ends_the_process_that_measures(
    error: Exception, remote: bool, spoilt: bool
) -> None:
    """CUDA remembers it; a server of RPC has a process for every session."""

    def measure(*_: Any) -> None:
        raise error

    bench = SimpleNamespace(target=TARGET, measure=measure)
    request = {"task": dataclasses.asdict(TASKS["decode"]), "values": {}, "rounds": 2}
    answer = worker._answer(bench, request, remote)
    assert answer == {"failed": f"{type(error).__name__}: {error}", "spoilt": spoilt}


@pytest.mark.parametrize("spoilt", [True, False])
def test_a_spoilt_process_is_replaced(spoilt: bool) -> None:
    answer = json.dumps({"failed": "why", "spoilt": spoilt})
    made = runner.Worker(TARGET.description, None, 60)
    made.command = (
        sys.executable,
        "-c",
        f"print('{{}}', flush=True); input(); print('{answer}', flush=True); input()",
    )
    try:
        assert made.measure(TASKS["decode"], {}, 2) == runner.Failure("failed", "why")
        assert (made._process is None) is spoilt
    finally:
        made.close()


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


def measured(task: Task, target: str = "sm_90", **changes: Any) -> Record:
    fields: dict[str, Any] = {"target": target, "version": TARGET.version, "knobs": {"stages": 2}}
    return record(task, **{**fields, **changes})


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


@pytest.mark.parametrize(("option", "answer"), [("cpu", None), ("cuda:sm_90", "sm_90"), ("cuda:sm_86", None)])
def test_the_architecture_of_an_artifact_with_several(option: str, answer: str | None) -> None:
    several: Any = SimpleNamespace(plan=SimpleNamespace(target={"kind": "cuda", "archs": ["sm_80", "sm_90"]}))
    if answer is not None:
        assert _of_artifact(several, option).key == answer
    else:
        with pytest.raises(
            TargetError, match="architecture are tuned at a time: give --target cuda:sm_80 or"
        ):
            _of_artifact(several, option)


def test_a_block_of_prefill_has_all_heads_of_a_group() -> None:
    shape = replace(TASKS["prefill"].shape(), heads=48, kv_heads=1)
    task = replace(TASKS["prefill"], parameters=shape_parameters(shape, tile=1))
    assert not TARGET.possible(task, {"rows": 32, "keys": 16})
    assert TARGET.possible(task, {"keys": 16})
