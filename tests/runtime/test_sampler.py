"""Sampling against definitions, by counting."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kvc.runtime.sampler import SamplingParams, sample, scratch_bytes
from kvc_passes.errors import Error, InputError

LOGITS = st.lists(st.sampled_from([-2.0, -1.0, 0.0, 0.5, 1.0, 3.0]), min_size=1, max_size=12)


def _probabilities(logits: list[float], params: SamplingParams) -> NDArray[np.float64]:
    """The distribution by its definition: temperature, then top-k, then top-p; ties go to the lowest ids."""
    scaled = np.array(logits) / params.temperature
    weights = np.exp(scaled - scaled.max())
    order = sorted(range(len(logits)), key=lambda i: (-weights[i], i))
    if params.top_k:
        order = order[: params.top_k]
    sums = np.cumsum(weights[order])
    if params.top_p < 1:
        order = order[: int(np.sum(sums < params.top_p * sums[-1])) + 1]
    kept = np.zeros(len(logits))
    kept[order] = weights[order]
    result: NDArray[np.float64] = kept / kept.sum()
    return result


def _draw(logits: list[float], params: SamplingParams, count: int) -> NDArray[np.float64]:
    rng = np.random.default_rng(params.seed)
    drawn = [sample(np.array(logits, np.float32), params, rng) for _ in range(count)]
    return np.bincount(drawn, minlength=len(logits)) / count


@settings(max_examples=40, deadline=None)
@given(
    logits=LOGITS,
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    top_k=st.integers(0, 14),
    top_p=st.sampled_from([0.11, 0.513, 0.907, 1.0]),
)
def test_frequencies_are_the_defined_probabilities(
    logits: list[float], temperature: float, top_k: int, top_p: float
) -> None:
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, seed=5)
    expected = _probabilities(logits, params)
    found = _draw(logits, params, 1500)
    assert np.all(found[expected == 0] == 0)
    # 1500 draws have a standard deviation of at most 0.013; 5 of them
    np.testing.assert_allclose(found, expected, atol=0.065)


@given(logits=LOGITS)
def test_greedy_takes_the_first_largest_and_changes_nothing(logits: list[float]) -> None:
    row = np.array(logits, np.float32)
    row.flags.writeable = False
    assert sample(row, SamplingParams(), np.random.default_rng()) == logits.index(max(logits))


@pytest.mark.parametrize(
    "params",
    [{"temperature": 1e-30}, {"temperature": 1.0, "top_k": 1}, {"temperature": 1.0, "top_p": 1e-17}],
)
def test_limits_are_greedy(params: dict[str, Any]) -> None:
    row = np.array([1.0, 3.0, 2.999], np.float32)
    for _ in range(50):
        assert sample(row.copy(), SamplingParams(**params), np.random.default_rng()) == 1


@pytest.mark.parametrize("temperature", [1.0, 1e300])
def test_minus_infinity_is_never_drawn(temperature: float) -> None:
    logits = [float("-inf"), 0.0, float("-inf"), 0.0]
    found = _draw(logits, SamplingParams(temperature=temperature, seed=1), 400)
    assert found[0] == found[2] == 0
    assert found[1] > 0.3


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_an_error(bad: float) -> None:
    with pytest.raises(Error, match="largest logit"):
        sample(np.array([0.0, bad], np.float32), SamplingParams(), np.random.default_rng())


def test_seed_gives_the_same_tokens() -> None:
    params = SamplingParams(temperature=1.5, seed=9)
    first, second = (np.random.default_rng(params.seed) for _ in range(2))
    logits = np.random.default_rng(0).normal(size=(40, 50)).astype(np.float32)
    assert [sample(row.copy(), params, first) for row in logits] == [
        sample(row.copy(), params, second) for row in logits
    ]


@pytest.mark.parametrize(
    "params", [{}, {"top_k": 50}, {"top_k": 49999}, {"top_p": 0.9}, {"top_k": 40000, "top_p": 0.5}]
)
def test_memory_is_within_the_promise(params: dict[str, Any]) -> None:
    vocab = 50_000
    logits = np.random.default_rng(0).normal(size=vocab).astype(np.float32)
    rng = np.random.default_rng(0)
    tracemalloc.start()
    sample(logits, SamplingParams(temperature=1.0, **params), rng)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak <= scratch_bytes(vocab)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", float("nan")),
        ("seed", -1),
        ("max_new_tokens", 0),
        ("stop", ("",)),
        ("stop", "text"),
    ],
)
def test_impossible_values_are_refused(field: str, value: Any) -> None:
    with pytest.raises(InputError, match=field):
        SamplingParams(**{field: value})
