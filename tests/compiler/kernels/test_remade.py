"""Attention that makes keys and values again in both phases, against numpy in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_machines import MACHINES, Machine
from page_cases import attended, numpy_type

from kvc.kernels import packing
from kvc.kernels.append import append_kv
from kvc.kernels.attention import AttentionShape
from kvc.kernels.head_product import packed_tensor
from kvc.kernels.remade import Remake, decode_remade, prefill_remade
from kvc.stored_weights import stored
from kvc_passes.sites import Remade
from kvc_passes.weight_format import FLOAT32, WeightFormat
from kvc_passes.weights import HeadWeight, Source, WeightPart

PAGE, PAGES, SPLITS = 16, 64, 3
HALF = WeightFormat("float16")
CASES: dict[str, tuple[AttentionShape, Remake]] = {
    "as Llama-2": (AttentionShape(4, 4, 24, 24, 0.2), Remake(Remade(96, 12, False), FLOAT32, FLOAT32)),
    "as Phi, float16, window": (
        AttentionShape(6, 3, 20, 33, 0.2, window=37, kv_dtype="float16"),
        Remake(Remade(45, 5, True), HALF, HALF, (True, True)),
    ),
    "not turned, odd, everything else": (
        AttentionShape(
            6, 2, 35, 7, 0.2, slopes=True, softcap=20.0, sink_scores=True, window=40, sink_keys=5,
            kv_dtype="bfloat16",
        ),
        Remake(Remade(33, 0, False), FLOAT32, HALF, (False, True)),
    ),
}  # fmt: skip


def _kernel(name: str, what: str, traits: Any) -> Any:
    shape, remake = CASES[name]
    if what == "append":
        return append_kv(remake.row_of(shape), traits)
    if what == "prefill":
        return prefill_remade(shape, remake, traits)
    return decode_remade(shape, remake, traits, SPLITS)


class Case:
    """Weights, sequences of given lengths in pages anywhere, the others NaN, and what attention gives."""

    def __init__(self, machine: Machine, name: str, lengths: list[int], seed: int) -> None:
        (self.shape, self.remake), self.machine, self.name = CASES[name], machine, name
        self.rng = np.random.default_rng(seed)
        shape, kept = self.shape, self.remake.kept
        self.packed: list[np.ndarray] = []
        self.matrices, self.biases = [], []
        parts = (
            (shape.head_dim, self.remake.key_format, self.remake.biases[0]),
            (shape.value_dim, self.remake.value_format, self.remake.biases[1]),
        )
        for width, format, has_bias in parts:
            columns = shape.kv_heads * width
            matrix = (self.normal(kept.depth, columns) / 4).astype(format.dtype)
            source = Source("w", columns, transposed=True)
            weight = HeadWeight(source, kept.depth, shape.kv_heads, width, 0, width, False, format)
            tensor = packed_tensor(shape.kv_heads, width, kept.depth, format, machine.traits)
            self.packed.append(stored(WeightPart(weight), tensor, {"w": matrix}, packing))
            self.matrices.append(matrix.astype(float))
            self.biases.append(self.normal(columns) if has_bias else np.zeros(columns, np.float32))
        self.slopes, self.sinks = self.normal(shape.heads) / 5, self.normal(shape.heads)
        order = list(self.rng.permutation(np.arange(1, PAGES)))
        self.pool = np.full((PAGES, 1, PAGE, kept.width), np.nan, numpy_type(shape.kv_dtype))
        self.table = np.zeros((len(lengths), PAGES), np.int32)
        self.keys, self.values = [], []
        for row, length in enumerate(lengths):
            pages = np.array([order.pop() for _ in range(-(-length // PAGE))])
            self.table[row, : len(pages)] = pages
            self._append(pages, length)

    def normal(self, *shape: int) -> np.ndarray:
        return self.rng.standard_normal(shape).astype(np.float32)

    def _append(self, pages: np.ndarray, length: int) -> None:
        kept, shape, where = self.remake.kept, self.shape, np.arange(length)
        angles = where[:, None] * 3.0 / (1 + np.arange(kept.half))
        exact = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
        turns = [exact]
        if kept.fine:
            coarse = np.floor(exact * 256) / 256
            turns = [coarse, (exact - coarse) * 256]
        rows = np.concatenate([self.normal(length, kept.depth), *turns], axis=1).astype(np.float32)
        slots = (pages[where // PAGE] * PAGE + where % PAGE).astype(np.int32)
        build = self.machine.build(_kernel, self.name, "append")
        self.pool = self.machine.call(build, rows[None, None], slots, self.pool)[-1]
        x = rows[:, : kept.depth].astype(numpy_type(shape.kv_dtype)).astype(float)
        k, v = (
            (x @ matrix + bias).reshape(length, shape.kv_heads, -1)
            for matrix, bias in zip(self.matrices, self.biases)
        )
        if kept.half:
            if not kept.fine:
                exact = exact.astype(numpy_type(shape.kv_dtype)).astype(float)
            cosine, sine = exact[:, None, : kept.half], exact[:, None, kept.half :]
            low, high, rest = np.split(k, [kept.half, 2 * kept.half], axis=2)
            k = np.concatenate([low * cosine - high * sine, high * cosine + low * sine, rest], axis=2)
        self.keys.append(k)
        self.values.append(v)

    @property
    def arguments(self) -> list[np.ndarray]:
        """What kernels take behind the block table."""
        more = [self.slopes] if self.shape.slopes else []
        more += [self.sinks] if self.shape.sink_scores else []
        return [*more, *self.packed, *(b for b, has in zip(self.biases, self.remake.biases) if has)]

    def check(self, out: np.ndarray, q: np.ndarray, row: int, positions: np.ndarray) -> None:
        """out [n, H, Dv] of queries [H, n, D] at `positions` of a sequence."""
        where = (self.keys[row], self.values[row], positions, self.slopes, self.sinks)
        # As prefill_rebuilt; fine angles have 16 bits, which scores up to 60 show.
        atol = 5e-3 if self.remake.kept.fine else 1e-3
        np.testing.assert_allclose(out, attended(self.shape, q, *where), rtol=0, atol=atol)


def prefilled(machine: Machine, name: str, lengths: list[tuple[int, int]], seed: int, tile: int = 7) -> None:
    """Sequences of (length, new tokens) in one call; tiles in any order."""
    case = Case(machine, name, [length for length, _ in lengths], seed)
    shape, tiles, positions, at = case.shape, [], [], 0
    for row, (length, new) in enumerate(lengths):
        tiles += [(row, at + i, min(tile, new - i)) for i in range(0, new, tile)]
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
def test_more_rows_than_a_task_takes(machine: Machine, name: str) -> None:
    prefilled(machine, name, [(640, 600)], 2, tile=40)


@pytest.mark.parametrize("name", CASES)
def test_decode_of_sequences_of_every_kind(machine: Machine, name: str) -> None:
    decoded(machine, name, [1, 16, 17, 47, 48, 49, 112, 129, 144, 145], 3)


@pytest.mark.parametrize("name", CASES)
def test_decode_of_one_long_sequence(machine: Machine, name: str) -> None:
    """More pages a share than a block has."""
    decoded(machine, name, [1000], 4)


LENGTHS = st.integers(1, 150)


@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from(sorted(MACHINES)),
    st.sampled_from(sorted(CASES)),
    st.lists(LENGTHS.flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))), min_size=1, max_size=4),
    st.integers(0, 99),
)
def test_ragged_calls(machine: str, name: str, lengths: list[tuple[int, int]], seed: int) -> None:
    prefilled(MACHINES[machine], name, lengths, seed)
    decoded(MACHINES[machine], name, [length for length, _ in lengths], seed)
