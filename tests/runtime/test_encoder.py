"""What a request may come with for an encoder, and what is refused before anything runs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray

from kvc.runtime.encoder import EncoderCall, EncoderMemory, batched, checked_inputs, encoder_shapes
from kvc.runtime.sampler import SamplingParams
from kvc.runtime.scheduler import Scheduler
from kvc_passes.errors import InputError
from kvc_passes.facts import EncoderFacts, EncoderInput, ModelFacts
from kvc_passes.plans import EncoderPlan, Plan

Make = Callable[..., Any]
TEXT = EncoderFacts(
    "text",
    (EncoderInput("ids", "int64", (None,), 100), EncoderInput("mask", "int64", (None,), None, mask=True)),
    2,
    {},
    1,
)
NARROW = EncoderFacts("narrow", (EncoderInput("ids", "int32", (None,)),), 1, {}, 1)
SOUND = EncoderFacts("sound", (EncoderInput("features", "float32", (4, 6)),), 0, {}, 1)
MASKED = EncoderFacts("masked", (*SOUND.inputs, EncoderInput("mask", "int64", (None,), mask=True)), 2, {}, 1)
IDS = np.array([[1, 2, 3]])


@pytest.fixture
def check(make_plan: Make) -> Callable[..., Any]:
    def checked(given: Any, facts: EncoderFacts = TEXT) -> Any:
        longest = 0 if facts is SOUND else 5
        return checked_inputs(given, make_plan(encoder=EncoderPlan(facts.name, longest, 1, 1, 1)), facts)

    return checked


class Recorded:
    """A call whose encoder notes what it is given, and what happens to its result."""

    def __init__(self, plan: Plan, facts: EncoderFacts) -> None:
        model = cast(ModelFacts, SimpleNamespace(encoder=facts))
        arrays = {
            name: np.full(shape, 7, dtype) for name, (dtype, shape) in encoder_shapes(plan, model).items()
        }

        def encoder(*given: NDArray[Any]) -> NDArray[np.float32]:
            self.given = given
            return np.zeros((1, 2, 4), np.float32)

        def shaped(name: str, shape: tuple[int, ...]) -> NDArray[Any]:
            return arrays[name][: math.prod(shape)].reshape(shape)

        def run(function: Callable[..., Any], given: list[Any], shape: None) -> Any:
            return function(*given)

        def read(result: NDArray[np.float32], array: NDArray[np.float32]) -> None:
            self.order.append("read")
            array[...] = result

        self.order: list[str] = []
        vm = {"encoder": encoder, "release": lambda: self.order.append("release")}
        memory = SimpleNamespace(vm=vm, arrays=arrays, shaped=shaped, run=run, read=read)
        self.call = EncoderCall(cast(EncoderMemory, memory), [], plan, model)


@pytest.mark.parametrize("ids", [IDS, IDS[0], IDS.astype(np.int32), [1, 2, 3]])
@pytest.mark.parametrize("mask", [None, np.ones((1, 3), bool), np.ones(3)])
def test_a_batch_may_be_left_out_and_a_mask_is_all_ones(
    make_plan: Make, check: Make, ids: Any, mask: Any
) -> None:
    recorded = Recorded(make_plan(encoder=EncoderPlan("text", 5, 1, 1, 1)), TEXT)
    recorded.call(check({"ids": ids} if mask is None else {"ids": ids, "mask": mask}))
    for got, expected in zip(recorded.given, (IDS, [[1, 1, 1]]), strict=True):
        np.testing.assert_array_equal(got, expected)
        assert got.dtype == np.int64


def test_inputs_are_not_copied_before_their_turn(make_plan: Make, check: Make) -> None:
    features = np.arange(24.0).reshape(6, 4).T
    (kept,) = check({"features": features}, SOUND).values()
    assert kept.base is features or np.shares_memory(kept, features)
    assert (kept.shape, kept.dtype) == ((1, 4, 6), np.float64)
    recorded = Recorded(make_plan(encoder=EncoderPlan("sound", 0, 1, 1, 1)), SOUND)
    recorded.call({"features": kept})
    np.testing.assert_array_equal(recorded.given[0], features[None])
    assert recorded.given[0].dtype == np.float32
    assert recorded.order == ["read", "release"]  # the arena is free for the next call


@pytest.mark.parametrize("given", ["inputs", "memory"])
def test_what_waits_holds_what_it_was_given(
    fake_model: Make, make_plan: Make, make_facts: Make, given: str
) -> None:
    """And is converted for as many requests as get pages."""
    encoded = []

    class Model(fake_model):  # type: ignore[misc, valid-type]
        def run_encoder(self, inputs: Any) -> NDArray[np.float32]:
            encoded.append(inputs)
            return np.zeros((2, 4), np.float32)

    plan = make_plan(max_memory=9, encoder=EncoderPlan("sound", 0, 1, 1, 1))
    model = Model(plan, dataclasses.replace(make_facts(memory=(4, "float32")), encoder=SOUND))
    scheduler = Scheduler(model)
    array = np.ones((4, 6)) if given == "inputs" else np.ones((3, 4))
    source: dict[str, Any] = {"inputs": {"features": array}} if given == "inputs" else {"memory": array}
    requests = [scheduler.add([1], SamplingParams(), **source) for _ in range(plan.max_batch + 3)]

    def shared(request: Any) -> bool:
        held = request.memory if request.inputs is None else request.inputs["features"]
        return held is not None and np.shares_memory(held, array)

    assert all(map(shared, requests))
    scheduler._admit()
    admitted = scheduler.running
    assert 0 < admitted < len(requests)
    assert [shared(request) for request in requests] == [False] * admitted + [True] * (
        len(requests) - admitted
    )
    assert {request.memory.dtype for request in requests[:admitted]} == {np.dtype(np.float32)}
    assert len(encoded) == (admitted if given == "inputs" else 0)


@pytest.mark.parametrize(
    ("given", "facts", "message"),
    [
        ({"text": IDS}, TEXT, "no input 'text'; it reads ids int64 [1, any], mask int64 [1, any] (optional)"),
        ({}, TEXT, "input 'ids' is missing"),
        ({"mask": IDS}, TEXT, "input 'ids' is missing"),
        ({"ids": IDS.astype(np.float32)}, TEXT, "'ids' is float32 [1, 3]; it reads ids int64 [1, any]"),
        ({"ids": np.ones((2, 3), int)}, TEXT, "'ids' is int64 [2, 3]"),
        ({"ids": np.int64(3)}, TEXT, "'ids' is int64 []"),
        ({"ids": np.array([["a"]])}, TEXT, "'ids' is <U1 [1, 1]"),
        ({"ids": [1]}, TEXT, "'ids' is 1 long; one request may have 2 to 5"),
        ({"ids": [1] * 6}, TEXT, "'ids' is 6 long; one request may have 2 to 5"),
        ({"ids": [1, 100]}, TEXT, "'ids' has 100, which does not exist: it has 0 .. 99"),
        ({"ids": [1, -1]}, TEXT, "'ids' has -1, which does not exist"),
        ({"ids": IDS, "mask": [1, 1]}, TEXT, "inputs 'ids' and 'mask' are 3 and 2 long, not alike"),
        ({"ids": IDS, "mask": [1, 1, 0]}, TEXT, "'mask' is not all ones; requests are not padded"),
        ({"ids": IDS, "mask": [1, 1, 0.5]}, TEXT, "'mask' is not all ones"),
        ({"ids": [[1, 2], [3]]}, TEXT, "the encoder's input 'ids' is no array of numbers: "),
        ({"ids": [[2**40 + 5]] * 2}, NARROW, "'ids' is int64 [2, 1]"),
        ({"ids": [[2**32 + 5, 1]]}, NARROW, "'ids' has 4294967301, which is beyond int32"),
        ({"ids": [[-(2**31) - 1, 1]]}, NARROW, "'ids' has -2147483649, which is beyond int32"),
        ({"ids": np.array([1, 2**63], np.uint64)}, TEXT, "'ids' has 9223372036854775808, which does not"),
        ({"features": np.full((4, 6), 1e300)}, SOUND, "'features' has 1e+300, which is beyond float32"),
        ({"features": np.full((4, 6), -1e39)}, SOUND, "'features' has -1e+39, which is beyond float32"),
        ({"features": np.zeros((4, 6), "V2")}, SOUND, "'features' is |V2 [4, 6]"),
        ({"features": np.ones((4, 6))}, MASKED, "'mask' is missing: nothing else says how long it is"),
        ({"features": np.ones((4, 6)), "mask": [1]}, MASKED, "'mask' is 1 long; one request may have 2"),
        ({"features": np.ones((4, 5))}, SOUND, "it reads features float32 [1, 4, 6]"),
        ({"features": np.ones((4, 6), int)}, SOUND, "'features' is int64 [4, 6]"),
    ],
)
def test_what_does_not_fit_is_refused(check: Make, given: Any, facts: EncoderFacts, message: str) -> None:
    with pytest.raises(InputError) as refused:
        check(given, facts)
    assert message in str(refused.value)


def test_requests_along_the_first_axis() -> None:
    first, second = batched({"a": np.array([[1], [2]]), "b": [[3, 4], [5]], "c": ["x", "yz"]}, 2)
    assert (first["a"].tolist(), first["b"], first["c"]) == ([1], [3, 4], "x")
    assert (second["a"].tolist(), second["b"], second["c"]) == ([2], [5], "yz")


@pytest.mark.parametrize(
    ("given", "found"),
    [(np.ones(3), "3"), (np.ones(()), "one"), ("ab", "one"), (5, "one"), ({0: 1, 1: 2}, "one")],
)
def test_another_number_of_requests_is_refused(given: Any, found: str) -> None:
    with pytest.raises(InputError) as refused:
        list(batched({"a": given}, 2))
    assert f"2 prompts, and the encoder's input 'a' for {found}: give one for each" in str(refused.value)


def test_numbers_that_are_none_are_given_on(check: Make) -> None:
    features = np.full((4, 6), np.nan)
    features[0] = np.inf
    assert check({"features": features}, SOUND)["features"].base is not None


@pytest.mark.parametrize(
    ("memory", "message"),
    [
        ((4, "float32"), "the artifact has no encoder: compile it with --encoder"),
        (None, "reads no encoder's"),
    ],
)
def test_a_model_without_encoder(
    fake_model: Make, make_plan: Make, make_facts: Make, memory: Any, message: str
) -> None:
    scheduler = Scheduler(fake_model(make_plan(max_memory=9), make_facts(memory=memory)))
    with pytest.raises(InputError, match=message):
        scheduler.add([1], SamplingParams(), inputs={"ids": IDS})
    assert not scheduler.busy
