"""Candidates measured on this machine: that results agree is checked, that one is faster is not."""

from __future__ import annotations

import dataclasses
import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tvm import relax

from kvc.kernels.attention import AttentionShape
from kvc.kernels.product import Product
from kvc.runtime import host_memory
from kvc.targets import parse_target
from kvc.tuning import measure, programs, worker
from kvc.tuning.measure import Bench, Measured, compared
from kvc.tuning.space import Values
from kvc.tuning.target import targets_of
from kvc.tuning.tasks import Bucket, Task
from kvc_passes.sites import Sliced
from kvc_passes.weight_format import WeightFormat

from .tuning_cases import CODED, OTHERS, SHAPE, TASKS, attention, product

MACHINE = parse_target("cpu")


@pytest.fixture(scope="module")
def bench() -> Bench:
    """A bench on which a timing takes no longer than it has to."""
    return Bench(targets_of(MACHINE)[0], worker._sessions({"target": MACHINE.description}))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_LEAST_SECONDS", 1e-4)
    monkeypatch.setattr(programs, "_MOST_COPIES", 3)


CANDIDATES: dict[str, tuple[Task, Values]] = {
    **{kernel: (task, OTHERS[task.kernel]) for kernel, task in TASKS.items()},
    "codes, few": (CODED["product_few"], {"accumulators": 4}),
    "codes, many": (CODED["product_many"], OTHERS["product_many"]),
    "bfloat16": (product(format=WeightFormat("bfloat16")), OTHERS["product_few"]),
    "several sizes": (product(buckets=(Bucket(1, 0, 5.0), Bucket(7, 0, 1.0))), {"accumulators": 24}),
    "several sequences": (
        replace(TASKS["prefill"], buckets=(Bucket(90, 40, 1.0), Bucket(7, 40, 2.0))),
        OTHERS["prefill"],
    ),
    "int8": (attention("decode", replace(SHAPE, stored="int8")), OTHERS["decode"]),
    "bfloat16 pages": (attention("prefill", replace(SHAPE, kv_dtype="bfloat16")), OTHERS["prefill"]),
    "extras": (attention("prefill", replace(SHAPE, slopes=True, sink_scores=True)), OTHERS["prefill"]),
    "window": (attention("decode", replace(SHAPE, window=37)), OTHERS["decode"]),
    "shared": (attention("decode", AttentionShape(6, 1, 48, 48, 0.1, shared=True)), OTHERS["decode"]),
    "sliced": (
        attention(
            "decode",
            AttentionShape(
                4,
                1,
                Sliced(4, 32, 16, 16, False).width,
                Sliced(4, 32, 16, 16, False).value_dim,
                0.15,
                shared=True,
                sliced=Sliced(4, 32, 16, 16, False),
            ),
        ),
        OTHERS["decode"],
    ),
}


@pytest.mark.parametrize("name", CANDIDATES)
def test_candidates_compute_what_the_default_does(bench: Bench, name: str) -> None:
    task, values = CANDIDATES[name]
    found = bench.measure(task, values, 3)
    assert found.wrong == ""
    for side in (found.seconds, found.default):
        assert [len(times) for times in side] == [3] * len(task.buckets)
        assert all(0 < t < 1 for times in side for t in times)


ONE = {
    "product_few": {"accumulators": 4},
    "product_many": {"depth": 512},
    "prefill": {"keys": 64},
    "decode": {"keys": 64},
}


