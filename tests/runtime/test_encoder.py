"""What a request may come with for an encoder, and what is refused before anything runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kvc.runtime.encoder import batched, checked_inputs
from kvc.runtime.sampler import SamplingParams
from kvc.runtime.scheduler import Scheduler
from kvc_passes.errors import InputError
from kvc_passes.facts import EncoderFacts, EncoderInput
from kvc_passes.plans import EncoderPlan

Make = Callable[..., Any]
TEXT = EncoderFacts(
    "text",
    (EncoderInput("ids", "int64", (None,), 100), EncoderInput("mask", "int64", (None,), None, mask=True)),
    2,
    {},
    1,
)
SOUND = EncoderFacts("sound", (EncoderInput("features", "float32", (4, 6)),), 0, {}, 1)
IDS = np.array([[1, 2, 3]])


@pytest.fixture
def check(make_plan: Make) -> Callable[..., Any]:
    def checked(given: Any, facts: EncoderFacts = TEXT) -> Any:
        longest = 5 if facts is TEXT else 0
        return checked_inputs(given, make_plan(encoder=EncoderPlan(facts.name, longest, 1, 1, 1)), facts)

    return checked


def test_a_batch_may_be_left_out_and_a_mask_is_all_ones(check: Make) -> None:
    for ids in (IDS, IDS[0], IDS.astype(np.int32), [1, 2, 3]):
        got = check({"ids": ids})
        np.testing.assert_array_equal(got["ids"], IDS)
        np.testing.assert_array_equal(got["mask"], [[1, 1, 1]])
        assert got["ids"].dtype == got["mask"].dtype == np.int64
    assert check({"ids": IDS, "mask": np.ones((1, 3), bool)})["mask"].dtype == np.int64
    features = np.ones((4, 6), np.float64)
    assert check({"features": features}, SOUND)["features"].shape == (1, 4, 6)
    assert check({"features": features}, SOUND)["features"].dtype == np.float32


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
        ({"ids": IDS, "mask": [1, 1, 0]}, TEXT, "'mask' marks padding; requests are not padded"),
        ({"features": np.ones((4, 5))}, SOUND, "it reads features float32 [1, 4, 6]"),
        ({"features": np.ones((4, 6), int)}, SOUND, "'features' is int64 [4, 6]"),
    ],
)
def test_what_does_not_fit_is_refused(check: Make, given: Any, facts: EncoderFacts, message: str) -> None:
    with pytest.raises(InputError) as refused:
        check(given, facts)
    assert message in str(refused.value)


def test_requests_along_the_first_axis() -> None:
    first, second = batched({"a": np.array([[1], [2]]), "b": [3, 4]}, 2)
    assert (first["a"].tolist(), first["b"], second["a"].tolist(), second["b"]) == ([1], 3, [2], 4)
    with pytest.raises(InputError, match=r"2 prompts, and the encoder's input 'a' is \[3\]: one for each"):
        list(batched({"a": np.ones(3)}, 2))


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
