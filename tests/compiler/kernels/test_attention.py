from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_machines import MACHINES, Machine

from kvc.kernels.attention import (
    AttentionShape,
    append_kv,
    choose_tile,
    decode_attention,
    decode_splits,
    prefill_attention,
)

SHAPES = {
    "grouped": AttentionShape(6, 2, 64, 64, 0.125),
    "odd group, softcap": AttentionShape(7, 1, 80, 96, 0.11, softcap=20.0),
    "window": AttentionShape(4, 4, 72, 40, 0.12, window=37),
    "wide group": AttentionShape(16, 1, 16, 24, 0.25),
}
PAGE = 16
PAGES = 48


@dataclass
class Sequence:
    """A sequence of `length` tokens, the last `new` of which are in the call; its pages in any order."""

    length: int
    new: int
    pages: np.ndarray
    k: np.ndarray
    v: np.ndarray


class Case:
    """Sequences with random contents and pages. Whatever the kernels must not read is NaN."""

    def __init__(self, machine: Machine, name: str, lengths: list[tuple[int, int]], seed: int) -> None:
        self.machine, self.name, self.shape = machine, name, SHAPES[name]
        rng = self.rng = np.random.default_rng(seed)
        shape = self.shape
        order = list(rng.permutation(np.arange(1, PAGES)))
        self.sequences = []
        for length, new in lengths:
            pages = np.array([order.pop() for _ in range(-(-length // PAGE))])
            k, v = (self.normal(shape.kv_heads, length, d) for d in (shape.head_dim, shape.value_dim))
            self.sequences.append(Sequence(length, new, pages, k, v))
        self.kpool = np.full((PAGES, shape.kv_heads, shape.head_dim, PAGE), np.nan, np.float32)
        self.vpool = np.full((PAGES, shape.kv_heads, PAGE, shape.value_dim), np.nan, np.float32)
        # Page 0 stays NaN; entries of the table past a sequence's end point at it.
        self.table = np.zeros((len(lengths), PAGES), np.int32)
        for row, sequence in enumerate(self.sequences):
            self.table[row, : len(sequence.pages)] = sequence.pages

    def normal(self, *shape: int) -> np.ndarray:
        return self.rng.standard_normal(shape).astype(np.float32)

    def build(self, kernel: str) -> object:
        return self.machine.build(_make, kernel, self.name)

    def append(self) -> None:
        """The old tokens of all sequences in one call, then the new ones in another."""
        for parts in (
            [(s, 0, s.length - s.new) for s in self.sequences],
            [(s, s.length - s.new, s.length) for s in self.sequences],
        ):
            where = [np.arange(a, b) for _, a, b in parts]
            slots = np.concatenate(
                [s.pages[i // PAGE] * PAGE + i % PAGE for (s, _, _), i in zip(parts, where)]
            )
            if len(slots):
                k = np.concatenate([s.k[:, a:b] for s, a, b in parts], axis=1)[None]
                v = np.concatenate([s.v[:, a:b] for s, a, b in parts], axis=1)[None]
                call = self.machine.call(
                    self.build("append"), k, v, slots.astype(np.int32), self.kpool, self.vpool
                )
                self.kpool, self.vpool = call[3:]

    def forget_what_no_window_reaches(self) -> None:
        """Pages before every window may have been given away: make them NaN."""
        if self.shape.window is not None:
            for row, s in enumerate(self.sequences):
                first = max(s.length - s.new - self.shape.window + 1, 0) // PAGE
                self.table[row, :first] = 0

    def check(self, q: np.ndarray, out: np.ndarray, sequence: Sequence, positions: np.ndarray) -> None:
        """q, out: [tokens, heads, ...] of one sequence."""
        shape = self.shape
        assert np.isfinite(out).all()
        for h in range(shape.heads):
            k, v = (x[h // shape.group].astype(float) for x in (sequence.k, sequence.v))
            s = q[:, h].astype(float) @ k.T * shape.scale
            # Rounding of a score: head_dim products and sums, then scale, softcap and change of base.
            slack = (shape.head_dim + 16) * 2.0**-24 * (np.abs(q[:, h]) @ np.abs(k).T * shape.scale)
            if shape.softcap:
                s = shape.softcap * np.tanh(s / shape.softcap)
                slack += shape.softcap * 3e-7
            key = np.arange(sequence.length)
            seen = key <= positions[:, None]
            if shape.window:
                seen &= key > positions[:, None] - shape.window
            p = np.where(seen, np.exp(s - s.max(axis=1, keepdims=True)), 0)
            p /= p.sum(axis=1, keepdims=True)
            # A weight moves by at most twice the largest error of a score; exp and the sums add the rest.
            relative = 2 * np.where(seen, slack, 0).max(axis=1) + 1e-6 + sequence.length * 2.0**-23
            bound = relative[:, None] * (p @ np.abs(v)) + 1e-7
            assert (np.abs(out[:, h] - p @ v) <= bound).all()


def _make(kernel: str, name: str, traits: object) -> object:
    shape = SHAPES[name]
    if kernel == "append":
        return append_kv(shape, traits)
    if kernel == "decode":
        return decode_attention(shape, traits)
    return prefill_attention(shape, choose_tile(shape.group, traits), traits)


def check_prefill(case: Case) -> None:
    shape = case.shape
    case.append()
    case.forget_what_no_window_reaches()
    tile = choose_tile(shape.group, case.machine.traits)
    tiles, positions, at = [], [], 0
    for row, s in enumerate(case.sequences):
        tiles += [(row, at + i, min(tile, s.new - i)) for i in range(0, s.new, tile)]
        positions.append(np.arange(s.length - s.new, s.length))
        at += s.new
    q = 2 * case.normal(at, shape.heads, shape.head_dim)
    out = case.machine.call(
        case.build("prefill"),
        q.transpose(1, 0, 2)[None],
        case.kpool,
        case.vpool,
        np.concatenate(positions),
        np.array(case.rng.permutation(tiles), np.int32),
        case.table,
        np.full((1, at, shape.heads, shape.value_dim), np.nan, np.float32),
    )[-1][0]
    at = 0
    for s, where in zip(case.sequences, positions):
        case.check(q[at : at + s.new], out[at : at + s.new], s, where)
        at += s.new


def check_decode(case: Case) -> None:
    shape, count = case.shape, len(case.sequences)
    case.append()
    case.forget_what_no_window_reaches()
    q = 2 * case.normal(count, shape.heads, shape.head_dim)
    positions = np.array([s.length - 1 for s in case.sequences])
    part = (count, decode_splits(shape.kv_heads, case.machine.traits), shape.heads, shape.value_dim + 2)
    out = case.machine.call(
        case.build("decode"),
        q.transpose(1, 0, 2)[None],
        case.kpool,
        case.vpool,
        positions,
        case.table,
        np.full(part, np.nan, np.float32),
        np.full((1, count, shape.heads, shape.value_dim), np.nan, np.float32),
    )[-1][0]
    for i, s in enumerate(case.sequences):
        case.check(q[i : i + 1], out[i : i + 1], s, positions[i : i + 1])


LENGTHS = st.lists(
    st.integers(1, 180).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))), min_size=1, max_size=3
)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(sorted(MACHINES)), st.sampled_from(sorted(SHAPES)), LENGTHS, st.integers(0, 99))
def test_prefill_of_ragged_sequences(
    machine: str, shape: str, lengths: list[tuple[int, int]], seed: int
) -> None:
    check_prefill(Case(MACHINES[machine], shape, lengths, seed))


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(sorted(MACHINES)), st.sampled_from(sorted(SHAPES)), LENGTHS, st.integers(0, 99))
def test_decode_of_a_batch(machine: str, shape: str, lengths: list[tuple[int, int]], seed: int) -> None:
    check_decode(Case(MACHINES[machine], shape, [(length, 1) for length, _ in lengths], seed))


@pytest.mark.parametrize("shape", SHAPES)
def test_contexts_of_several_blocks(machine: Machine, shape: str) -> None:
    check_prefill(Case(machine, shape, [(700, 300)], 5))
    check_decode(Case(machine, shape, [(700, 1)], 6))


def test_a_batch_that_merges_in_parallel(machine: Machine) -> None:
    check_decode(Case(machine, "grouped", [(n, 1) for n in (1, 2, 15, 16, 17, 31, 32, 33, 64, 3)], 7))


def test_a_page_that_no_vector_fits_is_refused(machine: Machine) -> None:
    shape = AttentionShape(2, 1, 16, 16, 0.25, page_size=machine.traits.lanes * 3)
    with pytest.raises(ValueError, match="page size"):
        prefill_attention(shape, 4, machine.traits)
