"""Where a model on the CPU has its tensors: numpy's memory, and weights mapped from their file."""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Final

import numpy as np
from numpy.typing import NDArray

from kvc.artifact import Artifact
from kvc.runtime.graphs import Key
from kvc.runtime.library import check_cpu, load_runtime, load_vm, thread_count
from kvc.weights_file import ALIGNMENT, TensorSpec, numpy_dtype
from kvc_passes.errors import InputError

Shapes = Mapping[str, tuple[str, tuple[int, ...]]]
"""Dtype and shape by name."""
_MADV_POPULATE_READ: Final = 22  # Linux 5.14; maps pages without breaking their sharing with the page cache


class HostMemory:
    """Implements executor.Memory.

    Raises TargetError if this CPU cannot run the code, InputError if library or weights cannot be loaded or
    there is not enough memory.
    """

    def __init__(self, artifact: Artifact, inputs: Shapes, pools: Shapes, threads: int | None) -> None:
        check_cpu(artifact.plan.target)
        threads = thread_count(artifact.plan.target, threads)
        self._ffi = load_runtime(threads)
        self.vm = load_vm(artifact.path / "model.so", threads)
        region = Region(sum(padded(*each) for each in inputs.values()))
        self.arrays = {name: region.array(*each) for name, each in inputs.items()}
        region = Region(sum(padded(*each) for each in pools.values()))
        self.pools = [
            typed(self._ffi, region.array(storage(dtype), shape), dtype) for dtype, shape in pools.values()
        ]
        self.weights = self._map(artifact.path / "weights.safetensors", artifact.layout())

    def give(self, name: str, count: int) -> Any:
        """The first `count` rows of an input as a tensor."""
        return self._ffi.from_dlpack(self.arrays[name][:count])

    def shaped(self, name: str, shape: tuple[int, ...]) -> Any:
        """The first elements of an input of one dimension, as a tensor of another shape."""
        return self._ffi.from_dlpack(self.arrays[name][: math.prod(shape)].reshape(shape))

    def place(self, name: str, count: int) -> Any:
        """The first `count` rows of what the function writes."""
        return self.give(name, count)

    def take(self, name: str, count: int) -> NDArray[Any]:
        """What the function wrote there."""
        return self.arrays[name][:count]

    def read(self, tensor: Any, array: NDArray[Any]) -> None:
        """Copy a tensor into an array of its type and shape."""
        array[...] = np.from_dlpack(tensor)

    def run(self, function: Any, arguments: Sequence[Any], shape: Key | None) -> Any:
        """Call a function; what it returns."""
        return function(*arguments)

    def close(self) -> None:
        """Nothing is held but memory."""

    def _map(self, file: Path, layout: Sequence[TensorSpec]) -> list[Any]:
        """The weights as tensors over a memory map, without a copy."""
        tensors = []
        for spec, raw in mapped(file, layout):
            tensors.append(typed(self._ffi, raw.view(storage(spec.dtype)).reshape(spec.shape), spec.dtype))
        return tensors


class Region:
    """Zeroed memory, page-aligned and touched, cut into arrays on 64-byte boundaries."""

    def __init__(self, size: int) -> None:
        try:
            memory = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise InputError(f"{size} bytes of memory cannot be had ({error.strerror})") from None
        with contextlib.suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)  # stays within the region, so it costs nothing
        self._data = np.frombuffer(memory, dtype=np.uint8)
        self._data[:: mmap.PAGESIZE] = 0
        self._used = 0

    def array(self, dtype: str | np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
        """The next array of the region."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        array = self._data[self._used : self._used + size].view(dtype).reshape(shape)
        self._used += -(-size // ALIGNMENT) * ALIGNMENT
        return array


def typed(ffi: Any, array: NDArray[Any], dtype: str) -> Any:
    """An array of `storage(dtype)` as a tensor of `dtype`, without a copy; `ffi` is the module tvm_ffi."""
    tensor = ffi.from_dlpack(array, require_alignment=ALIGNMENT, require_contiguous=True)
    if dtype != "bfloat16":
        return tensor
    view = ffi.get_global_func("runtime.TVMTensorCreateView")
    return view(tensor, ffi.Shape(array.shape), ffi.dtype(dtype), 0)


def placed(ffi: Any, array: NDArray[Any], dtype: str) -> Any:
    """A copy of an array of `storage(dtype)` as a tensor, in memory like that of pools: to be measured."""
    copy = Region(max(array.nbytes, 1)).array(array.dtype, array.shape)
    copy[...] = array
    return typed(ffi, copy, dtype)


def mapped(file: Path, layout: Sequence[TensorSpec]) -> list[tuple[TensorSpec, NDArray[np.uint8]]]:
    """The bytes of every weight, memory-mapped."""
    if not layout:
        return []
    with file.open("rb") as stream:
        data = np.frombuffer(map_of(stream), dtype=np.uint8)
    return [(spec, data[spec.offset : spec.offset + spec.bytes]) for spec in layout]


def map_of(stream: IO[bytes]) -> mmap.mmap:
    """A whole file in memory, populated."""
    # Private, since numpy exports no read-only memory: nobody writes, so all pages stay shared.
    memory = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
    with contextlib.suppress(OSError):
        memory.madvise(_MADV_POPULATE_READ)
    return memory


def storage(dtype: str) -> np.dtype[Any]:
    """What numpy holds a dtype in: it exports bfloat16 under no name that DLPack has."""
    return np.dtype(np.uint16) if dtype == "bfloat16" else np.dtype(numpy_dtype(dtype))


def padded(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor, whole alignments."""
    return -(-math.prod(shape) * storage(dtype).itemsize // ALIGNMENT) * ALIGNMENT
