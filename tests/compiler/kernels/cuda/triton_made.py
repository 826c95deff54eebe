"""Calls of the attention kernels that make keys, or keys and values, of what is kept."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from triton_case import Case, Sequence

from kvc.kernels.attention import AttentionShape
from kvc.kernels.cuda import rekeyed, remade
from kvc.kernels.cuda.device import DeviceKernel
from kvc.kernels.cuda.remade import Making, kept_shape
from kvc.kernels.rekeyed import row_of
from kvc_passes.sites import Rekeyed, Remade, Sliced
from support import turned

MADE = {
    "llama": (AttentionShape(4, 4, 64, 64, 0.125, page_size=32), Remade(96, 32, False), (False, False)),
    "groups, biases": (
        AttentionShape(6, 2, 40, 24, 0.2, window=37, sink_keys=5, softcap=20.0),
        Remade(72, 10, True),
        (True, True),
    ),
    "not turned, learned bias": (
        AttentionShape(3, 3, 24, 72, 0.2, distances=30, page_size=64),
        Remade(136, 0, False),
        (False, True),
    ),
    "latent": (AttentionShape(4, 2, 64, 48, 0.12, slopes=True), Remade(72, 0, False), (False, False)),
}
"""Attention over keys and values that are made, what they are made of, and their biases."""
LATENT = {"latent": 24}
"""Of those whose W_K is that of an absorbed product, elements that are kept of every key."""
REKEYED = {
    "as Gemma-4": (AttentionShape(8, 2, 64, 64, 0.125, page_size=64), Rekeyed(2, 64, 32, 8, True, True)),
    "odd, turned whole, chunks": (
        AttentionShape(3, 3, 35, 35, 0.2, chunk=50, distances=12, page_size=32),
        Rekeyed(3, 35, 11, 11, True, False),
    ),
    "not turned, everything else": (
        AttentionShape(
            6, 2, 24, 24, 0.2, slopes=True, softcap=20.0, sink_scores=True, window=37, sink_keys=5
        ),
        Rekeyed(2, 24, 0, 0, False, True),
    ),
    "wide": (AttentionShape(4, 2, 520, 520, 0.04, page_size=64), Rekeyed(2, 520, 260, 72, False, True)),
}
"""Attention over keys that are made of values, and what is kept."""


class MadeCase(Case):
    """Keys and values are made again from rows that are kept."""

    def __init__(self, name: str, dtype: str, lengths: list[tuple[int, int]], seed: int) -> None:
        shape, self.remade, biases = MADE[name]
        self.making = Making(self.remade, dtype, dtype, biases, name in LATENT, LATENT.get(name, 0))
        kept = dataclasses.replace(kept_shape(shape, self.remade), head_dim=self.making.width)
        super().__init__(kept, dtype, lengths, seed)
        self.shape = dataclasses.replace(shape, kv_dtype=dtype)
        self.sizes = (shape.head_dim - self.making.extra, shape.value_dim)
        columns = [shape.kv_heads * size for size in self.sizes]
        self.matrices = [self.normal(c, self.remade.depth) / 8 for c in columns]
        self.biases = [self.normal(c) if has else None for c, has in zip(columns, biases)]
        key, value = self.matrices
        if self.making.absorbed:  # [KV heads * depth, elements of a key]
            key = (
                key.reshape(shape.kv_heads, -1, self.remade.depth).transpose(1, 2).flatten(0, 1).contiguous()
            )
        self.extras += [w for w in (key, value, *self.biases) if w is not None]

    def prefill_kernel(self, tile: int) -> tuple[DeviceKernel, int]:
        return remade.prefill_kernel(self.shape, self.making, self.dtype), self.shape.kv_heads

    def decode_kernel(self, splits: int) -> tuple[DeviceKernel, int]:
        return remade.decode_kernel(self.shape, self.making, self.dtype), self.shape.kv_heads

    def kept(self, sequence: Sequence) -> tuple[np.ndarray, np.ndarray]:
        """The rows, for keys and for values."""
        rows = sequence.k[0].double().numpy()
        return rows, rows

    def made(self, rows: np.ndarray, part: int, head: int) -> tuple[np.ndarray, np.ndarray]:
        """A KV head's keys or values [length, size] before they are turned, and their error in float32."""
        size = self.sizes[part]
        columns, bias = slice(head * size, (head + 1) * size), self.biases[part]
        x, w = rows[:, : self.remade.depth], self.matrices[part][columns].double().numpy()
        b = np.zeros(size) if bias is None else bias[columns].double().numpy()
        return x @ w.T + b, 2.0**-24 * (self.remade.depth + 16) * (np.abs(x) @ np.abs(w).T + np.abs(b))

    def met(self, keys: np.ndarray, head: int) -> tuple[np.ndarray, np.ndarray]:
        (made, error), kept = self.made(keys, 0, head // self.shape.group), self.remade
        sliced = Sliced(1, self.sizes[0], 0, kept.half, kept.fine)
        behind = keys[:, kept.depth :]
        found = turned(np.concatenate([made, behind], 1)[None], sliced)[0, 0]
        if self.making.extra:
            found = np.concatenate([found, behind], 1)
        # An angle is no larger than 1 in a model, and here than 5.
        return found, 10 * error.max(axis=1, keepdims=True) + self.unit * np.abs(found)

    def of_values(self, values: np.ndarray, head: int) -> tuple[np.ndarray, np.ndarray]:
        made, error = self.made(values, 1, head // self.shape.group)
        return made, error + self.unit * np.abs(made)


class RekeyedCase(Case):
    """Keys are made of the values that are kept."""

    def __init__(self, name: str, dtype: str, lengths: list[tuple[int, int]], seed: int) -> None:
        shape, self.rekeyed = REKEYED[name]
        super().__init__(row_of(shape, self.rekeyed), dtype, lengths, seed)
        self.shape = dataclasses.replace(shape, kv_dtype=dtype)
        self.factors = torch.randn(self.rekeyed.values, generator=self.random)
        self.extras += [self.factors] if self.rekeyed.scaled else []

    def prefill_kernel(self, tile: int) -> tuple[DeviceKernel, int]:
        return rekeyed.prefill_kernel(self.shape, self.rekeyed, self.dtype)

    def decode_kernel(self, splits: int) -> tuple[DeviceKernel, int]:
        return rekeyed.decode_kernel(self.shape, self.rekeyed, self.dtype)

    def kept(self, sequence: Sequence) -> tuple[np.ndarray, np.ndarray]:
        """The rows, for keys and for values."""
        rows = sequence.k[0].double().numpy()
        return rows, rows

    def met(self, keys: np.ndarray, head: int) -> tuple[np.ndarray, np.ndarray]:
        kept, values = self.rekeyed, self.of_values(keys, head)[0]
        own = slice(head // self.shape.group * kept.dim, (head // self.shape.group + 1) * kept.dim)
        made = values * (self.factors.double().numpy()[own] if kept.scaled else 1)
        low, high = slice(0, kept.pairs), slice(kept.half, kept.half + kept.pairs)
        parts = np.split(keys[:, kept.values :], 4 if kept.fine else 2, axis=1)
        cosine, sine = (a + b / 256 for a, b in zip(parts, parts[2:])) if kept.fine else parts
        found, size = made.copy(), np.abs(made)
        found[:, low] = made[:, low] * cosine - made[:, high] * sine
        found[:, high] = made[:, high] * cosine + made[:, low] * sine
        size[:, low] = np.abs(made[:, low] * cosine) + np.abs(made[:, high] * sine)
        size[:, high] = np.abs(made[:, high] * cosine) + np.abs(made[:, low] * sine)
        # The angle, the factor, two products and their sum are rounded in float32, then the key once.
        return found, 4 * 2.0**-24 * size + self.unit * np.abs(found)

    def of_values(self, values: np.ndarray, head: int) -> tuple[np.ndarray, np.ndarray]:
        first = head // self.shape.group * self.rekeyed.dim
        found = values[:, first : first + self.rekeyed.dim]
        return found, np.zeros_like(found)
