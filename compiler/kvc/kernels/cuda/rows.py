"""How CUDA's products take their weights: row by row, codes of four bits two in a byte.

floats         [N, K] in the format's own type
uint8 codes    [N, K]
uint4 codes    [N, ceil(K / 64) * 32]; of 64 inputs, byte i holds input i in its low half, 32 + i in its high
scales, zeros  [N, ceil(K / block)]
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kvc_passes.kernel_sets import TensorType
from kvc_passes.weight_format import WeightFormat

Array = npt.NDArray[Any]

GROUP = 64
"""Inputs whose codes of four bits stand together."""


def packed_tensors(columns: int, depth: int, format: WeightFormat) -> tuple[TensorType, ...]:
    """The tensors of a weight [columns, depth]: data, then scales and zeros where the format has them.

    Raises ValueError for codes without a block.
    """
    if not format.coded:
        return (TensorType(format.dtype, (columns, depth)),)
    if format.block < 1:
        raise ValueError(f"{format.dtype} codes need a block of at least one input")
    width = -(-depth // GROUP) * (GROUP // 2) if format.dtype == "uint4" else depth
    blocks = (columns, -(-depth // format.block))
    tensors = [TensorType("uint8", (columns, width)), TensorType(format.scales, blocks)]
    if format.zeros:
        tensors.append(TensorType("uint8", blocks))
    return tuple(tensors)


def extent(columns: int, tensor: TensorType) -> int:
    """Rows that a weight of `columns` rows fills."""
    return columns


def pack_floats(weight: Array, format: WeightFormat, out: Array) -> None:
    """Copy floats [N, K]."""
    out[...] = weight


def pack_codes(codes: Array, format: WeightFormat, out: Array) -> None:
    """Copy uint8 codes [N, K]; those of four bits two by two."""
    if format.dtype == "uint8":
        out[...] = codes
        return
    rows, depth = codes.shape
    for start in range(0, rows, 1024):  # temporaries stay small
        part = codes[start : start + 1024]
        whole = np.zeros((len(part), out.shape[1] // (GROUP // 2), 2, GROUP // 2), np.uint8)
        whole.reshape(len(part), -1)[:, :depth] = part
        out[start : start + 1024] = (whole[:, :, 0] | whole[:, :, 1] << 4).reshape(len(part), -1)


def pack_scales(scales: Array, format: WeightFormat, out: Array) -> None:
    """Copy scales [N, blocks]."""
    out[...] = scales


def pack_zeros(zeros: Array, out: Array) -> None:
    """Copy zero points uint8 [N, blocks]."""
    out[...] = zeros
