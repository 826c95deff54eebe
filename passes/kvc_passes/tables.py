"""Elements of constant tables: uniform ones, triangles and bands, and what grows evenly with the index."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from tvm import tirx

from .affine import Affine
from .conditions import Unprovable, choose
from .graph import static
from .indices import int64

_EVEN = 1e-6
"""By how much the steps of a table that grows evenly may differ, relative to its largest number."""


def read_table(array: np.ndarray, index: Sequence[Any]) -> Any:
    """The element of a table at an index of which some axes are symbols. Raises Unprovable."""
    if array.size == 1:
        return array.reshape(-1)[0].item()
    known = [int(i) if isinstance(i, int) else static(i) for i in index]
    free = [axis for axis, i in enumerate(known) if i is None and array.shape[axis] > 1]
    part = array[tuple(slice(None) if a in free else (k or 0) for a, k in enumerate(known))]
    if not free:
        return part.item()
    if (part == part.reshape(-1)[0]).all():
        return part.reshape(-1)[0].item()
    symbols = [index[axis] for axis in free]
    found = _band(part, *symbols) if len(free) == 2 else _even(part, *symbols) if len(free) == 1 else None
    if found is None:
        raise Unprovable(
            f"reads a constant table of shape {list(array.shape)} that is neither uniform, nor triangular, "
            "nor evenly growing"
        )
    return found


def _band(part: np.ndarray, row: Any, column: Any) -> Any:
    """One value on a lower triangle or on a band of it, another elsewhere."""
    if len(np.unique(part)) != 2:
        return None
    inside, (rows, columns) = part == part[0, 0], np.indices(part.shape)
    seen, other = part[0, 0].item(), part[~inside][0].item()
    if np.array_equal(inside, columns <= rows):
        return choose(column <= row, seen, other)
    width = int(inside[-1].sum())
    if np.array_equal(inside, (columns <= rows) & (columns > rows - width)):
        return choose(tirx.And(column <= row, column > row - width), seen, other)
    return None


def _even(part: np.ndarray, symbol: Any) -> Any:
    """first + i * step."""
    if np.array_equal(part, np.arange(part.size)):
        return symbol
    if part.dtype.kind in "iu":
        whole = part.astype(np.int64)
        growth = int(whole[1] - whole[0])
        even = whole[0] + growth * np.arange(part.size)
        return int64(symbol) * growth + int(whole[0]) if np.array_equal(whole, even) else None
    if part.dtype.kind not in "fV":
        return None
    numbers = part.astype(np.float64)
    step = float(numbers[-1] - numbers[0]) / (part.size - 1)
    even = numbers[0] + step * np.arange(part.size)
    if not np.isfinite(numbers).all() or np.abs(numbers - even).max() > _EVEN * np.abs(numbers).max():
        return None
    return Affine(float(numbers[0]), ((int64(symbol), step),))
