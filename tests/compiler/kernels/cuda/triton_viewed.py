"""Calls of the attention kernels that read and turn queries and keys where products leave them."""

from __future__ import annotations

import numpy as np
import torch
from triton_case import DTYPES, Case, Sequence
from triton_interpreter import run

from kvc.kernels.attention import AttentionShape
from kvc.kernels.cuda import attention
from kvc.kernels.cuda.attention import APPEND_TOKENS, append_kernel
from kvc.kernels.cuda.device import DeviceKernel
from kvc_passes.views import Angle, View, Views

_WIDE = (Angle("float32", 64, 0), Angle("float32", 64, 0))
VIEWED = {
    "a product of all three": (
        AttentionShape(8, 2, 64, 64, 0.125, page_size=64),
        Views(View(768, 0, 64, 32, *_WIDE), View(768, 512, 64, 32, *_WIDE), View(768, 640, 64)),
    ),
    "turned in part, groups apart": (
        AttentionShape(6, 2, 80, 72, 0.1, window=37, softcap=20.0, page_size=32),
        Views(
            View(1072, 8, 88, 10, Angle("float16", 24, 4), Angle("float32", 10, 0)),
            View(400, 240, 80, 10, Angle("float16", 24, 4), Angle("float32", 10, 0)),
            View(200, 56, 72),
        ),
    ),
    "heads before tokens": (
        AttentionShape(4, 1, 48, 48, 0.2, sink_scores=True),
        Views(View(None, 0, 0, 24, *_WIDE), View(None, 0, 0, 24, *_WIDE), View(48, 0, 48)),
    ),
    "keys alone": (AttentionShape(4, 4, 64, 32, 0.125), Views(None, View(256, 0, 64, 32, *_WIDE), None)),
    "not turned": (AttentionShape(4, 2, 64, 64, 0.12), Views(View(256, 0, 64), None, View(136, 8, 64))),
    "int8": (
        AttentionShape(4, 2, 64, 72, 0.125, stored="int8", page_size=32),
        Views(View(384, 0, 64, 16, *_WIDE), View(384, 256, 64, 16, *_WIDE), None),
    ),
    "int4": (
        AttentionShape(8, 1, 128, 80, 0.09, stored="int4"),
        Views(None, View(224, 0, 128, 64, *_WIDE), View(224, 144, 80)),
    ),
}
"""Attention, and how its kernels read what they are given."""


class ViewedCase(Case):
    """Rows with what others read are poisoned by NaN."""

    def __init__(self, name: str, dtype: str, lengths: list[tuple[int, int]], seed: int) -> None:
        shape, self.views = VIEWED[name]
        # What is rounded to 16 bits may be rounded the other way where float64 is near to the middle.
        self.step = 2.0**-10 if dtype == "float16" else 2.0**-22
        self.query_unit = self.step if self.views.query is not None and self.views.query.half else 0.0
        super().__init__(shape, dtype, lengths, seed)

    def prefill_kernel(self, tile: int) -> tuple[DeviceKernel, int]:
        kernel = attention.prefill_kernel(self.shape, tile, self.dtype, view=self.views.query)
        return kernel, self.shape.kv_heads

    def decode_kernel(self, splits: int) -> tuple[DeviceKernel, int]:
        kernel = attention.decode_kernel(self.shape, splits, self.dtype, view=self.views.query)
        return kernel, self.shape.kv_heads

    def asked(self, positions: list[np.ndarray]) -> tuple[list[torch.Tensor], torch.Tensor]:
        where = np.concatenate(positions)
        q = 2 * self.normal(self.shape.heads, len(where), self.shape.head_dim)
        view = self.views.query
        angles = angles_of(view, where)
        return [rows_of(view, q), *angles], turned(view, q, angles).transpose(0, 1)

    def append(self) -> None:
        page, views = self.shape.page_size, self.views
        where = [np.arange(s.length) for s in self.sequences]
        slots = np.concatenate([s.pages[i // page] * page + i % page for s, i in zip(self.sequences, where)])
        k, v = (torch.cat([getattr(s, x) for s in self.sequences], 1) for x in "kv")
        angles = angles_of(views.key, np.concatenate(where))
        run(
            append_kernel(self.shape, self.dtype, views.key, views.value),
            (-(-len(slots) // APPEND_TOKENS), self.shape.kv_heads),
            *(rows_of(views.key, k), rows_of(views.value, v), *angles),
            *(torch.from_numpy(slots).int(), *self.state, len(slots)),
        )
        for s, each in zip(self.sequences, where):
            s.k = turned(views.key, s.k, angles_of(views.key, each))

    def met(self, keys: np.ndarray, head: int) -> tuple[np.ndarray, np.ndarray]:
        found, _ = super().met(keys, head)
        return found, np.abs(found) * self.step + np.abs(found).max() * 2.0**-22

    def kept(self, sequence: Sequence) -> tuple[np.ndarray, np.ndarray]:
        if self.shape.stored is None:
            return super().kept(sequence)
        sequence.k = sequence.k.to(DTYPES["float32"])
        return super().kept(sequence)


def angles_of(view: View | None, positions: np.ndarray) -> list[torch.Tensor]:
    """Cosines and sines of positions as a view has them, among NaN."""
    if view is None or not view.half:
        return []
    angle = positions[:, None] * 10.0 ** -np.linspace(0, 2, view.half)
    found = []
    for where, numbers in zip(view.angles, (np.cos(angle), np.sin(angle))):
        table = torch.full((1, len(positions), where.columns), torch.nan, dtype=DTYPES[where.dtype])
        table[0, :, where.first : where.first + view.half] = torch.from_numpy(numbers)
        found.append(table)
    return found


def rows_of(view: View | None, x: torch.Tensor) -> torch.Tensor:
    """x [heads, n, elements] where a view reads it, among NaN."""
    if view is None or view.columns is None:
        return x[None].contiguous()
    rows = torch.full((1, x.shape[1], view.columns), torch.nan, dtype=x.dtype)
    for head, each in enumerate(x):
        first = view.first + head * view.stride
        rows[0, :, first : first + x.shape[2]] = each
    return rows


def turned(view: View | None, x: torch.Tensor, angles: list[torch.Tensor]) -> torch.Tensor:
    """x [heads, n, elements] in float64, its first 2 * half elements turned."""
    x = x.double()
    if view is None or not view.half:
        return x
    c, s = (t[0, :, a.first : a.first + view.half].double() for t, a in zip(angles, view.angles))
    low, high, rest = x.split([view.half, view.half, x.shape[2] - 2 * view.half], 2)
    return torch.cat([low * c - high * s, high * c + low * s, rest], 2)
