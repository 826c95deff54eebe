"""Choosing tokens on Triton's interpreter: against the host's sampler, and against float64.

Both round weights to float32, with a relative error of at most 1e-6 where weights matter: a token may differ
where a random number is that near to a border. Of the numbers here none is.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from triton_interpreter import run

from kvc.kernels.cuda.sampling import choose_kernel, peaks_kernel, shift_of
from kvc.runtime.choices import CHOSEN, WORDS, blocks_of, read_choices, write_draws
from kvc.runtime.sampler import Choice, Draw, SamplingParams, choose

pytest.importorskip("triton")

PADDING = 3


def launch(logits: NDArray[np.float32], words: NDArray[np.int64]) -> list[Choice]:
    """Choose from rows [r, vocab], which stand beside columns that must not count, and are not written to."""
    rows, vocab = logits.shape
    columns = vocab + PADDING
    memory = torch.full((rows + 2, columns), torch.inf)
    memory[1:-1, :vocab] = torch.from_numpy(logits)
    given = memory[1:-1]
    parts = torch.zeros(rows, blocks_of(vocab), dtype=torch.int64)
    chosen = torch.full((rows, CHOSEN), -1, dtype=torch.int32)
    run(peaks_kernel(vocab, columns), (rows, blocks_of(vocab)), given, parts)
    run(choose_kernel(vocab, columns), (rows,), given, parts, torch.from_numpy(words), chosen)
    assert torch.isinf(memory[:, vocab:]).all()
    return read_choices(chosen.numpy())


def on_device(logits: NDArray[np.float32], draws: Sequence[Draw]) -> list[Choice]:
    words = np.full((len(draws), WORDS), -1, np.int64)
    write_draws(words, draws)
    return launch(logits, words)


OPTIONS = [
    SamplingParams(),
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=2.5, top_k=7),
    SamplingParams(temperature=0.3, top_k=100_000),
    SamplingParams(temperature=1.3, top_p=0.9),
    SamplingParams(temperature=1.0, top_p=0.05),
    SamplingParams(temperature=0.8, top_k=40, top_p=0.6),
    SamplingParams(temperature=1e-9),
    SamplingParams(temperature=1.0, top_p=1e-17),
]


@pytest.mark.parametrize(("vocab", "coarse"), [(9, True), (300, True), (300, False), (9001, True)])
def test_tokens_are_those_of_the_host(vocab: int, coarse: bool) -> None:
    """`coarse` logits are multiples of 1/2: with many equal ones, at the borders of top-k and top-p, too."""
    random = np.random.default_rng(vocab)
    logits = (3 * random.normal(size=(len(OPTIONS), vocab))).astype(np.float32)
    if coarse:
        logits = np.round(2 * logits) / 2
    logits[1, : vocab // 2] = -np.inf

    def draws() -> list[Draw]:
        return [Draw(params, np.random.default_rng(i)) for i, params in enumerate(OPTIONS)]

    assert on_device(logits, draws()) == choose(logits.copy(), draws())


@pytest.mark.parametrize("vocab", [8200, pytest.param(262_144, marks=pytest.mark.slow)])
def test_top_k_and_top_p_cut_among_equal_logits(vocab: int) -> None:
    """In several blocks; and as the host does it where all are different."""
    params = SamplingParams(temperature=1.0, top_k=5000, top_p=0.8)
    logits = np.random.default_rng(0).normal(size=(2, vocab)).astype(np.float32)
    logits[1] = 2.0

    def draws() -> list[Draw]:
        return [Draw(params, np.random.default_rng(seed)) for seed in (1, 2)]

    got = on_device(logits, draws())
    assert got == choose(logits, draws())
    assert got[1] == int(4000 * np.random.default_rng(2).random())  # the first 4000 are left, equally likely


def test_greedy_takes_the_lowest_of_equal_ids() -> None:
    logits = np.full((4, 9000), -5.0, np.float32)
    logits[0, [4097, 8999]] = -1.5  # in the second and third block
    logits[1, [5, 6, 4096]] = 0.0, -0.0, 0.0
    logits[2, [5, 6]] = -0.0, 0.0
    logits[3] = -np.inf
    logits[3, 77] = -1e30
    assert on_device(logits, [Draw(SamplingParams(), np.random.default_rng())] * 4) == [4097, 5, 5, 77]


def test_no_finite_peak_is_an_error_for_its_row_alone() -> None:
    logits = np.zeros((5, 5000), np.float32)
    logits[0, 4500] = np.nan
    logits[1, 4500] = -np.nan
    logits[2, 4500] = np.inf
    logits[3] = -np.inf
    params = SamplingParams(temperature=1.0, seed=1)
    got = on_device(logits, [Draw(params, np.random.default_rng(4)) for _ in range(5)])
    assert [str(each).split()[3] for each in got[:4]] == ["nan", "nan", "inf", "-inf"]
    assert got[4] == int(5000 * np.random.default_rng(4).random())


def test_draws_change_at_the_borders_of_the_distribution() -> None:
    """Numbers 1e-5 before and behind every border of the sums of probabilities in float64."""
    logits, temperature = np.array([0.3, -2.0, 1.7, 0.3, -0.5, 1.1], np.float32), np.float32(0.7)
    weights = np.exp(logits.astype(np.float64) / float(temperature))
    kept = np.array([True, False, True, True, False, True])  # of top-k 4
    borders = np.cumsum(np.where(kept, weights, 0) / weights[kept].sum())
    tokens = np.flatnonzero(kept)
    numbers = np.concatenate([borders[tokens] - 1e-5, borders[tokens][:-1] + 1e-5])
    words = np.zeros((len(numbers), WORDS), np.int64)
    words[:, 0] = temperature.view(np.int32)
    words[:, 1] = 4
    words[:, 3] = np.array([int(u * 2.0**64) for u in numbers], np.uint64).view(np.int64)
    expected = [*tokens, *tokens[1:]]
    assert launch(np.tile(logits, (len(numbers), 1)), words) == expected


@pytest.mark.parametrize("vocab", [1, 2, 3, 32_000, 151_936, 262_144, 300_000])
def test_sums_fit_64_bits(vocab: int) -> None:
    assert vocab << shift_of(vocab) <= 1 << 62
    assert shift_of(vocab) >= 43  # so that what is lost is less than the rounding of a float32
