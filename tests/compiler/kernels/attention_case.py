"""One call of the CPU's attention kernels, and what it must compute."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from kernel_machines import Machine
from page_cases import check_codes, mask_of, numbers, numpy_type, poisoned

from kvc.kernels.append import append_kv
from kvc.kernels.attention import (
    AttentionShape,
    choose_tile,
    decode_attention,
    pools,
    prefill_attention,
)
from kvc_passes.sites import Sliced
from support import turned


def sliced_shape(heads: int, sliced: Sliced, **options: Any) -> AttentionShape:
    """The shape of kept keys of `sliced`."""
    return AttentionShape(
        heads, 1, sliced.width, sliced.value_dim, 0.15, shared=True, sliced=sliced, **options
    )


SHAPES = {
    "grouped": AttentionShape(6, 2, 64, 64, 0.125),
    "odd group, softcap": AttentionShape(7, 1, 80, 96, 0.11, softcap=20.0),
    "window": AttentionShape(4, 4, 72, 40, 0.12, window=37),
    "wide group": AttentionShape(16, 1, 16, 24, 0.25),
    "chunks, float16": AttentionShape(4, 2, 32, 32, 0.2, chunk=50, kv_dtype="float16"),
    "sink keys": AttentionShape(4, 2, 32, 40, 0.2, window=37, sink_keys=19, slopes=True),
    "predicate, bfloat16": AttentionShape(
        6,
        2,
        32,
        32,
        0.2,
        predicate="k == q or k < q and (k + h) % 3 < 2 and k // 40 != 1",
        kv_dtype="bfloat16",
    ),
    "slopes, softcap": AttentionShape(5, 5, 32, 24, 0.2, softcap=15.0, slopes=True, kv_dtype="bfloat16"),
    "bias of the distance": AttentionShape(6, 2, 32, 24, 0.2, distances=29),
    "shared, bias, window": AttentionShape(3, 1, 40, 33, 0.2, window=37, distances=11, shared=True),
    "guarded": AttentionShape(4, 2, 32, 32, 0.2, guarded=True),
    "heads of odd sizes": AttentionShape(3, 3, 6, 10, 0.4),
    "one head of four and a half vectors": AttentionShape(1, 1, 36, 20, 0.2),
    "int8": AttentionShape(6, 2, 64, 40, 0.125, stored="int8"),
    "fp8, window": AttentionShape(4, 4, 36, 32, 0.12, window=37, stored="fp8"),
    "int4, wide group": AttentionShape(16, 1, 64, 80, 0.12, stored="int4"),
    "int4 of odd halves": AttentionShape(3, 3, 6, 10, 0.4, softcap=20.0, stored="int4"),
    "shared": AttentionShape(12, 1, 96, 96, 0.1, shared=True),
    "shared, latent, float16": AttentionShape(
        17, 1, 84, 52, 0.12, softcap=20.0, window=37, shared=True, kv_dtype="float16"
    ),
    "shared, slopes, bfloat16": AttentionShape(
        3, 1, 40, 33, 0.2, slopes=True, shared=True, kv_dtype="bfloat16"
    ),
    "sliced": sliced_shape(4, Sliced(4, 32, 16, 16, False)),
    "sliced, groups, part of a head, float16": sliced_shape(
        6, Sliced(3, 40, 0, 12, True), window=37, kv_dtype="float16"
    ),
    "sliced, odd, softcap, bfloat16": sliced_shape(
        3, Sliced(3, 10, 7, 3, True), softcap=20.0, kv_dtype="bfloat16"
    ),
    "learned sinks": AttentionShape(8, 2, 32, 32, 0.2, window=70, sink_scores=True, kv_dtype="float16"),
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
        self.slopes = rng.uniform(0, 0.5, shape.heads).astype(np.float32)
        self.sinks = rng.uniform(-3, 8, shape.heads).astype(np.float32)
        self.bias = rng.uniform(-2, 2, (shape.heads, max(1, shape.distances))).astype(np.float32)
        given = ((self.slopes, shape.slopes), (self.sinks, shape.sink_scores))
        self.extras = [a for a, has in (*given, (self.bias.reshape(-1), shape.distances)) if has]
        order = list(rng.permutation(np.arange(1, PAGES)))
        self.sequences = []
        for length, new in lengths:
            pages = np.array([order.pop() for _ in range(-(-length // PAGE))])
            k, v = (self.normal(shape.kv_heads, length, d) for d in (shape.head_dim, shape.value_dim))
            if shape.sliced is not None:
                k[..., shape.value_dim :] = angles_of(shape.sliced, np.arange(length))
            v = k[..., : shape.value_dim] if shape.shared else v
            self.sequences.append(Sequence(length, new, pages, k, v))
        self.state = {
            name: poisoned(str(pool.dtype), tuple(int(n) for n in pool.shape))
            for name, pool in pools(shape, PAGES).items()
        }
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
                given = [k, slots.astype(np.int32)] if self.shape.shared else [k, v, slots.astype(np.int32)]
                call = self.machine.call(self.build("append"), *given, *self.state.values())
                self.state = dict(zip(self.state, call[len(given) :]))

    def forget_what_no_query_sees(self) -> None:
        """Pages that no query of the call sees may have been given away: make them NaN."""
        if self.shape.predicate is None:
            for row, s in enumerate(self.sequences):
                seen = self.seen(np.arange(s.length - s.new, s.length), s.length).any(axis=(0, 1))
                for page in range(len(s.pages)):
                    if not seen[page * PAGE : (page + 1) * PAGE].any():
                        self.table[row, page] = 0

    def seen(self, positions: np.ndarray, length: int) -> np.ndarray:
        """The mask [heads, queries, keys]."""
        return mask_of(self.shape, positions, length)

    def kept(self, sequence: Sequence) -> tuple[np.ndarray, np.ndarray]:
        """The keys and values [KV heads, length, dim] of the pages; codes are compared with what came."""
        both, shape = [], self.shape
        for name, x in (("k", sequence.k), ("v", sequence.v)):
            if shape.stored is None:
                both.append(x.astype(numpy_type(shape.kv_dtype)).astype(float))
                continue
            # [pages, heads, tokens, elements], then one after the other
            codes, scales = self.state[name][sequence.pages], self.state[f"{name}_scale"][sequence.pages]
            found = numbers(shape, codes.swapaxes(2, 3) if name == "k" else codes, scales)
            found = np.concatenate(list(found), axis=1)[:, : sequence.length]
            check_codes(shape, x, found, np.concatenate(list(scales), axis=1)[:, : sequence.length])
            both.append(found)
        return both[0], both[1]

    def check(self, q: np.ndarray, out: np.ndarray, sequence: Sequence, positions: np.ndarray) -> None:
        """q, out: [tokens, heads, ...] of one sequence."""
        shape = self.shape
        assert np.isfinite(out).all()
        keys, values = self.kept(sequence)
        of_value = np.zeros(shape.heads, int) if shape.shared else np.arange(shape.heads) // shape.group
        if shape.sliced is not None:
            keys = turned(keys, shape.sliced)[0]
        of_key = np.arange(shape.heads) // (shape.heads // len(keys))
        masks = self.seen(positions, sequence.length)
        behind = np.arange(sequence.length) - positions[:, None]
        for h, seen in enumerate(masks):
            k, v = keys[of_key[h]], values[of_value[h]]
            s = q[:, h].astype(float) @ k.T * shape.scale
            # Rounding of a score: its products and sums, then scale, softcap and change of base; angles.
            slack = (shape.query_dim + 24) * 2.0**-24 * (np.abs(q[:, h]) @ np.abs(k).T * shape.scale)
            if shape.softcap:
                s = shape.softcap * np.tanh(s / shape.softcap)
                slack += shape.softcap * 3e-7
            if shape.slopes:  # the slope in base 2, the product and the sum are rounded
                s = s + float(self.slopes[h]) * behind
                slack += 3 * 2.0**-24 * np.abs(self.slopes[h] * behind) + 2.0**-24 * np.abs(s)
            if shape.distances:  # the bias in base 2 and the sum are rounded
                bias = self.bias[h, np.clip(-behind, 0, shape.distances - 1)].astype(float)
                s = s + bias
                slack += 2 * 2.0**-24 * np.abs(bias) + 2.0**-24 * np.abs(s)
            s = np.where(seen, s, -np.inf)
            sink = np.full((len(s), 1), float(self.sinks[h]) if shape.sink_scores else -np.inf)
            top = np.maximum(s.max(axis=1, keepdims=True), sink)
            p = np.exp(s - top)
            p /= p.sum(axis=1, keepdims=True) + np.exp(sink - top)
            # A weight moves by at most twice the largest error of a score; exp and the sums add the rest.
            relative = 2 * np.where(seen, slack, 0).max(axis=1) + 1e-6 + sequence.length * 2.0**-23
            if shape.sink_scores:
                relative += 2.0**-22 * np.abs(sink[:, 0])
            bound = relative[:, None] * (p @ np.abs(v)) + 1e-7
            assert (np.abs(out[:, h] - p @ v) <= bound).all()


def angles_of(sliced: Sliced, positions: np.ndarray) -> np.ndarray:
    """Cosines and sines of positions as they are kept."""
    angles = positions[:, None] / 10.0 ** (np.arange(sliced.half) / sliced.half)
    parts = [np.cos(angles), np.sin(angles)]
    if sliced.fine:
        whole = [np.floor(part * 256) for part in parts]
        parts = [*(w / 256 for w in whole), *(part * 256 - w for part, w in zip(parts, whole))]
    return np.concatenate(parts, axis=1).astype(np.float32)


def _make(kernel: str, name: str, traits: object) -> object:
    shape = SHAPES[name]
    if kernel == "append":
        return append_kv(shape, traits)
    if kernel == "decode":
        return decode_attention(shape, traits)
    return prefill_attention(shape, choose_tile(shape.group, traits), traits)
