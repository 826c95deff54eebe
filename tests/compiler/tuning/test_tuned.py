"""What a database means to compilations and plans."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import kvc
from kvc.kernels.cpu import CpuProducts
from kvc.kernels.knobs import PRODUCT, DecodeKnobs, FewRows, ManyRows, PrefillKnobs, ProductKnobs
from kvc.planning.rates import nominal
from kvc.targets import parse_target
from kvc.tuning.database import Database
from kvc.tuning.records import Choice, Records
from kvc.tuning.target import targets_of
from kvc.tuning.tasks import Bucket, Task, find_tasks
from kvc.tuning.tuned import TunedRates, chosen_kernels, with_records
from kvc_passes.errors import InputError
from kvc_passes.plans import Workload
from kvc_passes.weight_format import FLOAT32, WeightFormat

from .tuning_cases import CODED, CODES, OTHERS, SHAPE, TASKS, TRAITS, attention, product, record

ModelFile = Callable[..., Path]
PRODUCTS = CpuProducts(TRAITS)
FEW, MANY = TASKS["product_few"], TASKS["product_many"]


def test_a_kernel_that_was_measured() -> None:
    records = Records([record(FEW, knobs={"ahead": 8}, share=0.9), record(FEW), record(MANY, outcome="even")])
    assert records.of(FEW) == Choice("measured", {"accumulators": 16}, 0.8)
    assert records.of(MANY) == Choice("measured", {})


def test_what_no_longer_names_a_kernel_is_passed_over() -> None:
    shape = json.loads(attention("prefill").parameters)
    del shape["distances"]
    damaged = [f"prefill {json.dumps(shape)}", "product_few x", 'gpu_product {"columns": 1}', "prefill"]
    assert Records([replace(record(FEW), task=task) for task in damaged]).best == {}


def test_the_best_wins_whatever_the_order() -> None:
    some = [record(share=share, knobs={"ahead": n}) for n, share in enumerate((0.9, 0.7, 0.8))]
    some.append(record(outcome="worse", share=0.1))
    for order in (some, some[::-1]):
        assert Records(order).of(FEW) == Choice("measured", {"ahead": 1}, 0.7)


def test_without_records_all_is_as_by_default() -> None:
    records = Records([record(outcome="failed", seconds=(), default=(), share=1.0)])
    assert records.of(FEW) == Choice("default", {})
    assert records.product(64, 48, FLOAT32) == PRODUCT
    assert records.prefill(SHAPE) == PrefillKnobs()
    assert records.decode(SHAPE) == DecodeKnobs()
    assert records.product_times(PRODUCTS) == {}


def test_parameters_reach_the_kernels_that_they_were_measured_for() -> None:
    records = Records([record(TASKS[kernel], knobs=knobs) for kernel, knobs in OTHERS.items()])
    wanted = ProductKnobs(FewRows(16, 32), ManyRows(3, 256, 65536, 2))
    assert records.product(64, 48, FLOAT32) == wanted
    assert records.prefill(SHAPE) == PrefillKnobs(5, 32)
    assert records.decode(SHAPE) == DecodeKnobs(3, 64, 2)
    assert records.product(64, 48, CODES) == PRODUCT


@pytest.mark.parametrize(
    ("columns", "depth", "source"),
    [
        (64, 48, "measured"),
        (128, 48, "transferred"),
        (32, 24, "transferred"),
        (256, 48, "transferred"),
        (64, 193, "default"),
        (256, 96, "default"),
    ],
)
def test_products_of_a_near_size_and_the_same_format(columns: int, depth: int, source: str) -> None:
    """Sizes that differ by a factor of four, both together, are the farthest."""
    found = Records([record()]).of(product(columns=columns, depth=depth))
    assert found.source == source
    assert found.values == ({} if source == "default" else {"accumulators": 16})


@pytest.mark.parametrize("format", [CODES, WeightFormat("float16"), WeightFormat("bfloat16")])
def test_products_of_another_format_are_far(format: WeightFormat) -> None:
    assert Records([record()]).of(product(format=format)) == Choice("default", {})
    assert Records([record(product(format=format))]).of(FEW) == Choice("default", {})


def test_the_nearest_of_several() -> None:
    sizes = {100: 8, 70: 16, 200: 32}
    records = Records([record(product(columns=c), knobs={"ahead": n}) for c, n in sizes.items()])
    for columns, ahead in ((64, 16), (80, 16), (90, 8), (150, 32), (700, 32)):
        assert records.of(product(columns=columns)) == Choice("transferred", {"ahead": ahead}, 0.8)


def test_few_rows_say_nothing_of_many() -> None:
    assert Records([record(FEW)]).of(MANY) == Choice("default", {})


SHAPES = {
    "more heads of as large groups": (replace(SHAPE, heads=8, kv_heads=4), "transferred"),
    "another scale": (replace(SHAPE, scale=0.3), "transferred"),
    "five times the heads": (replace(SHAPE, heads=20, kv_heads=10), "default"),
    "another group": (replace(SHAPE, heads=8), "default"),
    "another head": (replace(SHAPE, head_dim=64), "default"),
    "another value": (replace(SHAPE, value_dim=64), "default"),
    "a window": (replace(SHAPE, window=64), "default"),
    "16 bits": (replace(SHAPE, kv_dtype="float16"), "default"),
    "codes": (replace(SHAPE, stored="int8"), "default"),
}


@pytest.mark.parametrize("name", SHAPES)
def test_attention_of_near_shapes(name: str) -> None:
    shape, source = SHAPES[name]
    records = Records([record(TASKS["decode"], knobs={"keys": 32})])
    assert records.of(attention("decode", shape)).source == source
    assert records.decode(shape) == DecodeKnobs(keys=128 if source == "default" else 32)
    assert records.prefill(shape) == PrefillKnobs()


def test_parameters_that_there_are_no_more() -> None:
    gone = record(knobs={"accumulators": 16, "gone": 3})
    assert Records([gone]).of(FEW) == Choice("default", {})
    assert Records([gone]).of(product(columns=100)) == Choice("default", {})
    assert Records([gone]).product(64, 48, FLOAT32) == PRODUCT


def rates_of(*tasks: tuple[Task, dict[str, object]]) -> tuple[TunedRates, dict[tuple[int, int], object]]:
    times = Records([record(task, **changes) for task, changes in tasks]).product_times(PRODUCTS)
    general = vars(nominal(TRAITS))
    return TunedRates(**general, kernels=times), times


def test_products_take_what_was_measured() -> None:
    """At the rows that were measured, and in proportion at others."""
    sized = product(buckets=(Bucket(1, 0, 1.0), Bucket(4, 0, 1.0)))
    rates, times = rates_of(
        (sized, {"seconds": (1e-3, 2e-3), "default": (5e-3, 6e-3)}),
        (MANY, {"outcome": "worse", "seconds": (9.0,), "default": (7e-3,), "knobs": {"rows": 4}}),
    )
    (key,) = times
    assert key == (32, 64 * 48)
    assert times[key] == ((1, 1e-3), (4, 2e-3), (40, 7e-3))
    for rows, seconds in ((1, 1e-3), (4, 2e-3), (40, 7e-3)):
        assert rates.product(*key, rows) == pytest.approx(seconds)
    general = nominal(TRAITS)
    for rows, near, seconds in ((3, 4, 2e-3), (9, 4, 2e-3), (20, 40, 7e-3), (900, 40, 7e-3)):
        wanted = seconds * general.product(*key, rows) / general.product(*key, near)
        assert rates.product(*key, rows) == pytest.approx(wanted)
    for other in ((16, 64 * 48), (32, 64 * 49)):
        assert rates.product(*other, 4) == general.product(*other, 4)


def test_bits_of_codes_count_their_scales() -> None:
    """4 bits and a float16 for every 32 of them."""
    _, times = rates_of((CODED["product_few"], {}))
    (key,) = times
    assert key == (5, 64 * 48)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_plans_find_the_products_that_were_measured(model_file: ModelFile, family: str) -> None:
    """Bits and weights are counted alike by plans and records."""
    built = kvc.planner(model_file(family), state="paged_kv")
    decision = built.decide(1_000_000_000, (Workload(4, 64),))
    tasks = [t for t in find_tasks(decision, targets_of(built.machine)[0]) if t.kernel.startswith("product")]
    times = Records([record(task, outcome="even") for task in tasks]).product_times(built.machine.products)
    clock = decision.variant.clock
    steps = {
        (s.bits, s.weights)
        for work in (clock.prefill, clock.decode)
        for s, _ in work.steps
        if s.kind == "product"
    }
    assert steps == set(times)


def test_a_machine_with_records(tmp_path: Path) -> None:
    machine, database = parse_target("cpu"), Database(tmp_path)
    database.create()
    database.append(record(target=machine.key), record(MANY, target=machine.key, knobs={"rows": 3}))
    tuned = with_records(machine, tmp_path)
    assert tuned.products.knobs.product(64, 48, FLOAT32) == ProductKnobs(FewRows(16), ManyRows(3))
    assert tuned.rates.source == f"{machine.rates.source}, products as tuned"
    assert tuned.rates.product(32, 64 * 48, 2) == pytest.approx(0.8e-3)
    assert tuned.rates.attention == machine.rates.attention
    assert tuned.key == machine.key


@pytest.mark.parametrize("contents", ["", "other"])
def test_records_of_no_use_are_warned_of(tmp_path: Path, contents: str) -> None:
    machine, database = parse_target("cpu"), Database(tmp_path)
    database.create()
    if contents:
        database.append(record(target="other"))
    with pytest.warns(UserWarning, match="no record is of use here"):
        tuned = with_records(machine, tmp_path)
    assert tuned.rates == machine.rates
    assert tuned.products.knobs.product(64, 48, FLOAT32) == PRODUCT


def test_a_database_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no database"):
        with_records(parse_target("cpu"), tmp_path / "missing")


def test_a_plan_without_records_chose_no_kernels(model_file: ModelFile) -> None:
    built = kvc.planner(model_file("llama"))
    decision = built.decide(1_000_000_000, (Workload(1, 16),))
    assert chosen_kernels(decision, built.machine) == []


def test_tasks_and_records_name_parameters_alike() -> None:
    assert json.loads(record().line())["task"] == FEW.key
    assert FEW.key.partition(" ")[2] == FEW.parameters
