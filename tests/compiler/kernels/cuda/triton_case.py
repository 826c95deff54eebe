"""One call of the attention kernels on Triton's interpreter, and what it must compute."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from page_cases import check_codes, mask_of, numbers
from triton_interpreter import run

from kvc.kernels.attention import AttentionShape
from kvc.kernels.cuda import attention, shared
from kvc.kernels.cuda.attention import APPEND_TOKENS, append_kernel, out_dtype
from kvc.kernels.cuda.device import DeviceKernel
from kvc.kernels.cuda.knobs import PREFILL, PrefillKnobs
from kvc_passes.sites import Sliced
from support import turned


def sliced(
    heads: int, count: int, dim: int, rest: int = 0, half: int = -1, fine: bool = False, **options: Any
) -> AttentionShape:
    """Queries of `heads` heads on kept keys of `count`."""
    kept = Sliced(count, dim, rest, dim // 2 if half < 0 else half, fine)
    options = {"page_size": 32, **options}
    return AttentionShape(heads, 1, kept.width, kept.value_dim, 0.12, shared=True, sliced=kept, **options)


PREDICATE = "k == q or k < q and (k + h) % 3 < 2 and (k - q) // 40 != -2 and not (q - k) % -7 == -3"
SHAPES = {
    "grouped": AttentionShape(8, 2, 64, 64, 0.125),
    "odd group, softcap": AttentionShape(7, 1, 80, 96, 0.11, softcap=20.0, page_size=32),
    "window": AttentionShape(4, 4, 72, 48, 0.12, window=37),
    "wide window": AttentionShape(2, 1, 64, 64, 0.12, window=1040, page_size=128),
    "wide chunks": AttentionShape(2, 1, 64, 64, 0.12, chunk=1024, page_size=64),
    "more heads than rows": AttentionShape(40, 1, 64, 64, 0.1, page_size=64),
    "wide group, sinks": AttentionShape(16, 1, 128, 128, 0.09, sink_scores=True, page_size=64),
    "chunks": AttentionShape(4, 2, 48, 48, 0.2, chunk=50, page_size=32),
    "sink keys": AttentionShape(4, 2, 64, 72, 0.2, window=37, sink_keys=19, slopes=True),
    "sink keys that fill a page": AttentionShape(2, 2, 64, 64, 0.2, window=150, sink_keys=64, page_size=128),
    "sink keys, wide window": AttentionShape(2, 2, 64, 64, 0.2, window=1030, sink_keys=4, page_size=64),
    "predicate": AttentionShape(6, 2, 64, 64, 0.2, predicate=PREDICATE),
    "slopes, softcap": AttentionShape(5, 5, 32, 24, 0.2, softcap=15.0, slopes=True, page_size=128),
    "guarded": AttentionShape(4, 2, 64, 64, 0.2, guarded=True),
    "negative scale": AttentionShape(2, 1, 56, 64, -0.1),
    "int8": AttentionShape(8, 2, 64, 72, 0.125, stored="int8", page_size=32),
    "fp8, window": AttentionShape(4, 4, 72, 48, 0.12, window=37, stored="fp8"),
    "int4, wide group": AttentionShape(16, 1, 128, 80, 0.09, stored="int4", page_size=64),
    "learned bias": AttentionShape(6, 2, 64, 64, 0.2, distances=45, sink_scores=True, page_size=64),
    "learned bias, predicate": AttentionShape(4, 4, 40, 48, 0.2, distances=9, predicate=PREDICATE),
    "shared, learned bias, window": AttentionShape(
        5, 1, 72, 48, 0.12, window=37, distances=20, softcap=15.0, shared=True
    ),
    "shared": AttentionShape(12, 1, 160, 160, 0.08, shared=True, page_size=32),
    "shared, latent, sink keys": AttentionShape(
        5, 1, 72, 48, 0.12, window=37, sink_keys=19, shared=True, slopes=True
    ),
    "shared, many heads, softcap": AttentionShape(
        70, 1, 40, 40, 0.16, softcap=20.0, shared=True, page_size=128, sink_scores=True
    ),
    "shared, wide": AttentionShape(3, 1, 576, 520, 0.05, shared=True, page_size=64),
    "whole": AttentionShape(6, 2, 64, 72, 0.125, whole=True, page_size=32),
    "whole, shared": AttentionShape(5, 1, 160, 160, 0.08, whole=True, shared=True, page_size=64),
    "keys": sliced(5, 5, 64),
    "keys of groups, fine": sliced(6, 2, 40, rest=24, half=10, fine=True, window=37, page_size=64),
    "large heads": AttentionShape(3, 1, 256, 192, 0.06, window=70, sink_scores=True, page_size=64),
}
DTYPES = {"float32": torch.float32, "float16": torch.float16}
TYPES = {**DTYPES, "int8": torch.int8, "uint8": torch.uint8}
POOL_TOKENS = 2560
"""Tokens of all pages."""


def poison(dtype: str) -> float:
    """What must not be read: NaN, and codes beside scales that are NaN."""
    return torch.nan if dtype in DTYPES else 0x5A


@dataclass
class Sequence:
    """A sequence of `length` tokens, the last `new` of which are in the call; its pages in any order."""

    length: int
    new: int
    pages: np.ndarray
    k: torch.Tensor
    v: torch.Tensor

    def positions(self, whole: bool) -> np.ndarray:
        """Of the tokens in the call; `whole`: each sees all of the sequence, an encoder's output."""
        if whole:
            return np.full(self.new, self.length - 1)
        return np.arange(self.length - self.new, self.length)


