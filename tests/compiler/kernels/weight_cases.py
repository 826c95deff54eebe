"""Random weights of every format: as they come, packed, and as numpy's float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from page_cases import numpy_type

from kvc.kernels.packing import pack_codes, pack_floats, pack_scales, pack_zeros, packed_tensors
from kvc_passes.weight_format import WeightFormat

FORMATS = {
    "float32": WeightFormat(),
    "float16": WeightFormat("float16"),
    "bfloat16": WeightFormat("bfloat16"),
    "uint4, as ONNX exports have it": WeightFormat("uint4", 32, "float32", zeros=True),
    "uint4, no zeros, float16 scales": WeightFormat("uint4", 16, "float16"),
    "uint4, odd blocks": WeightFormat("uint4", 5, "bfloat16", zeros=True),
    "uint4, a column's scale": WeightFormat("uint4", 4096, zeros=True),
    "uint8": WeightFormat("uint8", 32, "bfloat16"),
    "uint8, a scale an input": WeightFormat("uint8", 1, zeros=True),
    "uint8, a column's scale": WeightFormat("uint8", 4096),
}


def pack_into(
    out: Sequence[np.ndarray],
    weight: np.ndarray,
    format: WeightFormat,
    *,
    scales: np.ndarray | None = None,
    zeros: np.ndarray | None = None,
) -> None:
    """Pack all tensors of a weight: data, and scales and zeros where the format has them."""
    if not format.coded:
        pack_floats(weight, format, out[0])
        return
    pack_codes(weight, format, out[0])
    assert scales is not None
    pack_scales(scales, format, out[1])
    if format.zeros:
        assert zeros is not None
        pack_zeros(zeros, out[2])


@dataclass(frozen=True)
class Case:
    """A weight: `parts` are what pack_into takes (weight, scales, zeros), `value` is float64 [N, K]."""

    format: WeightFormat
    parts: tuple[np.ndarray, np.ndarray | None, np.ndarray | None]
    value: np.ndarray

    @classmethod
    def random(cls, n: int, k: int, format: WeightFormat, rng: np.random.Generator) -> Case:
        if not format.coded:
            floats = rng.standard_normal((n, k)).astype(numpy_type(format.dtype))
            return cls(format, (floats, None, None), floats.astype(float))
        size = 16 if format.dtype == "uint4" else 256
        codes = rng.integers(0, size, (n, k)).astype(np.uint8)
        blocks = (n, -(-k // format.block))
        scales = (rng.uniform(-1, 1, blocks) * 2 / size).astype(numpy_type(format.scales))
        zeros = rng.integers(0, size, blocks).astype(np.uint8) if format.zeros else None
        of = np.arange(k) // format.block
        zero = size / 2 if zeros is None else zeros[:, of].astype(float)
        return cls(format, (codes, scales, zeros), (codes - zero) * scales.astype(float)[:, of])

    def empty(self, lanes: int) -> list[np.ndarray]:
        """Uninitialised arrays for the packed weight."""
        n, k = self.value.shape
        return [np.full(t.shape, 77, numpy_type(t.dtype)) for t in packed_tensors(n, k, self.format, lanes)]

    def pack(self, out: list[np.ndarray]) -> list[np.ndarray]:
        weight, scales, zeros = self.parts
        pack_into(out, weight, self.format, scales=scales, zeros=zeros)
        return out

    def packed(self, lanes: int) -> list[np.ndarray]:
        return self.pack(self.empty(lanes))


def unpacked(packed: list[np.ndarray], k: int, format: WeightFormat) -> np.ndarray:
    """The rows of a packed weight as float64, padding included."""

    def rows(panels: np.ndarray) -> np.ndarray:
        return panels.transpose(0, 2, 1).reshape(-1, panels.shape[1])

    data = rows(packed[0])
    if not format.coded:
        return data.astype(float)
    if format.dtype == "uint4":
        data = np.stack([data & 15, data >> 4], axis=2).reshape(len(data), -1)[:, :k]
    of = np.arange(k) // format.block
    zero = rows(packed[2])[:, of].astype(float) if format.zeros else 8 if format.dtype == "uint4" else 128
    return (data.astype(float) - zero) * rows(packed[1])[:, of].astype(float)
