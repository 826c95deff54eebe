"""Weights that need not travel: the same numbers from the same names, on every machine."""

from __future__ import annotations

import hashlib
import re
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

_STEP: Final = 0.02 / 73.9  # int8 codes are uniform with a deviation of 73.9: weights of 0.02


def seeded(name: str, shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
    """Random weights that depend on the name alone, of float16 or float32.

    Made of the raw output of a counter-based generator (Philox), whose numbers no release of numpy changes.
    """
    size = int(np.prod(shape))
    name = re.sub(r"\W", "_", name)  # as the importer writes names
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "little")
    raw = np.random.Philox(key=key).random_raw(-(-size // 8))
    codes = raw.view(np.int8)[:size].astype(np.float32)
    return (codes * np.float32(_STEP)).astype(dtype).reshape(shape)


def assembled(recipe: list[dict[str, Any]], dtype: str) -> NDArray[Any]:
    """A tensor of an artifact for GPUs: rows of one or several weights."""
    parts = []
    for source in recipe:
        weight = seeded(source["name"], tuple(source["shape"]), dtype)
        parts.append(weight.T if source["transposed"] else weight)
    return np.concatenate(parts) if len(parts) > 1 else np.ascontiguousarray(parts[0])
