"""Attention whose keys are made of kept values in both phases, against numpy in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_machines import MACHINES, Machine
from page_cases import attended, numpy_type

from kvc.kernels.append import append_kv
from kvc.kernels.attention import AttentionShape
from kvc.kernels.rekeyed import decode_rekeyed, prefill_rekeyed, row_of
from kvc_passes.sites import Rekeyed

PAGE, PAGES, SPLITS, TILE = 16, 128, 3, 9
CASES: dict[str, tuple[AttentionShape, Rekeyed]] = {
    "as Gemma-4": (
        AttentionShape(8, 2, 64, 64, 0.12, kv_dtype="float16"),
        Rekeyed(2, 64, 32, 8, fine=True, scaled=True),
    ),
    "odd, turned in part, as it is, chunks": (
        AttentionShape(3, 3, 35, 35, 0.2, chunk=50, kv_dtype="bfloat16"),
        Rekeyed(3, 35, 11, 11, fine=True, scaled=False),
    ),
    "not turned, everything else": (
        AttentionShape(
            6, 2, 24, 24, 0.2, slopes=True, softcap=20.0, sink_scores=True, window=40, sink_keys=5
        ),
        Rekeyed(2, 24, 0, 0, fine=False, scaled=True),
    ),
}


def _kernel(name: str, what: str, traits: Any) -> Any:
    shape, kept = CASES[name]
    if what == "append":
        return append_kv(row_of(shape, kept), traits)
    if what == "prefill":
        return prefill_rekeyed(shape, kept, TILE, traits)
    return decode_rekeyed(shape, kept, traits, SPLITS)


class Case:
    """Sequences of given lengths in pages anywhere, the others NaN, and what their keys and values are."""

    def __init__(self, machine: Machine, name: str, lengths: list[int], seed: int) -> None:
        (self.shape, self.kept), self.machine, self.name = CASES[name], machine, name
        self.rng = np.random.default_rng(seed)
        heads, width = self.shape.heads, self.kept.width
        self.slopes, self.sinks = self.normal(heads) / 5, self.normal(heads)
        self.factors = self.rng.uniform(-2, 2, self.kept.values).astype(np.float32)
        order = list(self.rng.permutation(np.arange(1, PAGES)))
        self.pool = np.full((PAGES, 1, PAGE, width), np.nan, numpy_type(self.shape.kv_dtype))
        self.table = np.zeros((len(lengths), PAGES), np.int32)
        self.keys, self.values = [], []
        for row, length in enumerate(lengths):
            pages = np.array([order.pop() for _ in range(-(-length // PAGE))])
            self.table[row, : len(pages)] = pages
            self._append(pages, length)

    def normal(self, *shape: int) -> np.ndarray:
        return self.rng.standard_normal(shape).astype(np.float32)

    def _append(self, pages: np.ndarray, length: int) -> None:
        kept, where, dtype = self.kept, np.arange(length), numpy_type(self.shape.kv_dtype)
        angles = where[:, None] * 3.0 / (1 + np.arange(kept.pairs))
        exact = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
        coarse = np.floor(exact * 256) / 256
        turns = [coarse, (exact - coarse) * 256] if kept.fine else [exact]
        rows = np.concatenate([self.normal(length, kept.values), *turns], axis=1).astype(np.float32)
        slots = (pages[where // PAGE] * PAGE + where % PAGE).astype(np.int32)
        build = self.machine.build(_kernel, self.name, "append")
        self.pool = self.machine.call(build, rows[None, None], slots, self.pool)[-1]
        values = rows[:, : kept.values].astype(dtype).astype(float)
        keys = (values * (self.factors if kept.scaled else 1)).reshape(length, kept.count, kept.dim)
        if not kept.fine:
            exact = exact.astype(dtype).astype(float)
        cosine, sine = exact[:, None, : kept.pairs], exact[:, None, kept.pairs :]
        low, high = slice(0, kept.pairs), slice(kept.half, kept.half + kept.pairs)
        turned = keys.copy()
        turned[..., low] = keys[..., low] * cosine - keys[..., high] * sine
        turned[..., high] = keys[..., high] * cosine + keys[..., low] * sine
        self.keys.append(turned)
        self.values.append(values.reshape(keys.shape))

    @property
    def arguments(self) -> list[np.ndarray]:
        """What kernels take behind the block table."""
        more = [self.slopes] if self.shape.slopes else []
        more += [self.sinks] if self.shape.sink_scores else []
        return [*more, *([self.factors] if self.kept.scaled else [])]

    def check(self, out: np.ndarray, q: np.ndarray, row: int, positions: np.ndarray) -> None:
        """out [n, H, D] of queries [H, n, D] at `positions` of a sequence."""
        expected = attended(
            self.shape, q, self.keys[row], self.values[row], positions, self.slopes, self.sinks
        )
        # Kernels sum in float32; fine angles have 16 bits, which scores up to 60 show.
        atol = 2e-3 if self.kept.fine else 1e-4
        np.testing.assert_allclose(out, expected, rtol=0, atol=atol)


def prefilled(machine: Machine, name: str, lengths: list[tuple[int, int]], seed: int) -> None:
    """Sequences of (length, new tokens) in one call; tiles in any order."""
    case = Case(machine, name, [length for length, _ in lengths], seed)
    shape, tiles, positions, at = case.shape, [], [], 0
    for row, (length, new) in enumerate(lengths):
        tiles += [(row, at + i, min(TILE, new - i)) for i in range(0, new, TILE)]
        positions.append(np.arange(length - new, length))
        at += new
    q = 2 * case.normal(1, shape.heads, at, shape.head_dim)
    out = machine.call(
        machine.build(_kernel, name, "prefill"),
        *(q, case.pool, np.concatenate(positions), np.array(case.rng.permutation(tiles), np.int32)),
        *(case.table, *case.arguments, np.full((1, at, shape.heads, shape.value_dim), np.nan, np.float32)),
    )[-1][0]
    at = 0
    for row, where in enumerate(positions):
        end = at + len(where)
        case.check(out[at:end], q[0, :, at:end], row, where)
        at = end


def decoded(machine: Machine, name: str, lengths: list[int], seed: int) -> None:
    """A step of sequences of these lengths."""
    case = Case(machine, name, lengths, seed)
    shape, batch = case.shape, len(lengths)
    q = 2 * case.normal(1, shape.heads, batch, shape.head_dim)
    out = machine.call(
        machine.build(_kernel, name, "decode"),
        *(q, case.pool, np.array(lengths) - 1, case.table, *case.arguments),
        np.full((batch, SPLITS, shape.heads, shape.value_dim + 2), np.nan, np.float32),
        np.full((1, batch, shape.heads, shape.value_dim), np.nan, np.float32),
    )[-1][0]
    for row, length in enumerate(lengths):
        case.check(out[row : row + 1], q[0, :, row : row + 1], row, np.array([length - 1]))


@pytest.mark.parametrize("name", CASES)
def test_prefill_of_sequences_of_every_kind(machine: Machine, name: str) -> None:
    prefilled(machine, name, [(180, 97), (1, 1), (51, 2), (16, 16), (50, 50), (101, 1)], 1)


@pytest.mark.parametrize("name", CASES)
def test_decode_of_sequences_of_every_kind(machine: Machine, name: str) -> None:
    """The last has more pages a share than a block has."""
    decoded(machine, name, [1, 16, 17, 47, 48, 49, 112, 129, 144, 145, 900], 3)


LENGTHS = st.integers(1, 150)


@settings(max_examples=8, deadline=None)
@given(
    st.sampled_from(sorted(MACHINES)),
    st.sampled_from(sorted(CASES)),
    st.lists(LENGTHS.flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))), min_size=1, max_size=4),
    st.integers(0, 99),
)
def test_ragged_calls(machine: str, name: str, lengths: list[tuple[int, int]], seed: int) -> None:
    prefilled(MACHINES[machine], name, lengths, seed)
    decoded(MACHINES[machine], name, [length for length, _ in lengths], seed)