@pytest.mark.parametrize("kernel", TASKS)
def test_something_else_is_wrong(bench: Bench, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A candidate that is another kernel of the same arguments."""
    task, of, weight = TASKS[kernel], programs.kernel_of, Product.weight

    def other(task: Task, values: Values, traits: Any) -> Any:
        with monkeypatch.context() as patch:
            if values and kernel.startswith("product"):
                patch.setattr(Product, "weight", lambda *where: 2 * weight(*where))
            elif values:
                task = attention(task.kernel, replace(SHAPE, scale=1.0))
            return of(task, values, traits)

    monkeypatch.setattr(programs, "kernel_of", other)
    found = bench.measure(task, ONE[kernel], 3)
    assert "the result differs by" in found.wrong
    assert found.wrong.startswith(f"{task.buckets[0].rows} rows: ")
    assert found.seconds == found.default == []


def test_nothing_is_left_that_would_keep_a_server_busy(bench: Bench) -> None:
    """A session ends with the last virtual machine of it."""
    request = {"task": dataclasses.asdict(TASKS["product_few"]), "values": {"ahead": 8}, "rounds": 2}
    gc.collect()
    gc.disable()
    try:
        assert worker._answer(bench, request, False)["wrong"] == ""
        assert not [found for found in gc.get_objects() if type(found) is relax.VirtualMachine]
    finally:
        gc.enable()


def test_libraries_are_forgotten_but_for_the_last_few(bench: Bench) -> None:
    task = TASKS["product_few"]
    for ahead in (1, 2, 3, 4, 5):
        bench.measure(task, {"ahead": ahead}, 1)
    assert len(bench._libraries) == measure._KEPT
    assert (task.key, task.sizes, ()) in bench._libraries
    kept = {path.name for path in bench._libraries.values()}
    assert {path.name for path in Path(bench._folder.name).iterdir()} == kept


def test_the_default_is_given_numbers_that_show_differences(bench: Bench) -> None:
    """The results are neither 0 nor all alike, or no candidate could be wrong."""
    for task in TASKS.values():
        (bucket,) = task.buckets
        given = bench.target.operands(task, bucket, {})
        for array in (*given.warm.values(), *(programs.filled(t) for t in given.cold.values())):
            if array.dtype == np.float32:
                assert np.isfinite(array).all()
                assert array.std() > 0.01


def test_operands_are_in_memory_like_the_runtimes(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them; and the kernel reads them there."""
    task, arrays = TASKS["decode"], list[np.ndarray]()

    class Noted(host_memory.Region):
        def array(self, dtype: Any, shape: tuple[int, ...]) -> Any:
            arrays.append(super().array(dtype, shape))
            return arrays[-1]

    results: list[np.ndarray] = []
    invoke = relax.VirtualMachine.invoke_stateful

    def twice(self: Any, function: str) -> None:
        for _ in range(2):
            invoke(self, function)
            results.append(self.get_outputs(function)[-1].numpy().copy())
            for array in arrays:
                if array.dtype == np.float32:
                    np.multiply(array, 2, out=array)

    monkeypatch.setattr(host_memory, "Region", Noted)
    monkeypatch.setattr(relax.VirtualMachine, "invoke_stateful", twice)
    bench.measure(task, {}, 1)
    assert len(arrays) > 3
    assert not np.array_equal(results[0], results[1])


def test_operands_are_the_same_whatever_the_parameters_are(bench: Bench) -> None:
    for task in TASKS.values():
        (bucket,) = task.buckets
        one, other = (bench.target.operands(task, bucket, v) for v in ({}, OTHERS[task.kernel]))
        assert one.order == other.order
        assert one.cold == other.cold
        for name in one.warm:
            if name != "tiles":
                np.testing.assert_array_equal(one.warm[name], other.warm[name])


def test_tiles_cover_every_token_once(bench: Bench) -> None:
    task = replace(TASKS["prefill"], buckets=(Bucket(90, 40, 1.0),))
    tiles = bench.target.operands(task, task.buckets[0], {"tile": 7}).warm["tiles"]
    assert [int(n) for row in tiles for n in range(row[1], row[1] + row[2])] == list(range(90))
    assert max(tiles[:, 2]) == 7


def given(candidate: list[float], default: list[float]) -> Measured:
    return Measured([candidate], [default])


@pytest.mark.parametrize(
    ("candidate", "outcome", "share"),
    [
        ([0.5, 0.5, 0.5], "better", 0.5),
        ([2.0, 2.0, 2.0], "worse", 2.0),
        ([1.0, 1.0, 1.0], "even", 1.0),
        ([0.999, 0.999, 0.999], "better", 0.999),
        ([0.5, 0.9, 1.3], "even", 0.9),
        ([0.7, 1.2, 1.7], "even", 1.2),
        ([0.1, 0.2, 0.3], "better", 0.2),
    ],
)
def test_better_is_what_differs_by_more_than_it_varies(
    candidate: list[float], outcome: str, share: float
) -> None:
    found = compared(given(candidate, [1.0, 1.0, 1.0]), [3.0])
    assert found[0] == outcome
    assert found[1] == pytest.approx(share)
    assert found[2:] == ([candidate[1]], [1.0])


def test_a_default_that_varies_is_as_good() -> None:
    assert compared(given([0.9] * 5, [0.6, 0.8, 1.0, 1.2, 1.4]), [1.0])[0] == "even"
    assert compared(given([0.9] * 5, [1.0, 1.0, 1.0, 1.0, 9.0]), [1.0])[0] == "even"
    assert compared(given([0.9] * 9, [1.0] * 8 + [9.0]), [1.0])[0] == "better"


def test_calls_weigh_the_sizes() -> None:
    both = Measured([[0.5] * 3, [2.0] * 3], [[1.0] * 3, [1.0] * 3])
    assert compared(both, [9.0, 1.0])[:2] == ("better", pytest.approx(0.65))
    assert compared(both, [1.0, 9.0])[:2] == ("worse", pytest.approx(1.85))