class Case:
    """Sequences with random contents and pages. Whatever the kernels must not read is NaN."""

    def __init__(
        self,
        shape: AttentionShape,
        dtype: str,
        lengths: list[tuple[int, int]],
        seed: int,
        kv: str = "",
        knobs: PrefillKnobs = PREFILL,
    ) -> None:
        self.shape = shape = dataclasses.replace(shape, kv_dtype=kv or dtype)
        self.dtype, self.type, self.knobs = dtype, DTYPES[dtype], knobs
        self.out_type = DTYPES[out_dtype(shape, dtype)]
        self.random = torch.Generator().manual_seed(seed)
        self.slopes = torch.rand(shape.heads, generator=self.random) / 2
        self.sinks = torch.rand(shape.heads, generator=self.random) * 11 - 3
        self.bias = torch.rand(shape.heads, shape.distances, generator=self.random) * 4 - 2
        wanted = ((self.slopes, shape.slopes), (self.sinks, shape.sink_scores), (self.bias, shape.distances))
        self.extras = [each.flatten() for each, has in wanted if has]
        page = shape.page_size
        count = POOL_TOKENS // page
        order = torch.randperm(count - 1, generator=self.random).tolist()
        self.sequences = []
        for length, new in lengths:
            pages = np.array([order.pop() + 1 for _ in range(-(-length // page))])
            k, v = (self.normal(shape.kv_heads, length, d) for d in (shape.head_dim, shape.value_dim))
            v = k[..., : shape.value_dim] if shape.shared else v
            self.sequences.append(Sequence(length, new, pages, k, v))
        form = shape.form
        self.state = [
            torch.full(
                (count, shape.kv_heads, page, d // form.parts), poison(form.dtype), dtype=TYPES[form.dtype]
            )
            for d in (shape.head_dim, shape.value_dim)[: 1 if shape.shared else 2]
        ]
        if shape.stored:
            scales = torch.full((count, shape.kv_heads, page), torch.nan, dtype=torch.bfloat16)
            self.state += [scales, scales.clone()]
        # Page 0 stays NaN; entries of the table past a sequence's end are no pages at all.
        self.table = torch.full((len(lengths), count), 2**30, dtype=torch.int32)
        for row, sequence in enumerate(self.sequences):
            self.table[row, : len(sequence.pages)] = torch.from_numpy(sequence.pages)
        self.append()
        self.forget_what_no_query_sees()

    def prefill_kernel(self, tile: int) -> tuple[DeviceKernel, int]:
        """And programs a tile."""
        if self.shape.shared:
            return shared.prefill_kernel(self.shape, self.dtype)
        arch = 80 if self.knobs == PREFILL else 90
        kernel = attention.prefill_kernel(self.shape, tile, self.dtype, arch, self.knobs)
        return kernel, self.shape.kv_heads

    def decode_kernel(self, splits: int) -> tuple[DeviceKernel, int]:
        """And programs a share."""
        if self.shape.shared:
            return shared.decode_kernel(self.shape, self.dtype)
        return attention.decode_kernel(self.shape, splits, self.dtype), self.shape.kv_heads

    def asked(self, positions: list[np.ndarray]) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Queries of tokens at these positions: what kernels are given, and [tokens, heads, D]."""
        count = sum(map(len, positions))
        q = 2 * self.normal(1, self.shape.heads, count, self.shape.query_dim)
        return [q], q[0].transpose(0, 1)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.random).to(self.type)

    def append(self) -> None:
        """The tokens of all sequences in one call."""
        page = self.shape.page_size
        where = [torch.arange(s.length) for s in self.sequences]
        slots = [
            torch.from_numpy(s.pages)[i // page] * page + i % page for s, i in zip(self.sequences, where)
        ]
        k, v = (torch.cat([getattr(s, x) for s in self.sequences], 1)[None] for x in "kv")
        n, slots = k.shape[2], torch.cat(slots).int()
        if self.shape.shared:
            grid = (-(-n // shared.APPEND_TOKENS), -(-self.shape.head_dim // shared.APPEND_ELEMENTS))
            run(shared.append_kernel(self.shape, self.dtype), grid, k, slots, *self.state, n)
            return
        run(
            append_kernel(self.shape, self.dtype),
            (-(-n // APPEND_TOKENS), self.shape.kv_heads),
            *(k, v, slots, *self.state, n),
        )

    def forget_what_no_query_sees(self) -> None:
        """Pages that no query of the call sees may have been given away."""
        page = self.shape.page_size
        for row, s in enumerate(self.sequences):
            seen = self.seen(s.positions(self.shape.whole), s.length).any(axis=(0, 1))
            for i in range(len(s.pages)):
                if self.shape.predicate is None and not seen[i * page : (i + 1) * page].any():
                    self.table[row, i] = 2**30

    def seen(self, positions: np.ndarray, length: int) -> np.ndarray:
        """The mask [heads, queries, keys]."""
        return mask_of(self.shape, positions, length)

    def kept(self, sequence: Sequence) -> tuple[np.ndarray, np.ndarray]:
        """The keys and values [KV heads, length, dim] of the pages; codes are compared with what came."""
        both, shape = [], self.shape
        for i, x in enumerate((sequence.k, sequence.v)):
            if shape.stored is None:
                both.append(x.to(TYPES[shape.kv_dtype]).double().numpy())
                continue
            codes, scales = (self.state[j][sequence.pages] for j in (i, i + 2))
            found = numbers(shape, codes.numpy(), scales.float().numpy())
            found, scale = (
                np.concatenate(list(each), axis=1)[:, : sequence.length]
                for each in (found, scales.float().numpy())
            )
            check_codes(shape, x.double().numpy(), found, scale, 2.0**-7)  # the interpreter rounds down
            both.append(found)
        return both[0], both[1]

    def met(self, keys: np.ndarray, head: int) -> tuple[np.ndarray, np.ndarray]:
        """The keys [length, query_dim] that a head's queries meet, and their rounding on the way there."""
        if self.shape.sliced is None:
            keys = keys[head // self.shape.group]
            return keys, np.zeros_like(keys)
        keys = turned(keys, self.shape.sliced)[0, head // (self.shape.heads // self.shape.sliced.count)]
        return keys, np.abs(keys) * self.unit

    query_unit = 0.0
    """The rounding of a query on its way to the keys."""

    @property
    def unit(self) -> float:
        """The rounding of a number to the type of products."""
        return 2.0**-11 if self.dtype == self.shape.kv_dtype == "float16" else 0.0

    def of_values(self, values: np.ndarray, head: int) -> tuple[np.ndarray, np.ndarray]:
        """The values [length, value_dim] of a head, and their rounding."""
        values = values[head // self.shape.group]
        return values, np.zeros_like(values)

    def check(self, q: torch.Tensor, out: torch.Tensor, sequence: Sequence, positions: np.ndarray) -> None:
        """q, out: [tokens, heads, ...] of one sequence."""
        shape = self.shape
        assert out.isfinite().all()
        keys, values = self.kept(sequence)
        masks = self.seen(positions, sequence.length)
        behind = np.arange(sequence.length) - positions[:, None]
        half = self.dtype == "float16" and (shape.stored is not None or shape.kv_dtype == "float16")
        unit = (2.0**-11 if half else 0.0) * (2 if shape.stored else 1)  # values are rounded, too
        for h, seen in enumerate(masks):
            (k, k_error), (v, v_error) = self.met(keys, h), self.of_values(values, h)
            query = q[:, h].double().numpy()
            s = query @ k.T * shape.scale
            # Rounding of a score: head_dim products and sums, then scale, softcap and change of base.
            slack = (shape.head_dim + 16) * 2.0**-24 * (np.abs(query) @ np.abs(k).T * abs(shape.scale))
            slack += np.abs(query) @ k_error.T * abs(shape.scale)
            slack += self.query_unit * (np.abs(query) @ np.abs(k).T * abs(shape.scale))
            if shape.softcap:
                s = shape.softcap * np.tanh(s / shape.softcap)
                slack += shape.softcap * 4e-7
            if shape.slopes:  # the slope in base 2, the product and the sum are rounded
                s = s + float(self.slopes[h]) * behind
                slack += 3 * 2.0**-24 * np.abs(float(self.slopes[h]) * behind) + 2.0**-24 * np.abs(s)
            if shape.distances:  # as a slope
                bias = self.bias[h].double().numpy()[np.clip(-behind, 0, shape.distances - 1)]
                s = s + bias
                slack += 3 * 2.0**-24 * np.abs(bias) + 2.0**-24 * np.abs(s)
            s = np.where(seen, s, -np.inf)
            sink = np.full((len(s), 1), float(self.sinks[h]) if shape.sink_scores else -np.inf)
            top = np.maximum(s.max(axis=1, keepdims=True), sink)
            p = np.exp(s - top)
            p /= p.sum(axis=1, keepdims=True) + np.exp(sink - top)
            # A weight moves by at most twice the largest error of a score; exp and the sums add the rest.
            # Of 16 bits, weights are rounded once to `unit`, and so is the result.
            relative = 2 * np.where(seen, slack, 0).max(axis=1) + 1e-6 + sequence.length * 2.0**-23 + unit
            relative += 2.0**-22 * np.abs(np.where(seen, s, 0)).max(axis=1)
            if shape.sink_scores:
                relative += 2.0**-22 * np.abs(sink[:, 0])
            expected = p @ v
            bound = relative[:, None] * (p @ np.abs(v)) + p @ v_error + 1e-7
            if half:  # weights below its normal numbers lose more, relative to the largest score's 1
                bound += 2.0**-25 * np.abs(v).sum(axis=0) + 2.0**-11 * np.abs(expected)
            elif self.dtype == "float16":
                bound += 2.0**-11 * np.abs(expected)
            assert (np.abs(out[:, h].double().numpy() - expected) <= bound).all()
