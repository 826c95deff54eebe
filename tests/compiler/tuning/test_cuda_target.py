"""GPUs as targets of tuning: tasks, candidates and operands."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import kvc
from kvc.kernels.cuda.knobs import BY_ENGINE
from kvc.kernels.shapes import attention_shape
from kvc.targets import described, parse_target
from kvc.tuning.api import _of_artifact
from kvc.tuning.cuda import CudaTarget, _facts, _found
from kvc.tuning.cuda_programs import product_of, site_of
from kvc.tuning.programs import filled
from kvc.tuning.space import KNOBS, Values, default_of, frozen, knobs_of, propose
from kvc.tuning.target import targets_of
from kvc.tuning.tasks import Serving, Task, find_tasks, shape_parameters
from kvc_passes.errors import TargetError
from kvc_passes.plans import Workload

from .cuda_cases import CODES, HALF, SHAPE, TARGET, TASKS, prefill, product

pytest.importorskip("triton")

ModelFile = Callable[..., Path]


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
