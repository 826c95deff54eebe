"""Prefill that makes keys and values again, against numpy in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_machines import MACHINES, Machine
from page_cases import mask_of, numpy_type

from kvc.kernels import packing
from kvc.kernels.append import append_kv
from kvc.kernels.attention import AttentionShape
from kvc.kernels.head_product import packed_tensor
from kvc.kernels.rebuilt import Made, prefill_rebuilt
from kvc.stored_weights import stored
from kvc_passes.weight_format import FLOAT32, WeightFormat
from kvc_passes.weights import HeadWeight, Source, WeightPart

PAGE, PAGES = 16, 48
HALF = WeightFormat("float16")
CASES: dict[str, tuple[AttentionShape, Made]] = {
    "as GPT-2": (AttentionShape(4, 1, 96, 96, 0.2, shared=True), Made(4, 24, 24, 96, 0, FLOAT32, FLOAT32)),
    "as DeepSeek, float16, window": (
        AttentionShape(6, 1, 45, 40, 0.2, window=37, shared=True, kv_dtype="float16"),
        Made(6, 16, 10, 40, 5, HALF, HALF),
    ),
    "groups, slopes, odd": (
        AttentionShape(6, 1, 33, 33, 0.2, slopes=True, softcap=20.0, shared=True, kv_dtype="bfloat16"),
        Made(2, 35, 7, 33, 0, FLOAT32, HALF),
    ),
}


def _kernel(name: str, what: str, traits: Any) -> Any:
    latent, made = CASES[name]
    return append_kv(latent, traits) if what == "append" else prefill_rebuilt(latent, made, traits)


def check(machine: Machine, name: str, lengths: list[tuple[int, int]], seed: int, tile: int = 7) -> None:
    """Sequences of (length, new tokens) in one call; tiles in any order, pages anywhere, the others NaN."""
    latent, made = CASES[name]
    rng = np.random.default_rng(seed)
    group, wide = latent.heads // made.heads, made.key + made.rest
    slopes = rng.uniform(0, 0.3, latent.heads).astype(np.float32)
    weights, numbers = [], []
    for width, absorbed, format in (
        (made.key, True, made.key_format),
        (made.value, False, made.value_format),
    ):
        matrix = (rng.standard_normal((made.depth, made.heads * width)) / 4).astype(format.dtype)
        weight = HeadWeight(
            Source("w", matrix.shape[1], transposed=True), made.depth, made.heads, width, 0, width,
            absorbed, format,
        )  # fmt: skip
        tensor = packed_tensor(made.heads, weight.columns, weight.inner, format, machine.traits)
        weights.append(stored(WeightPart(weight), tensor, {"w": matrix}, packing))
        numbers.append(matrix.astype(float).reshape(made.depth, made.heads, width).transpose(1, 0, 2))
    order = list(rng.permutation(np.arange(1, PAGES)))
    pool = np.full((PAGES, 1, PAGE, latent.head_dim), np.nan, numpy_type(latent.kv_dtype))
    table, tiles, positions, kept, at = np.zeros((len(lengths), PAGES), np.int32), [], [], [], 0
    for row, (length, new) in enumerate(lengths):
        pages = np.array([order.pop() for _ in range(-(-length // PAGE))])
        table[row, : len(pages)] = pages
        x = rng.standard_normal((1, 1, length, latent.head_dim)).astype(np.float32)
        where = np.arange(length)
        slots = (pages[where // PAGE] * PAGE + where % PAGE).astype(np.int32)
        pool = machine.call(machine.build(_kernel, name, "append"), x, slots, pool)[-1]
        kept.append(x[0, 0].astype(numpy_type(latent.kv_dtype)).astype(float))
        tiles += [(row, at + i, min(tile, new - i)) for i in range(0, new, tile)]
        positions.append(np.arange(length - new, length))
        at += new
    q = 2 * rng.standard_normal((1, latent.heads, at, wide)).astype(np.float32)
    out = machine.call(
        machine.build(_kernel, name, "prefill"),
        *(q, pool, np.concatenate(positions), np.array(rng.permutation(tiles), np.int32), table),
        *([slopes] if latent.slopes else []),
        *weights,
        np.full((1, at, latent.heads, made.value), np.nan, np.float32),
    )[-1][0]
    at = 0
    for x, where in zip(kept, positions):
        masks = mask_of(latent, where, len(x))
        for h in range(latent.heads):
            own = x[:, : made.depth]
            k = np.concatenate([own @ numbers[0][h // group], x[:, made.depth :]], axis=1)
            s = q[0, h, at : at + len(where)].astype(float) @ k.T * latent.scale
            s = latent.softcap * np.tanh(s / latent.softcap) if latent.softcap else s
            if latent.slopes:
                s = s + float(slopes[h]) * (np.arange(len(x)) - where[:, None])
            s = np.where(masks[h], s, -np.inf)
            p = np.exp(s - s.max(axis=1, keepdims=True))
            expected = p / p.sum(axis=1, keepdims=True) @ (own @ numbers[1][h // group])
            # Scores up to 60, of keys summed from 96 products: errors of 1e-4 of them move weights as much.
            np.testing.assert_allclose(out[at : at + len(where), h], expected, rtol=0, atol=1e-3)
        at += len(where)


@pytest.mark.parametrize("name", CASES)
def test_sequences_of_every_kind(machine: Machine, name: str) -> None:
    check(machine, name, [(180, 97), (1, 1), (51, 2), (16, 16), (50, 50), (101, 1)], 1)


@pytest.mark.parametrize("name", CASES)
def test_more_rows_than_a_task_takes(machine: Machine, name: str) -> None:
    check(machine, name, [(640, 600)], 2, tile=40)


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from(sorted(MACHINES)),
    st.sampled_from(sorted(CASES)),
    st.lists(
        st.integers(1, 150).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))),
        min_size=1,
        max_size=4,
    ),
    st.integers(0, 99),
)
def test_ragged_calls(machine: str, name: str, lengths: list[tuple[int, int]], seed: int) -> None:
    check(MACHINES[machine], name, lengths, seed)
