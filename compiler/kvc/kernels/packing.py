"""How the weights of every format stand in memory: shapes, and numpy code that brings them there.

A panel holds NR = 2 * lanes outputs (rows of the weight [N, K]), the last one padded:

    floats          [panels, K, NR] in the format's own type
    uint8 codes     [panels, K, NR]
    uint4 codes     [panels, ceil(K / 2), NR], input 2 i in the low half of a byte, 2 i + 1 in the high half
    scales, zeros   [panels, ceil(K / block), NR]; the scales of padding are 0, so it stands for zeros
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kvc_passes.kernel_sets import TensorType
from kvc_passes.weight_format import FLOAT32, WeightFormat

Array = npt.NDArray[Any]

_STEP_BYTES = 2**22
"""About what one step of packing copies: temporaries stay this small."""


def packed_tensors(n: int, k: int, format: WeightFormat, lanes: int) -> tuple[TensorType, ...]:
    """The tensors of a packed [n, k] weight: data, then scales and zeros where the format has them.

    Raises ValueError for codes without a block.
    """
    panels, nr = -(-n // (2 * lanes)), 2 * lanes
    if not format.coded:
        return (TensorType(format.dtype, (panels, k, nr)),)
    if format.block < 1:
        raise ValueError(f"{format.dtype} codes need a block of at least one input")
    rows = -(-k // 2) if format.dtype == "uint4" else k
    blocks = (panels, -(-k // format.block), nr)
    tensors = [TensorType("uint8", (panels, rows, nr)), TensorType(format.scales, blocks)]
    if format.zeros:
        tensors.append(TensorType("uint8", blocks))
    return tuple(tensors)


def extent(columns: int, tensor: TensorType) -> int:
    """Panels that `columns` rows fill."""
    return -(-columns // tensor.shape[2])


def pack_floats(weight: Array, format: WeightFormat, out: Array) -> None:
    """Pack floats [N, K] into the data tensor `out`; any float type goes into float32."""
    if format.dtype == "float32":
        _panels(weight, out)
    else:
        _panels(_bits(weight, format.dtype), _bits(out, format.dtype))


def pack(w: Array, lanes: int, out: Array | None = None) -> Array:
    """Pack a float32 [N, K] weight into panels [ceil(N / NR), K, NR], NR = 2 * lanes, padded with zeros.

    `w` may be any strided view (such as the transpose of a [K, N] array). It is copied once, a few panels
    at a time, into `out` when given (float32 of the packed shape), else into a new array.
    """
    if out is None:
        n, k = w.shape
        out = np.empty(packed_tensors(n, k, FLOAT32, lanes)[0].shape, np.float32)
    _panels(w, out)
    return out


def pack_codes(codes: Array, format: WeightFormat, out: Array) -> None:
    """Pack uint8 codes [N, K], one an element, into the data tensor `out`. Raises ValueError if not uint8."""
    if codes.dtype != np.uint8 or out.dtype != np.uint8:
        raise ValueError(f"codes are uint8, not {codes.dtype} and {out.dtype}")
    if format.dtype == "uint8":
        _panels(codes, out)
        return
    n, k = codes.shape
    if out.shape[1] != -(-k // 2):
        raise ValueError(f"codes [{n}, {k}] do not fill panels {out.shape}")
    step = _step(out)
    for start in range(0, len(out), step):
        part = out[start : start + step]
        rows = codes[start * part.shape[2] : (start + len(part)) * part.shape[2]]
        pairs = np.zeros((len(rows), part.shape[1]), np.uint8)
        pairs[:, : k // 2] = rows[:, 1::2]
        pairs <<= 4
        pairs |= rows[:, 0::2] & 15
        _panels(pairs, part)


def pack_scales(scales: Array, format: WeightFormat, out: Array) -> None:
    """Pack scales [N, blocks] of the format's scale type into the scales tensor `out`."""
    _panels(_bits(scales, format.scales), _bits(out, format.scales))


def pack_zeros(zeros: Array, out: Array) -> None:
    """Pack zero points uint8 [N, blocks] into the zeros tensor `out`."""
    if zeros.dtype != np.uint8 or out.dtype != np.uint8:
        raise ValueError(f"zero points are uint8, not {zeros.dtype} and {out.dtype}")
    _panels(zeros, out)


def _bits(array: Array, dtype: str) -> Array:
    """The array; 16-bit floats as uint16, so that bfloat16 needs no type of numpy."""
    if dtype == "float32":
        return array
    if str(array.dtype) not in (dtype, "uint16"):
        raise ValueError(f"expected {dtype}, got {array.dtype}")
    return array.view(np.uint16)


def _step(out: Array) -> int:
    """Panels packed in one step."""
    return max(1, _STEP_BYTES // max(1, int(out[0].nbytes)))


def _panels(rows: Array, out: Array) -> None:
    """out[b, k, j] = rows[b * NR + j, k], and zero where there is no such row."""
    (n, k), (panels, depth, nr) = rows.shape, out.shape
    if depth != k or not (panels - 1) * nr < n <= panels * nr:
        raise ValueError(f"a weight [{n}, {k}] does not fill panels {out.shape}")
    full, step = n // nr, _step(out)
    for start in range(0, full, step):
        stop = min(start + step, full)
        block = rows[start * nr : stop * nr].reshape(stop - start, nr, k)
        out[start:stop] = block.transpose(0, 2, 1)
    if full < panels:
        out[full, :, : n - full * nr] = rows[full * nr :].T
        out[full, :, n - full * nr :] = 0
