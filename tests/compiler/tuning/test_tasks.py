"""What there is to tune: counted by hand from the models' configurations."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import kvc
from kvc.artifact import Artifact
from kvc.planning.decide import Decision
from kvc.tuning.target import targets_of
from kvc.tuning.tasks import TASKS, Bucket, Task, find_tasks, product_of, shape_of
from kvc_passes.plans import Workload

from .tuning_cases import CODED, SHAPE, attention, product
from .tuning_cases import TASKS as SMALL

ModelFile = Callable[..., Path]
LAYERS, HIDDEN, INNER, KV = 2, 128, 256, 2 * 32


def decided(model: Path, *workloads: Workload, state: str | None = "paged_kv") -> tuple[Decision, list[Task]]:
    built = kvc.planner(model, state=state)
    decision = built.decide(1_000_000_000, workloads)
    return decision, list(find_tasks(decision, targets_of(built.machine)[0]))


def products(tasks: list[Task]) -> dict[tuple[str, int, int], dict[int, float]]:
    """Calls by (kernel, columns, depth) and rows."""
    found = {}
    for task in tasks:
        if task.kernel.startswith("product"):
            columns, depth, format = product_of(task.parameters)
            assert format.dtype == "float32"
            assert {b.length for b in task.buckets} == {0}
            found[task.kernel, columns, depth] = {b.rows: b.calls for b in task.buckets}
    return found


@pytest.mark.parametrize(("batch", "context", "prompt", "answer"), [(4, 64, 48, 16), (8, 200, 150, 50)])
def test_the_products_of_a_llama(
    model_file: ModelFile, batch: int, context: int, prompt: int, answer: int
) -> None:
    """The last layer's products behind attention, and the logits, are for the tokens that are asked for."""
    decision, tasks = decided(model_file("llama"), Workload(batch, context))
    tokens = min(decision.plan.chunk, batch * prompt)
    chunks = -(-batch * prompt // tokens)
    asked = max(1, min(batch, round(batch / chunks)))
    every = {  # (columns, depth): (calls for all tokens of a prefill, calls for those asked for)
        (HIDDEN + 2 * KV, HIDDEN): (LAYERS, 0),  # queries, keys and values in one
        (HIDDEN, HIDDEN): (LAYERS - 1, 1),
        (2 * INNER, HIDDEN): (LAYERS - 1, 1 + 1),  # gate and up in one; the logits, which are as wide
        (HIDDEN, INNER): (LAYERS - 1, 1),
    }
    wanted: dict[tuple[str, int, int], Counter[int]] = {}
    for (columns, depth), (whole, last) in every.items():
        for rows, calls in (
            (tokens, whole * chunks),
            (asked, last * chunks),
            (batch, (whole + last) * answer),
        ):
            kernel = "product_few" if rows <= 14 else "product_many"
            if calls:
                wanted.setdefault((kernel, columns, depth), Counter())[rows] += calls
    assert products(tasks) == wanted


def test_products_of_feed_forward_parts_are_called_for_slices(model_file: ModelFile) -> None:
    """Of the tiny model gate and up, in one product, are in slices; the other products are not."""
    decision = decided(model_file("llama"), Workload(8, 200))[0]
    chunk, target = decision.plan.chunk, targets_of(decision.variant.lowered.machine)[0]
    rows = chunk // 2 - 20  # two slices and 40 rows
    sliced = replace(decision, plan=replace(decision.plan, ffn_chunk=rows))
    whole, parts = (products(list(find_tasks(d, target))) for d in (decision, sliced))
    key = ("product_many", 2 * INNER, HIDDEN)
    calls = whole[key].pop(chunk)
    assert (parts[key].pop(rows), parts[key].pop(40)) == (2 * calls, calls)
    assert parts == whole


def test_the_attention_of_a_llama(model_file: ModelFile) -> None:
    decision, tasks = decided(model_file("llama"), Workload(8, 200))
    chunk = decision.plan.chunk
    found = {task.kernel: task for task in tasks if not task.kernel.startswith("product")}
    assert set(found) == {"prefill", "decode"}
    for task in found.values():
        shape = shape_of(task.parameters)
        assert (shape.heads, shape.kv_heads, shape.head_dim, shape.value_dim) == (4, 2, 32, 32)
    (prefill,), (decode,) = found["prefill"].buckets, found["decode"].buckets
    assert (decode.rows, decode.calls) == (8, LAYERS * 50)
    assert 150 < decode.length <= 200
    assert (prefill.rows, prefill.calls) == (chunk, LAYERS * -(-8 * 150 // chunk))
    assert 0 < prefill.length <= 150


def test_alternatives_of_a_workload_are_sizes_of_one_task(model_file: ModelFile) -> None:
    one, other = Workload(1, 100), Workload(3, 80)
    both = decided(model_file("llama"), one, other)[1]
    decode = next(t for t in both if t.kernel == "decode")
    assert [(b.rows, b.calls) for b in decode.buckets] == [(1, LAYERS * 25), (3, LAYERS * 20)]
    assert decode.buckets == tuple(sorted(decode.buckets))
    keys = [task.key for task in both]
    assert len(keys) == len(set(keys))


def test_layers_with_and_without_a_window_are_two_tasks(model_file: ModelFile) -> None:
    tasks = decided(model_file("gemma2"), Workload(2, 100))[1]
    windows = sorted(str(shape_of(t.parameters).window) for t in tasks if t.kernel == "decode")
    assert windows == ["8", "None"]
    assert [b.calls for t in tasks if t.kernel == "decode" for b in t.buckets] == [25, 25]


def test_what_is_made_again_in_prefill_has_a_kernel_of_its_own(model_file: ModelFile) -> None:
    tasks = decided(model_file("gpt2"), Workload(4, 64), state="x_absorbed")[1]
    assert {t.kernel for t in tasks} == {"product_few", "product_many", "decode"}
    shape = next(shape_of(t.parameters) for t in tasks if t.kernel == "decode")
    assert shape.shared
    assert {t.kernel for t in decided(model_file("gpt2"), Workload(4, 64))[1]} >= {"prefill"}


def test_a_request_of_one_token_has_no_answer(model_file: ModelFile) -> None:
    tasks = decided(model_file("llama"), Workload(1, 1))[1]
    assert {t.kernel for t in tasks} == {"product_few", "prefill"}
    assert {b.rows for t in tasks for b in t.buckets} == {1}


def test_formats_tell_products_apart(model_file: ModelFile) -> None:
    tasks = decided(model_file("llama", dtype="float16"), Workload(4, 64))[1]
    formats = {product_of(t.parameters)[2].dtype for t in tasks if t.kernel.startswith("product")}
    assert formats == {"float16"}


def test_an_artifact_says_what_its_kernels_are(artifact: Path, llama: Path) -> None:
    """As compiled by the tests' fixture: for 4x64 in 1 GB."""
    opened = Artifact.open(artifact)
    file = opened.file(TASKS)
    assert file is not None
    data = json.loads(file.read_text())
    tasks = [Task.of(task) for task in data["tasks"]]
    decision, wanted = decided(llama, Workload(4, 64), state=None)
    assert opened.plan.forms == decision.plan.forms
    assert tasks == wanted
    assert data["predicted"] == pytest.approx(sum(t.seconds for t in opened.plan.times))


@pytest.mark.parametrize("task", [*SMALL.values(), *CODED.values()], ids=lambda t: t.name)
def test_a_task_as_json(task: Task) -> None:
    import dataclasses

    assert Task.of(json.loads(json.dumps(dataclasses.asdict(task)))) == task


@pytest.mark.parametrize("data", [{}, {"kernel": "decode", "parameters": "{}", "buckets": [{"rows": 1}]}])
def test_what_is_no_task(data: dict[str, object]) -> None:
    with pytest.raises((KeyError, TypeError)):
        Task.of(data)


def test_names_tell_a_persons_tasks_apart() -> None:
    from kvc_passes.weight_format import WeightFormat

    some = [
        *SMALL.values(),
        *CODED.values(),
        product(columns=65),
        product(depth=49),
        product(buckets=(Bucket(3, 0, 1.0),)),
        product(format=WeightFormat("float16")),
        attention("decode", replace(SHAPE, heads=8)),
        attention("decode", replace(SHAPE, head_dim=64)),
    ]
    assert len({task.name for task in some}) == len(some)


def test_what_a_record_is_found_by() -> None:
    task = product(buckets=(Bucket(1, 0, 2.0), Bucket(5, 0, 1.0)))
    assert task.key == f"product_few {task.parameters}"
    assert task.sizes == ((1, 0), (5, 0))
    assert attention("decode").shape() == SHAPE
    assert product().weight()[:2] == (64, 48)
