"""weights.safetensors: the parameters of a compiled model, each on a 64-byte boundary, to be mapped."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from kvc_passes.errors import InputError, PlanningError

ALIGNMENT: Final = 64
"""Generated code loads whole cache lines: every tensor starts on one, in the file and so in memory."""

# dtype: (its name in safetensors, bytes an element)
_DTYPES: Final = {
    "float32": ("F32", 4),
    "float16": ("F16", 2),
    "bfloat16": ("BF16", 2),
    "int8": ("I8", 1),
    "uint8": ("U8", 1),
    "int32": ("I32", 4),
    "int64": ("I64", 8),
}
_DTYPE_OF: Final = {code: name for name, (code, _) in _DTYPES.items()}

Weight = tuple[str, Sequence[int], str, Callable[[], NDArray[Any]]]
"""Name, shape, dtype and the function that makes the array when its turn to be written comes."""


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a safetensors file; `offset` counts bytes from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    bytes: int


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The numpy dtype called `name`. bfloat16 comes from ml_dtypes, which is imported only for it."""
    if name == "bfloat16":
        import ml_dtypes

        bfloat16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
        return bfloat16
    return np.dtype(name)


def read_layout(file: Path) -> tuple[TensorSpec, ...]:
    """Where the tensors of a weights file lie, in the order that its metadata gives.

    Raises InputError if the header is damaged or a tensor is not aligned.
    """
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > file.stat().st_size:
                raise ValueError("the header is longer than the file")
            header = json.loads(stream.read(length))
        order = json.loads(header["__metadata__"]["order"])
        start = 8 + length
        specs = []
        for name in order:
            entry = header[name]
            first, end = entry["data_offsets"]
            width = numpy_dtype(_DTYPE_OF[entry["dtype"]]).itemsize
            if not 0 <= first <= start + end <= file.stat().st_size:
                raise ValueError(f"{name} lies outside the file")
            if end - first != math.prod(entry["shape"]) * width:
                raise ValueError(f"{name} has other bytes than its shape")
            specs.append(
                TensorSpec(name, _DTYPE_OF[entry["dtype"]], tuple(entry["shape"]), start + first, end - first)
            )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{file}: not a weights file of kvc ({error}); compile the model again") from None
    for spec in specs:
        if spec.offset % ALIGNMENT:
            raise InputError(f"{file}: {spec.name} is not on a {ALIGNMENT}-byte boundary; compile again")
    return tuple(specs)


def map_weights(file: Path) -> dict[str, NDArray[Any]]:
    """Read-only views of the memory-mapped weights by name, in the compiled functions' order."""
    bytes_ = np.memmap(file, dtype=np.uint8, mode="r")
    return {
        spec.name: bytes_[spec.offset : spec.offset + spec.bytes]
        .view(numpy_dtype(spec.dtype))
        .reshape(spec.shape)
        for spec in read_layout(file)
    }


def write_weights(items: Sequence[Weight], write: Callable[[Any], None]) -> None:
    """Write a whole file, holding one array at a time.

    Raises PlanningError if a producer returns another shape or dtype than announced.
    """
    text, pads = header(items)
    write(text)
    for (name, shape, dtype, produce), pad in zip(items, pads, strict=True):
        array = produce()
        if array.dtype != numpy_dtype(dtype) or array.shape != tuple(shape):
            raise PlanningError(
                f"weight {name} is {array.dtype}{array.shape}, not {dtype}{tuple(shape)} as announced"
            )
        write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        write(bytes(pad))
        del array  # before the next one is made


def header(items: Sequence[Weight]) -> tuple[bytes, list[int]]:
    """The safetensors header, padded so that the data starts aligned, and the pad bytes after each tensor."""
    entries: dict[str, Any] = {"__metadata__": {"order": json.dumps([name for name, *_ in items])}}
    pads: list[int] = []
    offset = 0
    for name, shape, dtype, _ in items:
        code, width = _DTYPES[dtype]
        end = offset + math.prod(shape) * width
        entries[name] = {"dtype": code, "shape": [int(s) for s in shape], "data_offsets": [offset, end]}
        pad = -end % ALIGNMENT
        if pad:  # the format allows no holes
            entries[f"__pad.{len(pads)}"] = {"dtype": "U8", "shape": [pad], "data_offsets": [end, end + pad]}
        pads.append(pad)
        offset = end + pad
    text = json.dumps(entries, separators=(",", ":")).encode("utf-8")
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text, pads
