"""Values from keys: the equations hold, and the judgement tells good weights from bad ones."""

from __future__ import annotations

import numpy as np
import pytest

from kvc.reconstruction import LIMIT, Judgement, Solver, decided
from kvc_passes.facts import StateForm

D = 64


def weights(values: np.ndarray) -> Solver:
    """W_K with these singular values, and a random W_V."""
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.standard_normal((D, D)))[0] for _ in range(2))
    return Solver(left * values @ right.T, rng.standard_normal((D, D)) / 8)


@pytest.mark.parametrize("rest", [0, 1, 16, D - 1])
def test_values_are_a_product_of_keys_and_some_directions(rest: int) -> None:
    solver = weights(np.geomspace(1, 1e-2, D))
    made, weak = solver.solve(rest)
    assert (made.shape, weak.shape) == ((D + rest, D), (D, rest))
    x = np.random.default_rng(1).standard_normal((9, D))
    row = np.concatenate([x @ solver.key, x @ weak], axis=1)
    np.testing.assert_allclose(row @ made, x @ solver.value, atol=1e-9)


def test_the_directions_are_those_that_keys_are_weakest_in() -> None:
    solver = weights(np.concatenate([np.ones(D - 2), [1e-3, 1e-4]]))
    assert solver.condition == pytest.approx(1e4, rel=1e-3)
    _, weak = solver.solve(2)
    assert np.linalg.norm(weak.T @ solver.key) < 2e-3


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_keys_of_even_strength_pass_and_weak_ones_need_directions(dtype: str) -> None:
    even = weights(np.ones(D)).judge(dtype, 4)
    assert even.ratios[0] < LIMIT
    assert even.least(some=False) == 0
    uneven = weights(np.concatenate([np.ones(D - 10), np.full(10, 1e-3)])).judge(dtype, 4)
    assert uneven.ratios[0] > 20
    assert (uneven.least(some=False), uneven.least(some=True)) == (None, 16)
    assert uneven.ratios[16] < LIMIT


def test_keys_that_miss_a_direction_never_pass_alone() -> None:
    missing = weights(np.concatenate([np.ones(D - 1), [0.0]])).judge("float16", 4)
    assert missing.least(some=False) is None
    assert missing.least(some=True) == 16


def test_a_judgement_decides_what_a_layer_keeps() -> None:
    judged = Judgement({0: 30.0, 16: 2.0, 32: 1.25}, 400.0)
    bare, rest = (
        StateForm(name, 1000, "160 elements: K; not measured", False) for name in ("k_only", "k_plus_r")
    )  # type: ignore[arg-type]
    refused, chosen = decided(bare, judged, "float16"), decided(rest, judged, "float16")
    assert (refused.legal, chosen.legal, chosen.rest, chosen.token_bytes) == (False, True, 32, 1064)
    assert refused.detail == (
        "error 30.00 times that of K and V in float16, condition of W_K 400; at most 1.5 is allowed"
    )
    assert chosen.detail.startswith(
        "160 elements: K and 32 directions of what it is a projection of; error 1.25"
    )
