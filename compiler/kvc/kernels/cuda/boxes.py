"""Matrices of which a kernel gets boxes from the copy engine of sm_90 and later (TMA).

Such a parameter has Triton's type tensordesc<fp16[rows, columns]>: what one load brings. A launch passes for
it a tensor map, 128 bytes by value which the driver encodes on the host, then the sizes of the matrix (i32)
and its strides (i64). What lies outside of the matrix is read as zeros.
"""

from __future__ import annotations

import re

BYTES = 2
"""Of an element."""
DTYPES = {"fp16": "float16", "bf16": "bfloat16"}
"""Elements by Triton's names."""
HIDDEN = ("i32", "i32", "i64", "i64")
"""What follows a tensor map among the parameters: sizes and strides, slowest first."""
_TYPE = re.compile(r"tensordesc<(\w+)\[(\d+), (\d+)\]>")
_SPAN = 128
"""Most bytes of a row that one copy brings: wider boxes take several."""
_SWIZZLES = {32: 1, 64: 2, 128: 3}
"""CUtensorMapSwizzle by the bytes of a row."""


def legal(arch: int, *pitches: int) -> bool:
    """Whether sm_<arch> has the engine and it copies rows of so many elements: whole 16 bytes."""
    return 90 <= arch < 120 and all(pitch * BYTES % 16 == 0 for pitch in pitches)


def type_of(element: str, rows: int, columns: int) -> str:
    """Triton's type of a matrix of `element` (of DTYPES), a load of which brings rows x columns elements."""
    return f"tensordesc<{element}[{rows}, {columns}]>"


def is_matrix(type: str) -> bool:
    return _TYPE.fullmatch(type) is not None


def dtype_of(type: str) -> str:
    return DTYPES[_found(type)[1]]


def shape_of(type: str) -> tuple[int, int]:
    """Rows and columns of a load of such a matrix."""
    return int(_found(type)[2]), int(_found(type)[3])


def copied(type: str) -> tuple[int, int, int]:
    """Rows and columns that one copy of a load brings, and its swizzle: how Triton compiles the type."""
    rows, columns = shape_of(type)
    columns = min(columns, _SPAN // BYTES)
    return rows, columns, _SWIZZLES[columns * BYTES]


def _found(type: str) -> re.Match[str]:
    found = _TYPE.fullmatch(type)
    if found is None:
        raise ValueError(f"{type} is no matrix of boxes")
    return found
