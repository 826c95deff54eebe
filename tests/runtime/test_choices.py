"""What a GPU is told of rows that it chooses tokens from, and what is read of its answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from kvc.runtime.choices import BLOCK, CHOSEN, WORDS, blocks_of, choice_shapes, read_choices, write_draws
from kvc.runtime.sampler import Draw, SamplingParams, sample
from kvc.runtime.sizes import choice_bytes
from kvc_passes.errors import Error
from kvc_passes.facts import ModelFacts
from kvc_passes.plans import Plan


def words(*params: SamplingParams, seed: int = 3) -> list[list[int]]:
    array = np.full((len(params), WORDS), -1, np.int64)
    write_draws(array, [Draw(each, np.random.default_rng(seed)) for each in params])
    return array.view(np.uint64).tolist()


def test_greedy_rows_are_zeros_and_take_no_random_number() -> None:
    rng = np.random.default_rng(1)
    array = np.full((2, WORDS), -1, np.int64)
    write_draws(array, [Draw(SamplingParams(), rng), Draw(SamplingParams(temperature=2.0, top_k=1), rng)])
    assert not array.any()
    assert rng.random() == np.random.default_rng(1).random()


def test_the_words_of_a_row_that_is_drawn() -> None:
    (row,) = words(SamplingParams(temperature=0.7, top_k=40, top_p=0.75))
    temperature, top_k, drop, uniform = row
    assert np.uint32(temperature).view(np.float32) == np.float32(0.7)
    assert (top_k, drop) == (40, 1 << 62)
    assert uniform / 2**64 == np.random.default_rng(3).random()


def test_extreme_values_fit_their_words() -> None:
    hot = SamplingParams(temperature=1e-30, top_k=1 << 40, top_p=1e-20)
    ((temperature, top_k, drop, _),) = words(hot)
    assert np.uint32(temperature).view(np.float32) == np.float32(1e-6)
    assert (top_k, drop) == (2**31 - 1, 2**64 - 1)
    ((temperature, *_),) = words(SamplingParams(temperature=1e300))
    assert np.uint32(temperature).view(np.float32) == np.float32(1e38)
    ((_, _, drop, _),) = words(SamplingParams(temperature=1.0, top_p=1 - 1e-16))
    assert drop > 0  # 0 would be no top-p


def test_a_generator_goes_on_as_on_the_host() -> None:
    params, one, other = SamplingParams(temperature=1.0), *(np.random.default_rng(5) for _ in range(2))
    write_draws(np.zeros((3, WORDS), np.int64), [Draw(params, one)] * 3)
    for _ in range(3):
        sample(np.zeros(9, np.float32), params, other)
    assert one.random() == other.random()


@pytest.mark.parametrize("peak", [float("nan"), float("inf"), float("-inf")])
def test_rows_without_a_finite_peak_are_errors(peak: float) -> None:
    chosen = np.array([[7, 0], [8, 0]], np.int32)
    chosen[:, 1] = np.array([1.5, peak], np.float32).view(np.int32)
    first, second = read_choices(chosen)
    assert first == 7
    assert isinstance(second, Error)
    with pytest.raises(Error, match=f"returned {peak} as the largest logit"):
        sample(np.array([peak], np.float32), SamplingParams(), np.random.default_rng())
    assert str(second).startswith(f"the model returned {peak} as the largest logit")


def test_shapes_are_those_of_the_largest_call() -> None:
    assert choice_shapes(5, 2 * BLOCK + 1) == {
        "parts": ("int64", (5, 3)),
        "draws": ("int64", (5, WORDS)),
        "chosen": ("int32", (5, CHOSEN)),
    }
    assert blocks_of(BLOCK) == 1


@pytest.mark.parametrize(("vocab", "logits"), [(2 * BLOCK + 1, BLOCK), (BLOCK, 2 * BLOCK + 1)])
def test_tokens_without_a_logit_and_logits_without_a_token_are_not_chosen(
    make_facts: Callable[..., ModelFacts], make_plan: Callable[..., Plan], vocab: int, logits: int
) -> None:
    """A kernel would read and write behind the last row where the embedding table is the larger one."""
    facts = make_facts(vocab=vocab, logits=logits)
    assert facts.choices == BLOCK
    plan = replace(make_plan(), target={"kind": "cuda"})
    assert choice_bytes(plan, facts) == choice_bytes(plan, make_facts(vocab=BLOCK, logits=BLOCK))
